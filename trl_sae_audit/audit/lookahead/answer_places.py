"""Where features are most active in the answers that a lookahead sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ...saes.contexts import PlaceKeeper, Places, strongest
from .processes import join_lists


class AnswerPlaces:
    """Where features are most active in sampled answers, and those answers' token ids.

    Args:
        d_sae: features.
    """

    def __init__(self, d_sae: int) -> None:
        self._keeper = PlaceKeeper(d_sae, drawn=0)
        self._answers: list[tuple[list[int], list[int]]] = []
        self._found: list[Places] = []

    def begin(self, batch: Mapping[str, Tensor]) -> None:
        """The answers of a batch are next."""
        self._first = len(self._answers)
        attended, own = batch["attention_mask"].bool(), batch["completion_mask"].bool()
        for ids, real, answer in zip(batch["input_ids"], attended, own, strict=True):
            self._answers.append((ids[real & ~answer].tolist(), ids[answer].tolist()))

    def add(self, values: Tensor, rows: Tensor, tokens: Tensor) -> None:
        """Activations of some tokens [n, d_sae], of which row of the batch each is, and which token of its answer."""
        least = torch.from_numpy(self._keeper.least).to(values)
        size = values.abs()
        where, features = ((size > 0) & (size >= least)).nonzero(as_tuple=True)
        numbers = (features.int(), values[where, features].float(), rows[where], tokens[where].int())
        feature, activation, row, token = (number.cpu().numpy() for number in numbers)
        self._found.append(Places(feature, activation, row + self._first, token))

    def end(self) -> None:
        """The batch is over."""
        self._keeper.add(Places.join(self._found))
        self._found = []

    def of_all_processes(self) -> tuple[Places, list[tuple[list[int], list[int]]]]:
        """The strongest places in all answers, and those answers: prompt and answer, as token ids."""
        parts: list[Places] = []
        answers: list[tuple[list[int], list[int]]] = []
        for places, some in join_lists([(self._keeper.strongest, self._answers)]):
            parts.append(replace(places, text=places.text + len(answers)))
            answers += some
        return strongest(Places.join(parts)), answers
