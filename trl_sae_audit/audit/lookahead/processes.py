"""Work shared by several processes: which part is this one's, and sums over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

Item = TypeVar("Item")


def is_mine(number: int) -> bool:
    """Whether this process does the piece of work of that number; every piece is done by one process."""
    state = PartialState()
    return number % state.num_processes == state.process_index


def own_share(items: Iterable[Item]) -> Iterator[Item]:
    """Those of the items that this process works on."""
    return (item for number, item in zip(count(), items) if is_mine(number))


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over the processes."""
    if PartialState().num_processes > 1:
        for value in tensors:
            torch.distributed.all_reduce(value)


def sum_of_numbers(values: Sequence[float], device: torch.device) -> list[float]:
    """Each number's sum over the processes."""
    total = torch.tensor(values, dtype=torch.float64, device=device)
    sum_over_processes([total])
    return total.tolist()


def join_lists(items: list[Any]) -> list[Any]:
    """The lists of all processes, one after the other."""
    return gather_object(items) if PartialState().num_processes > 1 else items
