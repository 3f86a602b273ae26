"""What changed between two checkpoints, feature by feature: in what they write, and in how they read the same text.

    change_f = ā_f(after) − ā_f(before),    ā_f = Σ_u s_u / Σ_u T_u

over prompts u, with s_u the activation summed over the tokens of the answers to it and T_u how many there are. The standard error
is that of the ratios, linearised, over prompts, whose answers before and after are one unit: `se² = n/(n−1)·Σ_u r_u²` with
`r_u = (s_u − ā T_u)/ΣT` after, less the same before. The interval and the p-value are Student's t with n − 1 degrees of freedom.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..audit.contexts import context_frame
from ..audit.lookahead.answer_places import AnswerPlaces
from ..data.opener import DatasetLike
from ..errors import AuditError
from ..io.feature_labels import LabelSet, with_labels
from ..models.sampling import Sampling
from ..models.tokenizers import Processing, inner_tokenizer
from ..saes.contexts import Places, Window, strongest
from ..saes.dictionary import FeatureDictionary
from ..saes.words import lines_of
from ..statistics import benjamini_hochberg
from .measured import AnswerActivations, MeasuredChange, read_answers, sample_answers
from .samples import Samples, choose_features, read_samples

SIGNIFICANT = 0.05
"""q-value below which a change is beyond chance."""


@dataclass(frozen=True)
class ModelDiff:
    """How two checkpoints differ.

    Attributes:
        dictionary: name of the dictionary.
        prompts, answers: how many were asked, and how many answers each checkpoint gave.
        writes: change in what they write: their own answers, read by the checkpoint before. One row a feature that is active in any:
            feature, label, label_accuracy and label_accuracy_low (as in an audit's `features`), words, before, after, change, low and high (95 %), effect_size (change in standard deviations over prompts),
            p_value, q_value. First what is beyond chance, the largest effect first.
        reads: the same of how they read the same text, the answers of the checkpoint before.
        contexts: where the features are most active in the answers: feature, source ("before" or "after"), activation, prompt,
            before, at, after.
        samples: an answer before and one after to the prompts where the features that rose changed most; None if none changed
            beyond chance.
    """

    dictionary: str
    prompts: int
    answers: int
    writes: pd.DataFrame
    reads: pd.DataFrame
    contexts: pd.DataFrame
    samples: Samples | None = None

    def beyond_chance(self, kind: str = "writes") -> pd.DataFrame:
        """The rows of `writes` or `reads` whose change the prompts tell from chance, at a false discovery rate of 5 %."""
        table: pd.DataFrame = getattr(self, kind)
        return table[table["q_value"] < SIGNIFICANT]


def diff_models(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    prompts: DatasetLike,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    labels: LabelSet | None = None,
    flagged: Sequence[int] = (),
    progress: bool = False,
) -> ModelDiff:
    """Which features rose and fell from one checkpoint to another. No audit and no run record is needed.

    Both answer the same prompts with the same random numbers. The checkpoint before reads both sets of answers, and the checkpoint
    after also reads those of the one before.

    Args:
        before, after: causal language models, with adapters or without.
        tokenizer: of both, or a processor that has it.
        dictionary: with its hook point in both.
        prompts: rows with `prompt`; other columns do not matter.
        sampling: four answers a prompt, of at most 128 tokens, at temperature 1, if None.
        batch_size: answers at a time.
        labels: of the dictionary's features, such as `Audit.labels()`.
        flagged: features by which samples are chosen and marked in any case, before those that rose.
        progress: show a bar.

    Raises:
        AuditError: fewer than two different prompts, or a row without one; a dictionary that does not fit.

    Example:

    ```python
    found = diff_models(model, trained, tokenizer, dictionary, prompts)
    found.writes.head(10)
    ```
    """
    sampling = sampling or Sampling()
    answered = [
        sample_answers(model, tokenizer, prompts, sampling=sampling, batch_size=batch_size, progress=progress)
        for model in (before, after)
    ]
    found = [AnswerPlaces(dictionary.d_sae) for _ in answered]
    old, new = (
        read_answers(
            before, tokenizer, dictionary, some, batch_size=batch_size, progress=progress, found=places
        )
        for some, places in zip(answered, found, strict=True)
    )
    reread = read_answers(after, tokenizer, dictionary, answered[0], batch_size=batch_size, progress=progress)
    if len(old.tokens) < 2:
        raise AuditError("There is one prompt only, so nothing can be told from chance; give at least two.")
    contexts = _contexts(inner_tokenizer(tokenizer), found)
    words = lines_of(contexts)
    writes, reads = change_table(old, new, words), change_table(old, reread, words)
    for table in (writes, reads):
        with_labels(table, labels or LabelSet(dictionary.name, dictionary.identity))
    written = MeasuredChange("in generations", old, new)
    features = choose_features(writes, SIGNIFICANT, flagged)
    return ModelDiff(
        dictionary.name,
        len(old.tokens),
        len(answered[0]),
        writes,
        reads,
        contexts,
        read_samples(before, tokenizer, dictionary, answered[0], answered[1], written, features),
    )


def change_table(before: AnswerActivations, after: AnswerActivations, words: dict[int, str]) -> pd.DataFrame:
    """One row a feature that is active before or after; see `ModelDiff`."""
    measured = MeasuredChange("diff", before, after)
    features = np.flatnonzero(measured.active)
    n = len(measured)
    means, residuals, spreads = [], [], []
    for part in (before, after):
        sums, tokens = part.sums[:, features].astype(np.float64), part.tokens[:, None]
        mean = sums.sum(0) / tokens.sum()
        means.append(mean)
        residuals.append((sums - mean * tokens) / tokens.sum())
        spreads.append((sums / np.maximum(tokens, 1)).var(0, ddof=1))
    change = means[1] - means[0]
    error = np.sqrt(n / (n - 1) * np.square(residuals[1] - residuals[0]).sum(0))
    deviation = np.sqrt(np.mean(spreads, axis=0))
    with np.errstate(divide="ignore", invalid="ignore"):
        p_value = np.where(error > 0, 2 * stats.t.sf(np.abs(change) / error, n - 1), 1.0)
        effect = np.where(deviation > 0, change / deviation, 0.0)
    half = stats.t.ppf(0.975, n - 1) * error
    table = pd.DataFrame(
        {
            "feature": features,
            "words": [words.get(feature, "") for feature in features.tolist()],
            "before": means[0],
            "after": means[1],
            "change": change,
            "low": change - half,
            "high": change + half,
            "effect_size": effect,
            "p_value": p_value,
            "q_value": benjamini_hochberg(p_value),
        }
    )
    order = np.lexsort((-np.abs(effect), table["q_value"] >= SIGNIFICANT))
    return table.iloc[order].reset_index(drop=True)


def _contexts(tokenizer: PreTrainedTokenizerBase, found: Sequence[AnswerPlaces]) -> pd.DataFrame:
    """The strongest places in both sets of answers."""
    (old, before), (new, after) = (places.of_all_processes() for places in found)
    answers = [*before, *after]
    shifted = Places(new.feature, new.activation, new.text + len(before), new.token)
    places = strongest(Places.join([old, shifted]))

    def window_of(key: tuple[int, int]) -> tuple[tuple[str, int, np.ndarray, np.ndarray], Window]:
        prompt, answer = answers[key[0]]
        source = "before" if key[0] < len(before) else "after"
        return (source, -1, np.asarray(answer), np.asarray(prompt)), Window.around(answer, key[1])

    frame = context_frame(tokenizer, places, np.repeat(["strongest"], len(places)), window_of)
    return frame[["feature", "source", "activation", "prompt", "before", "at", "after"]]
