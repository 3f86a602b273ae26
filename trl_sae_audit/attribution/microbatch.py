"""From the forwards of a micro-batch to the gradients of the rows of the trainer's batch.

Usually there is one forward, on the whole batch. A trainer of the user's own may make several: the batch in pieces, the
batch twice, or other texts next to it. The gradient of the step is their sum in any case; whose it is, chosen or
rejected, which example's, is told by the token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import AuditError
from .gradient_hook import ForwardRecord
from .scores import TokenScores
from .selection import SelectionSums


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
class RowGradients:
    """Gradients of some rows: of a micro-batch's, then of an optimizer step's on this process.

    Attributes:
        examples: every example's own G, [n, d_model] in float32.
        sides: its side, +1, -1 or 0, [n]; None where an example has both, or the loss none.
        sums: G of all rows, of the positive side's and of the negative side's, [3, d_model].
        counts: the examples, and the rows of each side, [3].
        tokens: token-level scores, if requested.
        selection: what the rows select for, if computed.
    """

    examples: Tensor
    sides: Tensor | None
    sums: Tensor
    counts: Tensor
    tokens: TokenScores | None = None
    selection: SelectionSums | None = None

    @classmethod
    def of(
        cls, rows: Tensor, sides: Tensor | None, *, paired: bool = False, selected: Sequence[Tensor] = ()
    ) -> RowGradients:
        """Of a micro-batch.

        Args:
            rows: Σ_t g[i,t] of every row, [rows, d_model], float32.
            sides: +1, -1 or 0 of every row, [rows]; None where the trainer has no sides.
            paired: row j and row j + rows/2 are one example.
            selected: products and weights of the same rows, see `RowSelections`; empty without selection.

        Raises:
            AuditError: if pairs are expected and the number of rows is odd.
        """
        half, odd = divmod(len(rows), 2)
        if paired and odd:
            raise AuditError(
                f"The model saw {len(rows)} rows where pairs of chosen and rejected were expected; a custom collator, "
                "packing or padding_free changes the layout."
            )
        masks = torch.ones(3, len(rows), dtype=torch.float32, device=rows.device)
        if sides is None:
            masks[1:] = 0
        else:
            masks[1], masks[2] = sides > 0, sides < 0
        counts = masks.sum(1)
        examples, of_examples = (rows[:half] + rows[half:], None) if paired else (rows, sides)
        counts[0] = len(examples)
        selection = SelectionSums.of(selected[0], selected[1], masks, paired=paired) if selected else None
        return cls(examples, of_examples, masks @ rows, counts, selection=selection)

    @classmethod
    def join(cls, parts: Sequence[RowGradients], divisor: float) -> RowGradients:
        """Those of an optimizer step, from its micro-batches' and what the sum of these is to be divided by."""
        sides = [part.sides for part in parts if part.sides is not None]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        selections = [part.selection for part in parts if part.selection is not None]
        return cls(
            torch.cat([part.examples for part in parts]) / divisor,
            torch.cat(sides) if sides else None,
            torch.stack([part.sums for part in parts]).sum(0) / divisor,
            torch.stack([part.counts for part in parts]).sum(0),
            TokenScores.join(tokens, divisor) if tokens else None,
            SelectionSums.join(selections, divisor) if selections else None,
        )


def match_rows(
    forwards: Sequence[ForwardRecord], batches: Sequence[Batch], *, sided: bool, paired: bool
) -> list[RowGradients]:
    """The gradients of a micro-batch, by the rows of its batches; rows of other forwards follow without a side.

    Args:
        forwards: under autograd, in their order.
        batches: what the trainer computed its loss on, in its order.
        sided: the trainer's loss has sides, so that every row must be known.
        paired: it compares row j with row j + rows/2.

    Raises:
        AuditError: if the rows of a loss with sides cannot be found among those the model saw.
    """
    arrived = [forward for forward in forwards if forward.gradient is not None]
    if not arrived:
        return []
    if sided and any(forward.lengths is not None for forward in arrived):
        raise AuditError(
            "A row of this batch holds several examples one after the other (padding_free or packing), so its sides cannot "
            "be told apart; give every example its own row."
        )
    rows, others = _match(forwards, batches)
    if sided and (not batches or any(values is None for values in rows)):
        raise AuditError(_describe_mismatch(forwards, batches))
    if not sided and any(values is None for values in rows):
        rows, others = [], arrived
    matched = []
    for values, batch in zip(rows, batches, strict=False):
        if values is not None:
            sides = None if batch.sides is None else batch.sides()
            matched.append(RowGradients.of(values[0], sides, paired=paired, selected=values[1:]))
    for forward in others:
        if forward.gradient is not None:
            no_side = forward.gradient.new_zeros(len(forward.gradient)) if sided and not paired else None
            gradient, *selected = _values(forward)
            matched.append(RowGradients.of(gradient, no_side, selected=selected))
    return matched


def _values(forward: ForwardRecord) -> tuple[Tensor, ...]:
    """What is known of every row: its gradient, and its selection if that is computed."""
    assert forward.gradient is not None
    selected = forward.selected
    return (forward.gradient, *(() if selected is None else (selected.products, selected.weights)))


def _is_plain(forwards: Sequence[ForwardRecord], batches: Sequence[Batch]) -> bool:
    """One forward on one batch of as many rows, and no reason to look closer."""
    return (
        len(forwards) == len(batches) == 1
        and forwards[0].rows == batches[0].rows
        and (not batches[0].verify or forwards[0].ids is None or batches[0].ids is None)
    )


def _match(
    forwards: Sequence[ForwardRecord], batches: Sequence[Batch]
) -> tuple[list[tuple[Tensor, ...] | None], list[ForwardRecord]]:
    """The values of each batch's rows, None where one was not found, and the forwards that are of no batch."""
    if _is_plain(forwards, batches):
        return [_values(forwards[0])], []
    if any(forward.ids is None for forward in forwards) or any(batch.ids is None for batch in batches):
        return _match_in_order(forwards, batches), []
    shapes = next(_values(forward) for forward in forwards if forward.gradient is not None)
    totals = [
        tuple(values.new_zeros(_examples(batch, forwards), *values.shape[1:]) for values in shapes)
        for batch in batches
    ]
    covered = [[False] * batch.rows for batch in batches]
    others = []
    for forward in forwards:
        place = _find_place(forward, batches, covered)
        if place is None:
            others.append(forward)
            continue
        index, first = place
        covered[index][first : first + forward.rows] = [True] * forward.rows
        if forward.gradient is not None:
            for total, values in zip(totals[index], _values(forward), strict=True):
                total[first : first + len(values)] += values
    return [total if all(rows) else None for total, rows in zip(totals, covered, strict=True)], others


def _examples(batch: Batch, forwards: Sequence[ForwardRecord]) -> int:
    packed = next((forward.lengths for forward in forwards if forward.lengths is not None), None)
    return batch.rows if packed is None else len(packed)


def _find_place(
    forward: ForwardRecord, batches: Sequence[Batch], covered: list[list[bool]]
) -> tuple[int, int] | None:
    """Which rows of which batch a forward used, those not yet seen first."""
    places = [
        (index, first)
        for index, batch in enumerate(batches)
        for first in range(batch.rows - forward.rows + 1)
        if _is_at(batch.ids, first, forward)
    ]
    places.sort(key=lambda place: any(covered[place[0]][place[1] : place[1] + forward.rows]))
    return places[0] if places else None


def _is_at(ids: Tensor | None, first: int, forward: ForwardRecord) -> bool:
    if ids is None or forward.ids is None or ids.shape[1:] != forward.ids.shape[1:]:
        return False
    return torch.equal(ids[first : first + forward.rows], forward.ids.to(ids.device))


def _match_in_order(
    forwards: Sequence[ForwardRecord], batches: Sequence[Batch]
) -> list[tuple[Tensor, ...] | None]:
    """Without token ids: forwards that are, one after the other, the rows of the batches, all of them once."""
    arrived = [_values(forward) for forward in forwards if forward.gradient is not None]
    sizes = [batch.rows for batch in batches]
    if len(arrived) < len(forwards) or sum(len(values[0]) for values in arrived) != sum(sizes):
        return [None] * len(batches)
    columns = [torch.cat(parts).split(sizes) for parts in zip(*arrived, strict=True)]
    return list(zip(*columns, strict=True))


def _describe_mismatch(forwards: Sequence[ForwardRecord], batches: Sequence[Batch]) -> str:
    saw = " + ".join(str(forward.rows) for forward in forwards)
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
