"""Answers of the start model: sampled and read once, kept in the record, and taken up again by a run that resumes."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from ..attribution.drift import AnswerActivations, AnswerLayout
from ..errors import AuditError
from ..models.hook_points import HookPoint
from ..models.language_head import LanguageHead, causal_model
from ..models.residual_stream import evaluation_mode
from ..models.token_ids import Ids
from ..record.reader import RunRecord
from ..saes.active import Active, answer_reader, read_active
from ..saes.dictionary import FeatureDictionary

PROMPTS, ANSWERS = "generation_prompts", "generations"
"""Tables of a record: a row a token of a prompt, and of an answer."""
ACTIVATIONS, FEATURES = "generation_activations", "generation_features"
"""A row an activation, at the so-many-th token of `generations`, and a row a feature that is active at any."""
_MOST_ACTIVE = 2**27

Answered = tuple[Ids, Ids]
"""A prompt's token ids and those of the answer to it."""


@dataclass(frozen=True)
class SampledAnswers:
    """What is kept of them.

    Attributes:
        step: optimizer steps made before they were sampled.
        rows: prompt and answer, those to the same prompt one after the other.
        prompts: number of each row's prompt.
        log_probs: of every answer token in the model that gave it, float32.
        active: dictionary name → of all the answers' tokens.
    """

    step: int
    rows: list[Answered]
    prompts: list[int]
    log_probs: np.ndarray
    active: Mapping[str, Active]

    @cached_property
    def layout(self) -> AnswerLayout:
        return AnswerLayout(np.array(self.prompts), np.array([len(answer) for _, answer in self.rows]))

    def activations(self) -> dict[str, AnswerActivations]:
        """Dictionary name → in the form in which they are multiplied."""
        return {name: AnswerActivations.from_tokens(*active) for name, active in self.active.items()}

    def tables(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and columns of the record's tables."""
        layout = self.layout
        asked = dict(zip(self.prompts, (prompt for prompt, _ in self.rows), strict=True))
        lengths = [len(prompt) for prompt in asked.values()]
        yield (
            PROMPTS,
            {
                "step": np.full(sum(lengths), self.step),
                "prompt": np.repeat(np.array(list(asked), np.int32), lengths),
                "token": np.concatenate(list(asked.values())).astype(np.int32),
            },
        )
        yield (
            ANSWERS,
            {
                "step": np.full(layout.n_tokens, self.step),
                "prompt": np.repeat(np.array(self.prompts, np.int32), layout.lengths),
                "answer": layout.answer.astype(np.int32),
                "token": np.concatenate([answer for _, answer in self.rows]).astype(np.int32),
                "log_prob": self.log_probs,
            },
        )
        for name, (counts, features, values) in self.active.items():
            yield (
                ACTIVATIONS,
                {
                    "step": np.full(len(features), self.step),
                    "dictionary": pa.repeat(name, len(features)),
                    "place": np.repeat(np.arange(len(counts), dtype=np.int32), counts),
                    "feature": features,
                    "value": values,
                },
            )
        for name, activations in self.activations().items():
            mean, spread = activations.moments(layout)
            yield (
                FEATURES,
                {
                    "step": np.full(len(mean), self.step),
                    "dictionary": pa.repeat(name, len(mean)),
                    "feature": activations.features,
                    "activation": mean.astype(np.float32),
                    "spread": spread.astype(np.float32),
                },
            )

    @classmethod
    def from_record(cls, record: RunRecord) -> SampledAnswers | None:
        """What a record keeps; None if it keeps none."""
        names = (PROMPTS, ANSWERS, ACTIVATIONS)
        return cls.from_tables(*map(record.table, names)) if set(names) <= set(record.tables) else None

    @classmethod
    def from_tables(
        cls, prompts: pd.DataFrame, answers: pd.DataFrame, active: pd.DataFrame
    ) -> SampledAnswers:
        """What `tables` gave, read back."""
        asked: dict[Any, Ids] = {
            number: tuple(part.tolist()) for number, part in prompts.groupby("prompt")["token"]
        }
        answered = answers.groupby("answer")
        numbers = answered["prompt"].first().tolist()
        return cls(
            step=int(answers["step"].iloc[0]),
            rows=[
                (asked[number], tuple(part.tolist()))
                for number, (_, part) in zip(numbers, answered["token"], strict=True)
            ],
            prompts=numbers,
            log_probs=answers["log_prob"].to_numpy(np.float32),
            active={
                str(name): (
                    np.bincount(part["place"], minlength=len(answers)),
                    part["feature"].to_numpy(),
                    part["value"].to_numpy(),
                )
                for name, part in active.groupby("dictionary", sort=False)
            },
        )


def draw_within(
    answers: Sequence[Sequence[Sequence[int]]], tokens: float, seed: int
) -> list[Sequence[Sequence[int]]]:
    """As many of some sampled answers as have `tokens` tokens at their mean length, at least one; all if they have no more.

    Which they are does not depend on what they say: the first of every prompt, as many of each, and one more of prompts that are drawn.

    Args:
        answers: equally many of each prompt, as sampled.
        tokens: to read in a look.
        seed: draws.
    """
    lengths = [len(answer) for several in answers for answer in several]
    if sum(lengths) <= tokens:
        return list(answers)
    each, left = divmod(max(1, int(tokens * len(lengths) / sum(lengths))), len(answers))
    more = set(random.Random(seed).sample(range(len(answers)), left))
    return [several[: each + (place in more)] for place, several in enumerate(answers)]


@torch.no_grad()
def answer_log_probs(model: nn.Module, rows: Sequence[Answered], temperature: float) -> np.ndarray:
    """`log π(y_t | …)` of every answer token at a temperature, row after row: float32 [tokens].

    In evaluation mode. A prompt with several answers is read once, where the model can go on from it, and no logits of a whole batch
    are in memory.
    """
    decoder = causal_model(model).get_decoder()
    head = LanguageHead(model, decoder, temperature)
    found: dict[int, np.ndarray] = {}
    # what predicts an answer's tokens: the prompt's last token and the answer without its own
    predicting = [(prompt[:-1], (*prompt[-1:], *answer[:-1])) for prompt, answer in rows]
    with evaluation_mode(model):
        for states in answer_reader(HookPoint("decoder", decoder, decoder)).read(predicting, first=True):
            targets = torch.tensor([token for place in states.rows for token in rows[place][1]])
            hidden = states.hidden[states.of_response.to(states.hidden.device)]
            values = head.score(hidden, targets.to(hidden.device)).float().cpu().numpy()
            ends = np.cumsum([len(rows[place][1]) for place in states.rows])[:-1]
            found |= dict(zip(states.rows, np.split(values, ends), strict=True))
    return np.concatenate([np.empty(0, np.float32), *(found[place] for place in range(len(rows)))])


def answer_activations(
    point: HookPoint,
    dictionary: FeatureDictionary,
    rows: Sequence[Answered],
    *,
    attention_sinks: bool = False,
) -> list[Active]:
    """The features that are active at the answers' tokens, row by row; see `read_active`.

    Raises:
        AuditError: more than 2^27 activations.
    """
    found: dict[int, Active] = {}
    total = 0
    for place, active in read_active(point, dictionary, rows, attention_sinks=attention_sinks):
        total += len(active[1])
        if total > _MOST_ACTIVE:
            raise AuditError(
                f"The sampled answers have more than {_MOST_ACTIVE:,} activations of {dictionary.name!r}, at 12 bytes each; "
                "sample fewer or shorter answers (generations=Sampling(answers=…, max_new_tokens=…)), or take fewer "
                "generation_prompts."
            )
        found[place] = active
    return [found[place] for place in range(len(rows))]


def join(parts: Sequence[Active]) -> Active:
    """Of answers one after the other."""
    counts, features, values = zip(*parts, strict=True)
    return np.concatenate(counts), np.concatenate(features), np.concatenate(values)
