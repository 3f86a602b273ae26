"""Which rows a step is taken on, and at which prompts answers are sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ...data.opener import DatasetLike, Row, iterate_rows
from ...data.preferences import ANSWERS, PairCheck
from ...errors import AuditError
from ..objectives import Loss, PreferenceLoss, TokenizedExample
from ..rewards import answer_ids

Ids = tuple[int, ...]

_FEWEST = 4
"""Distinct prompts below which none is held out: a quarter of them would be none."""


@dataclass(frozen=True)
class Split:
    """Examples for the step, and prompts that none of them has.

    Attributes:
        examples: in random order.
        prompts: token ids; where `held_out` is False they are prompts of the examples.
    """

    examples: list[TokenizedExample]
    prompts: list[Ids]
    held_out: bool


def draw_rows(rows: np.ndarray, count: int | None, seed: int) -> np.ndarray:
    """Numbers of some rows, drawn at random without replacement; all where there are no more."""
    if count is None or len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng([seed, 2]).choice(rows, count, replace=False))


def hold_out(examples: Sequence[TokenizedExample], loss: Loss, count: int, seed: int) -> Split:
    """Hold some prompts out of the examples, at most a quarter of them, with all examples that have them."""
    generator = np.random.default_rng([seed, 3])
    shuffled = [examples[place] for place in generator.permutation(len(examples))]
    prompts = list(dict.fromkeys(loss.prompt_of(example) for example in shuffled))
    if loss.rows_per_example == 1:  # answers to a prompt share a mean: they stay together in a step's groups
        place = {prompt: number for number, prompt in enumerate(prompts)}
        shuffled.sort(key=lambda example: place[loss.prompt_of(example)])
    if len(prompts) < _FEWEST:
        return Split(shuffled, prompts, held_out=False)
    held = set(prompts[: min(count, len(prompts) // _FEWEST)])
    return Split(
        [example for example in shuffled if loss.prompt_of(example) not in held], sorted(held), held_out=True
    )


def read_probe(probe: DatasetLike) -> list[Row]:
    """The rows of a probe: pairs, or rows with a prompt.

    Raises:
        AuditError: one that is neither; none at all.
    """
    rows = list(iterate_rows(probe))
    if not rows:
        raise AuditError("The lookahead's probe has no example; give it some that are not in the data.")
    check = PairCheck() if has_answers(rows) else _wrong_prompt
    for row in rows:
        problem = check(row)
        if problem:
            raise AuditError(f"Row {row.index} of the lookahead's probe {problem}; correct or remove it.")
    return rows


def has_answers(rows: Sequence[Row]) -> bool:
    """Whether the rows of a probe are pairs, told by the first."""
    return any(name in (rows[0].columns or {}) for name in ANSWERS)


def _wrong_prompt(row: Row) -> str | None:
    if row.columns is None:
        return row.problem
    return None if row.columns.get("prompt") else "has no 'prompt' to sample answers at"


def prompts_of(
    rows: Sequence[Row],
    pairs: Sequence[TokenizedExample],
    loss: PreferenceLoss | Loss,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Ids]:
    """Distinct prompts of a probe as token ids: of its pairs, or of rows that are prompts alone."""
    if pairs:
        return list(dict.fromkeys(loss.prompt_of(example) for example in pairs))
    asked = [(row.columns or {})["prompt"] for row in rows]
    return list(dict.fromkeys(tuple(answer_ids(tokenizer, prompt, "")[0]) for prompt in asked))
