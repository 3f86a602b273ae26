"""Rehearsal: a whole run looked ahead to, in a few long steps.

One step's derivative says where a run sets out. It does not say where it gets to: as the model learns, the pairs it
has right stop pulling, and what its weights do to its activations changes. A rehearsal takes K long steps, each
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

from .errors import AuditError
from .lookahead import AnswerBatches, Lookahead
from .update_rule import Tensors

LONGEST, FEWEST = 10, 4
"""Usual steps in a long one, at most, and long steps in a rehearsal, at least. Measured in the lab (docs/studies/README.md): a run of 40 steps is
foretold as well in four long ones as in more; one of 160 in sixteen, and hardly in four."""


class Rehearsal:
    """A run of many steps, from a lookahead to one.

    Args:
        ahead: gives the gradients, the optimizer's rule and the data.
        steps: of the run, at the full learning rate; of one whose rate falls linearly to 0, half of them.
        parts: long steps to take; by default one for ten of the run, but four at least. 1 is the lookahead's own step, times `steps`.

    Raises:
        AuditError: steps or parts below 1; a rule for which it is not known how a run goes on.
    """

    def __init__(self, ahead: Lookahead, steps: float, parts: int | None = None) -> None:
        if parts is None:
            parts = max(FEWEST, math.ceil(steps / LONGEST))
        if steps <= 0 or parts < 1:
            raise AuditError(
                f"A rehearsal of {steps} steps in {parts} parts is none; give positive numbers of both."
            )
        if ahead.rule.state or (ahead.rule.kind == "adamw" and ahead.rule.batch_size is None):
            raise AuditError(
                "A rehearsal is of a run from its beginning, with batches of a known size; pass the DPOConfig of the run, or an "
                "UpdateRule with batch_size."
            )
        self.ahead = ahead
        self.steps = steps
        self.parts = parts
        self._shift: Tensors = {}

    def shift(self) -> Tensors:
        """θ after the run less θ before it, by parameter; the model is as before when this returns.

        Raises:
            AuditError: there is no example.
        """
        if not self._shift:
            ahead = self.ahead
            # kept: read and tokenized anew for every long step, they would take longer than the gradients of a small share
            examples = list(ahead.examples())
            shares = self._shares(examples)
            start = {name: value.detach().clone() for name, value in ahead.parameters.items()}
            moments = ahead.new_moments()
            try:
                for part in range(self.parts):
                    share = examples[part % shares :: shares]
                    gradient, _ = ahead.gradient(share, moments, start if part else None)
                    batches = None if moments is None else moments.result(gradient)
                    step = ahead.rule.affine(gradient, ahead.parameters, batches).step(gradient)
                    with torch.no_grad():
                        for name, value in ahead.parameters.items():
                            value.add_(step[name], alpha=self.steps / self.parts)
                self._shift = {name: value.detach() - start[name] for name, value in ahead.parameters.items()}
            finally:
                _put(ahead.parameters, start)
        return self._shift

    def _shares(self, examples: Sequence[Sized]) -> int:
        """Into how many parts the data are cut, of which each long step takes the next."""
        if not examples:
            raise AuditError("There is no example to rehearse a run on; give at least one.")
        in_a_step = self.steps / self.parts * (self.ahead.rule.batch_size or 1)
        return max(1, min(self.parts, len(examples), int(sum(map(len, examples)) / in_a_step)))

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


def look_ahead(
    ahead: Lookahead, rehearsal: Rehearsal | None, answers: AnswerBatches | None
) -> dict[str, Tensor]:
    """Every prediction there is, by name: [d_sae] each.

    Args:
        ahead: the lookahead.
        rehearsal: also look as far as the end of a run.
        answers: samples from the model as it is at the time of the call, always with the same random numbers; None to
            leave out what the model would write.
    """
    found = {"probe_activation": ahead.mean_activations(), "predicted_change": ahead.predicted_change()}
    given = [] if answers is None else list(answers())
    if answers is not None:
        change, presence = ahead.predicted_sampled_changes(lambda: given)
        found |= {"predicted_sampled_change": change, "predicted_presence_change": presence}
    if rehearsal is not None:
        found["rehearsed_change"] = ahead.change_after(rehearsal.shift())
        if answers is not None:
            with rehearsal.moved():
                then = list(answers())
            found["rehearsed_sampled_change"] = ahead.mean_of_answers(then) - ahead.mean_of_answers(given)
    return found


@torch.no_grad()
def _put(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in parameters.items():
        value.copy_(values[name])
