"""An unrolled run: a whole run looked ahead to, in a few long steps.

One step's derivative says where a run sets out. It does not say where it gets to: as the model learns, the pairs it
has right stop pulling, and what its weights do to its activations changes. An unrolled run takes K long steps, each
`steps / K` times the run's usual one and at the weights the one before has led to. Each is on as many examples as the run has in
that time, and on its own share of the data where there is more. So it costs as many gradients as the run takes, or one pass over
the data, whichever is more; and the tokens of all examples in memory.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence, Sized

import torch
from torch import Tensor

from ...errors import AuditError
from .batch_moments import zeros_like
from .lookahead import Lookahead
from .optimizer_step import Tensors

LONGEST, FEWEST = 10, 4
"""Usual steps in a long one, at most, and long steps in an unrolled run, at least. Measured in the lab (docs/studies/README.md): a run of 40 steps is
predicted as well in four long ones as in more; one of 160 in sixteen, and hardly in four."""


class UnrolledRun:
    """A run of many steps, from a lookahead to one.

    Args:
        ahead: gives the gradients, the optimizer's rule and the data.
        steps: of the run, at the full learning rate; of one whose rate falls linearly to 0, half of them.
        segments: long steps to take; by default one for ten of the run, but four at least. 1 is the lookahead's own step, times `steps`.

    Raises:
        AuditError: steps or segments below 1; a rule for which it is not known how a run goes on.
    """

    def __init__(self, ahead: Lookahead, steps: float, segments: int | None = None) -> None:
        if segments is None:
            segments = max(FEWEST, math.ceil(steps / LONGEST))
        if steps <= 0 or segments < 1:
            raise AuditError(
                f"A run cannot be unrolled over {steps} steps in {segments} segments; give positive numbers of both."
            )
        if ahead.rule.state or (ahead.rule.kind == "adamw" and ahead.rule.batch_size is None):
            raise AuditError(
                "A run is unrolled from its beginning, with batches of a known size; pass the DPOConfig of the run, or an "
                "UpdateRule with batch_size."
            )
        self.ahead = ahead
        self.steps = steps
        self.segments = segments
        self._shift: Tensors = {}

    def shift(self) -> Tensors:
        """θ after the run less θ before it, by parameter; the model is as before when this returns.

        Raises:
            AuditError: there is no example.
        """
        if not self._shift:
            ahead = self.ahead
            # kept: read and tokenized again for every long step, they would take longer than the gradients of a small share
            examples = list(ahead.examples())
            shares = self._shares(examples)
            start = {name: value.detach().clone() for name, value in ahead.parameters.items()}
            moments = ahead.new_moments()
            shift = zeros_like(start)
            try:
                for segment in range(self.segments):
                    share = examples[segment % shares :: shares]
                    gradient, _ = ahead.gradient(share, moments, start if segment else None)
                    batches = None if moments is None else moments.result()
                    step = ahead.rule.affine(gradient, ahead.parameters, batches).step(gradient)
                    for name, value in step.items():
                        shift[name].add_(value, alpha=self.steps / self.segments)
                    # the sum is kept apart: in half precision small steps would be rounded away one by one
                    _put(ahead.parameters, {name: start[name] + shift[name] for name in start})
                self._shift = shift
            finally:
                _put(ahead.parameters, start)
        return self._shift

    def _shares(self, examples: Sequence[Sized]) -> int:
        """Into how many parts the data are cut, of which each long step takes the next."""
        if not examples:
            raise AuditError("There is no example to unroll a run on; give at least one.")
        in_a_step = self.steps / self.segments * (self.ahead.rule.batch_size or 1)
        return max(1, min(self.segments, len(examples), int(sum(map(len, examples)) / in_a_step)))

    @contextlib.contextmanager
    def moved(self) -> Iterator[None]:
        """The model as the run would leave it, for a while."""
        shift, parameters = self.shift(), self.ahead.parameters
        start = {name: value.detach().clone() for name, value in parameters.items()}
        _put(parameters, {name: start[name] + shift[name] for name in start})
        try:
            yield
        finally:
            _put(parameters, start)


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in parameters.items():
        value.copy_(values[name])
