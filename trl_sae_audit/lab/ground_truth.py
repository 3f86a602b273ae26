"""Which features carry a behaviour: read from their activations and the rules, with no gradient involved.

Two questions, answered on held-out answers of plain text (so that no label or reward comes in):

* *Does the feature tell answers with the behaviour from those without?* `auc`, the area under the ROC curve of the
  feature's highest activation over the answer's tokens; 0.5 tells nothing, 1 tells always. `point_biserial`,
  the correlation of its mean activation over the answer with the behaviour.
* *Does it fire on the words that make up the behaviour?* `span_auc`, the same curve over single tokens of
  answers: those of the behaviour's own words (a stance, filler, a mark, the value) against all others. A feature of
  length, or of what tends to come along, separates answers but not these tokens.

A feature counts as a **carrier** of a behaviour if it *separates*: `auc` of at least `AUC`; or if it is *specific*: at
least `PRECISION` of the answers it is active in have the behaviour, and it is active in at least `RECALL` of those
that have it. The second is for behaviours worded in several ways, where a dictionary may give each wording
its own feature: such a feature finds its part of the answers only, at an `auc` of about ½ + recall/2.

A dictionary need not have a carrier for everything: what the model does not represent at the hook point, no feature
tells.
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trl_sae_audit.lab.language import BEHAVIOURS, Language
from trl_sae_audit.lab.pretraining import encode_pairs
from trl_sae_audit.lab.sparse_coding import residual_stream

if TYPE_CHECKING:
    from sae_lens import SAE

AUC = 0.9
"""Least `auc` of a feature that separates."""
PRECISION = 0.9
"""Least share, among the answers a specific feature is active in, of those with the behaviour."""
RECALL = 0.2
"""Least share of the answers with the behaviour in which a specific feature is active."""

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
    """Activations of every feature over the tokens of each teacher-forced answer, [length, d_sae] each.

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
        codes: The features' activations over each answer's tokens, [length, d_sae] each; see `answer_codes`.

    Returns:
        One row a behaviour and feature, the best first within each behaviour, with columns `behaviour`, `feature`, `auc`,
        `point_biserial`, `recall`, `precision`, `span_auc`, `span_mass` (the share of the feature's activation that
        falls on the behaviour's own words), `frequency` (share of the answers it is active in) and `carrier`. The order
        is that of `auc`, carriers before the rest.
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
        # agreeing needs a belief to agree with; echoing is more than being right only where the belief is wrong
        rows = np.array(
            [
                {"agrees": a.belief_right is not None, "echoes": a.belief_right is False}.get(behaviour, True)
                for a in attributes
            ]
        )
        has = np.array([bool(vars(a)[behaviour]) for a in attributes])
        positive = has[rows]
        hits = (active[rows] & positive[:, None]).sum(0)
        on_span = np.concatenate(
            [_mask(spans[i], len(codes[i]), _SPANS[behaviour]) & has[i] for i in range(len(codes))]
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            table = pd.DataFrame(
                {
                    "behaviour": behaviour,
                    "feature": np.arange(highest.shape[1]),
                    "auc": auc(ranks(highest[rows]), positive),
                    "point_biserial": _correlation(mean[rows], positive),
                    "recall": hits / positive.sum(),
                    "precision": hits / active[rows].sum(0),
                    "span_auc": auc(token_ranks, on_span),
                    "span_mass": tokens[on_span].sum(0) / tokens.sum(0),
                    "frequency": active.mean(0),
                }
            )
        specific = (table.precision >= PRECISION) & (table.recall >= RECALL)
        table["carrier"] = (table.auc >= AUC) | specific
        tables.append(table.sort_values(["carrier", "auc"], ascending=False, kind="stable"))
    return pd.concat(tables, ignore_index=True)


def _mask(spans: list, length: int, kinds: tuple[str, ...]) -> np.ndarray:
    mask = np.zeros(length, dtype=bool)
    for span in spans:
        if span.kind in kinds:
            # of a value's sentence only the value itself says which one it is
            mask[span.stop - 1 if span.kind == "value" else span.start : span.stop] = True
    return mask


def _correlation(scores: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Pearson's correlation of each column with a binary variable; nan for a constant column."""
    x = scores - scores.mean(0)
    y = positive - positive.mean()
    return (x * y[:, None]).sum(0) / np.sqrt((x**2).sum(0) * (y**2).sum())
