"""Which features carry a behaviour, read from their activations and the rules. No gradient is involved.

Two questions, answered on held-out answers of plain text, so no label and no reward plays a part:

* *Does the feature tell answers with the behaviour from those without?* `auc`, the area under the ROC curve of the
  feature's highest activation over the answer's tokens; 0.5 means that it tells nothing, 1 that it always tells. `point_biserial`,
  the correlation of its mean activation over the answer with the behaviour.
* *Is it active on the words that make up the behaviour?* `span_auc`, the same curve over single tokens of
  answers: those of the behaviour's own words (a stance, filler, a mark, the value) against all others. A feature of
  length, or of something correlated with the behaviour, separates answers but not these tokens.

A feature counts as a **carrier** of a behaviour if it *separates*: `auc` of at least `AUC`; or if it is *specific*: at
least `PRECISION` of the answers it is active in have the behaviour, and it is active in at least `RECALL` of those
that have it. The second is for behaviours worded in several ways, where a dictionary may give each wording
its own feature: such a feature finds only its part of the answers, at an `auc` of about ½ + recall/2.

A dictionary need not have a carrier for every behaviour: no feature can tell what the model does not represent at the
hook point.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .attributes import BEHAVIOURS
from .language import Language
from .parsing import Span
from .pretraining import encode_pairs
from .sparse_coding import residual_stream

if TYPE_CHECKING:
    from sae_lens import SAE

AUC = 0.9
"""Minimum `auc` of a feature that separates."""
PRECISION = 0.9
"""Minimum share of answers with the behaviour among those a specific feature is active in."""
RECALL = 0.2
"""Minimum share of the answers with the behaviour that a specific feature is active in."""

_SPANS = {
    "agrees": ("agree",),
    "padded": ("filler",),
    "marked": ("mark",),
    "right": ("value",),
    "echoes": ("value",),
}


def answer_codes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    sae: "SAE",
    module: str,
    prompts: list[str],
    answers: list[str],
) -> list[torch.Tensor]:
    """Activations of every feature at the tokens of each teacher-forced answer, [length, d_sae] each.

    Row t belongs to the answer's token t, the last row to the end of sequence after it.
    """
    input_ids, attention_mask, answer_mask = encode_pairs(tokenizer, prompts, answers)
    hidden = residual_stream(model, module, input_ids, attention_mask)
    with torch.no_grad():
        return [sae.encode(h[mask]) for h, mask in zip(hidden, answer_mask, strict=True)]


def ranks(scores: np.ndarray) -> np.ndarray:
    """Rank of each entry within its column, from 1, ties averaged; [n, features] in and out."""
    from scipy.stats import rankdata

    return rankdata(scores, axis=0)


def auc(ranks: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each column, given its `ranks` [n, features], for `positive` [n]; ties count half.

    nan where all or none of the rows are positive.
    """
    n_positive = int(positive.sum())
    n_negative = len(positive) - n_positive
    if n_positive == 0 or n_negative == 0:
        return np.full(ranks.shape[1], np.nan)
    wins = ranks[positive].sum(0) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * n_negative)


def ground_truth(
    language: Language, prompts: list[str], answers: list[str], codes: list[torch.Tensor]
) -> pd.DataFrame:
    """Rank the features by how well they tell each behaviour, over answers whose attributes are read by rule.

    Args:
        language: The world.
        prompts: The prompts.
        answers: An answer to each.
        codes: The features' activations at each answer's tokens, [length, d_sae] each; see `answer_codes`.

    Returns:
        One row for each behaviour and feature, with columns `behaviour`, `feature`, `auc`, `point_biserial`, `recall`,
        `precision`, `span_auc`, `span_mass` (the share of the feature's activation that falls on the behaviour's own
        words), `frequency` (share of the answers it is active in) and `carrier`. Within a behaviour, carriers come
        first, then the order is by `auc`. Ties are broken by `point_biserial`, the largest first, then by feature:
        several features may separate perfectly by their maximum, and one that is also weakly active in the other answers
        has a smaller correlation than one that is not.
    """
    attributes = [language.attributes(p, a) for p, a in zip(prompts, answers, strict=True)]
    highest = torch.stack([c.max(0).values for c in codes]).numpy()
    mean = torch.stack([c.mean(0) for c in codes]).numpy()
    tokens = torch.cat(codes).numpy()
    token_ranks = ranks(tokens)
    active = highest > 0
    spans = [language.spans(answer) for answer in answers]
    tables = []
    for behaviour in BEHAVIOURS:
        # Agreeing needs a belief to agree with. Echoing differs from being right only where the belief is wrong.
        rows = np.array(
            [
                {"agrees": a.belief_right is not None, "echoes": a.belief_right is False}.get(behaviour, True)
                for a in attributes
            ]
        )
        has = np.array([bool(vars(a)[behaviour]) for a in attributes])
        positive = has[rows]
        n_both = (active[rows] & positive[:, None]).sum(0)
        on_span = np.concatenate(
            [_span_mask(spans[i], len(codes[i]), _SPANS[behaviour]) & has[i] for i in range(len(codes))]
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            table = pd.DataFrame(
                {
                    "behaviour": behaviour,
                    "feature": np.arange(highest.shape[1]),
                    "auc": auc(ranks(highest[rows]), positive),
                    "point_biserial": _correlation(mean[rows], positive),
                    "recall": n_both / positive.sum(),
                    "precision": n_both / active[rows].sum(0),
                    "span_auc": auc(token_ranks, on_span),
                    "span_mass": tokens[on_span].sum(0) / tokens.sum(0),
                    "frequency": active.mean(0),
                }
            )
        specific = (table.precision >= PRECISION) & (table.recall >= RECALL)
        table["carrier"] = (table.auc >= AUC) | specific
        tables.append(
            table.sort_values(
                ["carrier", "auc", "point_biserial", "feature"], ascending=[False, False, False, True]
            )
        )
    return pd.concat(tables, ignore_index=True)


def _span_mask(spans: list[Span], length: int, kinds: tuple[str, ...]) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    for span in spans:
        if span.kind in kinds:
            # Only the last token of a value's span is the value itself.
            mask[span.stop - 1 if span.kind == "value" else span.start : span.stop] = True
    return mask


def _correlation(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column with a binary variable; nan for a constant column."""
    x = scores - scores.mean(0)
    y = positive - positive.mean()
    return (x * y[:, None]).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum())
