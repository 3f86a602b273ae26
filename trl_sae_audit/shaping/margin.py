"""DPO's form of a shaped reward: a shift of the margin, through the reference log-probabilities."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import AuditError
from ..flags import Flag, FlagSet
from ..models.tokenizers import Processing, inner_tokenizer
from ..statistics import explain_preferences
from .penalties import FixedPenalty, Penalty
from .scorer import FeatureScorer
from .shaper import Shaper

logger = logging.getLogger(__name__)

_SIDES = ("chosen", "rejected")
_SHIFT = "shaping_{}"


def shape_preference_margin(
    dataset: Dataset,
    scorer: FeatureScorer,
    flags: Iterable[Flag],
    penalty: FixedPenalty | float | None = None,
    *,
    beta: float,
    tokenizer: Processing | None = None,
) -> Dataset:
    """A preference set from which DPO learns the reward less a penalty on flagged features.

    DPO fits an implicit reward, whose margin is `βΔ` with `Δ = (log π⁺ − log π_ref⁺) − (log π⁻ − log π_ref⁻)`, to
    preferences that are made by a reward r. To learn `r − p(y)` from the same preferences, p has to be added where they are
    explained, so that what p explains need not be learned:

        −log σ(βΔ + (p⁺ − p⁻)),     p = clip(λ·Σ_f w_f·s_f(x, y), ±clip)

    which is what DPO computes with `log π_ref − p/β` in place of `log π_ref`: no subclass, no other loss. It holds for every
    loss of DPOTrainer that is a function of `Δ` (sigmoid, hinge, ipo, …), with the same shift inside. The trainer's
    `rewards/*` metrics are then those of the shifted reference.

    Args:
        dataset: with `ref_chosen_logps` and `ref_rejected_logps`: `trainer.train_dataset` of a DPOTrainer made with
            `precompute_ref_log_probs=True`.
        scorer: frozen model and dictionary.
        flags: of the scorer's dictionary.
        penalty: λ, or a FixedPenalty of constant scale. By default none is chosen by hand: λ·w_f are the
            coefficients with which the flagged features explain the preferences best, see `fit_flag_weights`.
        beta: the trainer's β.
        tokenizer: the trainer's; the scorer's by default.

    Returns:
        The dataset with both columns shifted, and `shaping_chosen`, `shaping_rejected`, the p of each answer.

    Raises:
        AuditError: columns that are missing; a dataset shaped already; a penalty that needs rollouts; β not above 0.

    Example:

    ```python
    trainer = DPOTrainer(model, args=DPOConfig(precompute_ref_log_probs=True, ...), train_dataset=dataset, ...)
    trainer.train_dataset = shape_preference_margin(trainer.train_dataset, scorer, flags, beta=trainer.args.beta)
    trainer.train()
    ```
    """
    _check_dataset(dataset, "ref_chosen_logps", "ref_rejected_logps")
    _check_penalty(penalty)
    if not beta > 0:
        raise AuditError(f"beta is {beta}; pass the trainer's own, trainer.args.beta.")
    if penalty is None:
        flags, penalty = fit_flag_weights(dataset, scorer, flags, tokenizer=tokenizer), 1.0
        fitted = ", ".join(f"{flag.name} {flag.weight:.3g}" for flag in flags) or "none is needed"
        logger.info("Coefficients fitted to the preferences: %s.", fitted)
    shaper = Shaper(scorer, flags, penalty)
    for side in _SIDES:
        column = f"ref_{side}_logps"
        penalties = shaper.penalty(_scores(shaper, scorer, dataset, side, tokenizer))
        logps = torch.tensor(dataset[column][:], dtype=torch.float64)
        if not bool(logps.isfinite().all()):
            raise AuditError(
                f"Column {column!r} has values that are not finite; let the trainer precompute it again."
            )
        dataset = dataset.remove_columns(column)
        dataset = dataset.add_column(column, (logps - penalties / beta).tolist())
        dataset = dataset.add_column(_SHIFT.format(side), penalties.tolist())
    return dataset


def fit_flag_weights(
    dataset: Dataset,
    scorer: FeatureScorer,
    flags: Iterable[Flag],
    *,
    tokenizer: Processing | None = None,
) -> FlagSet:
    """The weights with which flagged features explain the preferences best: the penalty that leaves nothing to learn.

    A Bradley–Terry model with the features' gaps `δ_f = s_f⁺ − s_f⁻` for covariates, by maximum likelihood:

        λ = argmax_{λ ≥ 0} Σ_i log σ(Σ_f λ_f·δ_if) − ½ Σ_f (λ_f·sd(δ_f) / 3)²

    At this λ, `Σ_i δ_if·σ(−λ·δ_i) = 0` up to the last term: with the margin shifted by it, the first step's loss has no
    slope along any flagged gap, and where the features are all that the preferences are about, a policy that learned
    nothing is the optimum. A λ below it leaves some of the behaviour to be learned, one above it teaches the opposite.
    The last term is a weak prior, which matters only where a feature decides nearly every pair. λ is a log-odds for each
    unit of score; a feature that the preferences are against, or that others explain as well, gets 0. What the gaps have in
    common with quality is explained away with them.

    Args:
        dataset: as for `shape_preference_margin`; reference log-probabilities are not needed.
        scorer, flags, tokenizer: as there. The flags' own weights do not matter.

    Returns:
        The flags whose λ is above 0, with λ for weight.
    """
    _check_dataset(dataset)
    flags = FlagSet(flags)
    shaper = Shaper(scorer, flags, 1.0)
    chosen, rejected = (_scores(shaper, scorer, dataset, side, tokenizer) for side in _SIDES)
    coefficients = explain_preferences((chosen - rejected).double())
    return FlagSet(
        [
            dataclasses.replace(flag, weight=value)
            for flag, value in zip(flags, coefficients.tolist(), strict=True)
            if value > 0
        ]
    )


def _scores(
    shaper: Shaper,
    scorer: FeatureScorer,
    dataset: Dataset,
    side: str,
    tokenizer: Processing | None,
) -> Tensor:
    """Signed scores [rows, flags]: of the trainer's own tokens where the scorer has the same, else of the texts."""
    if f"{side}_ids" in dataset.column_names:
        prompts, answers = dataset["prompt_ids"][:], dataset[f"{side}_ids"][:]
        reader = scorer.tokenizer if tokenizer is None else inner_tokenizer(tokenizer)
        if reader.get_vocab() == scorer.tokenizer.get_vocab():
            return shaper.score_ids(prompts, answers)
        return shaper.score(_decode(reader, prompts), _decode(reader, answers))
    return shaper.score(dataset["prompt"][:], dataset[side][:])


def _decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _check_dataset(dataset: Any, *needed: str) -> None:
    if not isinstance(dataset, Dataset):
        raise AuditError(
            f"The dataset is a {type(dataset).__name__}; pass a datasets.Dataset, the trainer's train_dataset say."
        )
    columns = set(dataset.column_names)
    if {_SHIFT.format(side) for side in _SIDES} & columns:
        raise AuditError(
            "The dataset's margin is shifted already; pass the one with the reference log-probabilities as computed."
        )
    missing = set(needed) - columns
    if missing:
        raise AuditError(
            f"The dataset has no {' and no '.join(sorted(missing))}; make the DPOTrainer with "
            "precompute_ref_log_probs=True and pass its train_dataset."
        )
    by_tokens = {"prompt_ids", "chosen_ids", "rejected_ids"} <= columns
    if not by_tokens and not {"prompt", "chosen", "rejected"} <= columns:
        raise AuditError(
            "The dataset has neither prompt, chosen and rejected nor their token ids; pass the trainer's train_dataset."
        )


def _check_penalty(penalty: Penalty | float | None) -> None:
    if isinstance(penalty, Penalty) and not isinstance(penalty, FixedPenalty):
        raise AuditError(
            f"{type(penalty).__name__} learns from the policy's own responses, and DPO samples none; pass FixedPenalty(…)."
        )
    if isinstance(penalty, FixedPenalty) and (penalty.relative or penalty.warmup):
        raise AuditError(
            "The margin is shifted once, before training: the penalty can have no warm-up and no scale relative to a "
            "running reward; pass FixedPenalty(λ, clip=…)."
        )
