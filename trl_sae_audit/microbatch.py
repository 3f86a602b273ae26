"""From the forwards of a micro-batch to the gradients of the rows of the trainer's batch.

Usually there is one forward, on the whole batch. A trainer of the user's own may make several: the batch in pieces, the
batch twice, or other texts beside it. The gradient of the step is their sum in any case; whose it is, chosen or
rejected, which example's, is told by the token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import AuditError
from .tap import Pass


@dataclass(frozen=True)
class Batch:
    """What a trainer computes a loss on.

    Attributes:
        rows: how many.
        ids: their token ids [rows, tokens]; None where they are not known.
        sides: gives +1, -1 or 0 of each row [rows] once the backward pass is over; None where the loss has no sides.
        verify: compare the ids even where the number of rows leaves no doubt.
    """

    rows: int
    ids: Tensor | None = None
    sides: Callable[[], Tensor] | None = None
    verify: bool = False


@dataclass(frozen=True)
class Block:
    """Gradients of some examples.

    Attributes:
        rows: Σ_t g[i,t], [n, d_model], float32.
        sides: +1, -1 or 0 of every row, [n]; None where the trainer has no sides, or examples have both.
        paired: row j and row j + n/2 are one example.
    """

    rows: Tensor
    sides: Tensor | None
    paired: bool


def blocks(passes: Sequence[Pass], batches: Sequence[Batch], *, sided: bool, paired: bool) -> list[Block]:
    """The gradients of a micro-batch, by the rows of its batches; rows of other forwards follow without a side.

    Args:
        passes: forwards under autograd, in their order.
        batches: what the trainer computed its loss on, in its order.
        sided: the trainer's loss has sides, so that every row must be known.
        paired: it compares row j with row j + rows/2.

    Raises:
        AuditError: if the rows of a loss with sides cannot be found among those the model saw.
    """
    arrived = [one for one in passes if one.gradient is not None]
    if not arrived:
        return []
    if sided and any(one.lengths is not None for one in arrived):
        raise AuditError(
            "A row of this batch holds several examples one after the other (padding_free or packing), so its sides cannot "
            "be told apart; give every example its own row."
        )
    if _plain(passes, batches):
        found: list[Tensor | None] = [arrived[0].gradient]
        beside: list[Pass] = []
    else:
        found, beside = _match(passes, batches)
    if sided and (not batches or any(rows is None for rows in found)):
        raise AuditError(_unknown_rows(passes, batches))
    if not sided and any(rows is None for rows in found):
        found, beside = [], arrived
    made = [
        Block(rows, None if batch.sides is None else batch.sides(), paired)
        for rows, batch in zip(found, batches, strict=False)
        if rows is not None
    ]
    for one in beside:
        if one.gradient is not None:
            nobody = one.gradient.new_zeros(len(one.gradient)) if sided and not paired else None
            made.append(Block(one.gradient, nobody, paired=False))
    return made


def _plain(passes: Sequence[Pass], batches: Sequence[Batch]) -> bool:
    """One forward on one batch of as many rows, and no reason to look closer."""
    return (
        len(passes) == len(batches) == 1
        and passes[0].rows == batches[0].rows
        and (not batches[0].verify or passes[0].ids is None or batches[0].ids is None)
    )


def _match(passes: Sequence[Pass], batches: Sequence[Batch]) -> tuple[list[Tensor | None], list[Pass]]:
    """Each batch's gradients, None where a row of it was not found, and the forwards that are of no batch."""
    if any(one.ids is None for one in passes) or any(batch.ids is None for batch in batches):
        return _match_in_order(passes, batches), []
    shape = next(one.gradient for one in passes if one.gradient is not None)
    totals = [shape.new_zeros(_examples(batch, passes), shape.shape[1]) for batch in batches]
    covered = [[False] * batch.rows for batch in batches]
    beside = []
    for one in passes:
        place = _place(one, batches, covered)
        if place is None:
            beside.append(one)
            continue
        index, first = place
        covered[index][first : first + one.rows] = [True] * one.rows
        if one.gradient is not None:
            totals[index][first : first + len(one.gradient)] += one.gradient
    return [total if all(rows) else None for total, rows in zip(totals, covered, strict=True)], beside


def _examples(batch: Batch, passes: Sequence[Pass]) -> int:
    packed = next((one.lengths for one in passes if one.lengths is not None), None)
    return batch.rows if packed is None else len(packed)


def _place(one: Pass, batches: Sequence[Batch], covered: list[list[bool]]) -> tuple[int, int] | None:
    """Which rows of which batch a forward was on: those not yet seen first."""
    places = [
        (index, first)
        for index, batch in enumerate(batches)
        for first in range(batch.rows - one.rows + 1)
        if _same(batch.ids, first, one)
    ]
    places.sort(key=lambda place: any(covered[place[0]][place[1] : place[1] + one.rows]))
    return places[0] if places else None


def _same(ids: Tensor | None, first: int, one: Pass) -> bool:
    if ids is None or one.ids is None or ids.shape[1:] != one.ids.shape[1:]:
        return False
    return torch.equal(ids[first : first + one.rows], one.ids.to(ids.device))


def _match_in_order(passes: Sequence[Pass], batches: Sequence[Batch]) -> list[Tensor | None]:
    """Without token ids: forwards that are, one after the other, the rows of the batches, all of them once."""
    arrived = [one.gradient for one in passes if one.gradient is not None]
    if len(arrived) < len(passes) or sum(map(len, arrived)) != sum(batch.rows for batch in batches):
        return [None] * len(batches)
    return list(torch.cat(arrived).split([batch.rows for batch in batches]))


def _unknown_rows(passes: Sequence[Pass], batches: Sequence[Batch]) -> str:
    saw = " + ".join(str(one.rows) for one in passes)
    if not batches:
        return (
            "The training step computed a loss without the trainer's compute_loss, so it is not known which rows are on which "
            "side; call super().compute_loss(model, inputs) for the trainer's own part of the loss."
        )
    return (
        f"The model saw {saw} rows, and they are not the {' + '.join(str(batch.rows) for batch in batches)} rows of the "
        "trainer's batch in its order: a custom collator, packing or an overridden compute_loss changes them, so sides and "
        "examples cannot be told apart. Hand the model the batch's input_ids as they are."
    )
