"""Lookahead: what one optimizer step on the audited data would do to the features, through the parameters.

`attribution` says what the loss asks of the residual stream at the hook point; a step moves weights, and the features
follow from those. To first order in the step Δθ:

- what the step does to the model's own answers, see `generations`;
- on given text, `ā_f` being the feature's mean activation over the answer tokens of a held-out probe,
  `predicted_change_f = ⟨∇_θ ā_f, Δθ⟩`, for every feature at once by one Jacobian–vector product along Δθ;
- `influence_{i,f}`, example i's part of either. With `Δθ = b − A ⊙ g` (see `AffineUpdate`) and `g = Σ_i ∇L_i / n`,
  `influence_{i,f} = -⟨A ⊙ ∇ā_f, ∇L_i⟩ / n`, so that `Σ_i influence_{i,f} + ⟨∇ā_f, b⟩ = predicted_change_f` exactly.
  A is that of the whole batch: removing an example would change it too, which this leaves out, as a first-order
  score must. Where there is neither momentum nor weight decay, b = 0 and the influences alone add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from ...errors import AuditError
from ...models.attention_sinks import silent_tokens
from ...models.hook_points import HookPoint
from ...models.residual_stream import evaluation_mode, last_hidden_state, run_until
from ...saes.dictionary import FeatureDictionary
from ..gradients import scatter
from ..objectives import Loss, TokenizedExample
from .batch_moments import BatchMomentAccumulator, accumulate, wide, zeros_like
from .gradient import Batches, ParameterGradient, Watch, trainable
from .jvp import Function, Jvp, Method
from .optimizer_step import AffineUpdate, Tensors, UpdateRule
from .processes import own_share, sum_of_numbers, sum_over_processes
from .stored import ComputedTensors


@dataclass(frozen=True)
class AnswerStates:
    """What is read at the hook point of some answers' tokens.

    Attributes:
        hidden: of the m tokens [m, d_model].
        silent: at which no feature counts as active, for they are attention sinks [m].
    """

    hidden: Tensor
    silent: Tensor

    def parts(self, tokens: int) -> Iterator[AnswerStates]:
        """So many tokens at a time."""
        for hidden, silent in zip(self.hidden.split(tokens), self.silent.split(tokens), strict=True):
            yield AnswerStates(hidden, silent)

    def activations(self, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """[m, d_sae]."""
        return encode(self.hidden).masked_fill(self.silent[:, None], 0.0)


class Lookahead:
    """One optimizer step on some examples, looked at before it is taken.

    Args:
        model: the policy; trainable are its parameters that require a gradient, full or LoRA.
        point: the dictionary's hook point in it.
        dictionary: on the model's device.
        loss: of the examples.
        rule: the optimizer's next step.
        examples: what the step would be taken on.
        probe: held-out examples on whose answer tokens activations are looked at.
        reference: the reference model, None where it is the policy.
        method: how to differentiate along the step, see `Jvp`.
        borders: how many examples come before each group but the first. Each group's part of the step is kept apart, which
            shows the noise of having only so many examples.
        attention_sinks: count features as active at attention sinks too. Which tokens those are is seen before the step.

    Raises:
        AuditError: nothing is trainable; no examples; no probe.
    """

    def __init__(
        self,
        model: nn.Module,
        point: HookPoint,
        dictionary: FeatureDictionary,
        loss: Loss,
        rule: UpdateRule,
        examples: Batches,
        probe: Batches,
        *,
        reference: nn.Module | None = None,
        method: Method = "auto",
        borders: Sequence[int] = (),
        attention_sinks: bool = False,
    ) -> None:
        self.parameters = trainable(model)
        self.model = model
        self.point = point
        self.dictionary = dictionary
        self.loss = loss
        self.rule = rule
        self.examples = examples
        self.probe = probe
        self.borders = borders
        self.attention_sinks = attention_sinks
        self.jvp = Jvp(model, self.parameters, method)
        self.gradients = ParameterGradient(model, point, dictionary.d_model, loss, self.jvp, reference)
        self._encode: Callable[[Tensor], Tensor] | None = None
        self._update: AffineUpdate | None = None
        self._directions: list[ComputedTensors] = []
        self._counts: list[int] = []
        self._tokens = 0

    # The step

    def update(self) -> AffineUpdate:
        """The optimizer's step on all examples, computed once: a forward and a backward pass over them."""
        if self._update is None:
            self.take()
            assert self._update is not None
        return self._update

    def take(self, watch: Watch | None = None) -> None:
        """Compute the step: one forward and backward pass over all examples, with the hook point's own gradients on the way.

        Args:
            watch: is shown every batch of this process's share.

        Raises:
            AuditError: there are no examples.
        """
        moments = self.new_moments()
        sums = self.gradients.over(self.examples(), moments, borders=self.borders, watch=watch)
        n = sum(sums.counts)
        if not n:
            raise AuditError("There is no example to take a step on; give at least one.")
        if moments is None:
            update = self.rule.affine(sums.mean(), self.parameters)
        else:
            update = self.rule.affine({}, self.parameters, moments.result(last=True))
        self._update, self._counts = update, sums.counts
        self._directions = [self._direction(group, n) for group in sums.groups]

    def _direction(self, group: Mapping[str, Tensor], n: int) -> ComputedTensors:
        scale = self.update().scale
        return ComputedTensors(scale, lambda name: group[name] * scale[name] / -n)

    def directions(self) -> tuple[list[ComputedTensors], list[int]]:
        """Each group's part of the step, and how many examples it has; the rest of the step is the update's offset."""
        self.update()
        return self._directions, self._counts

    def step(self) -> Tensors:
        """Δθ by parameter."""
        offset, (first, *others) = self.update().offset, self._directions
        step = dict(first)
        for direction in (*others, offset):
            accumulate(step, direction)
        return step

    def new_moments(self) -> BatchMomentAccumulator | None:
        """Where the moments of the run's batches gather, if the rule wants them."""
        return BatchMomentAccumulator(self.rule, self.parameters) if self.rule.wants_batches else None

    def gradient(
        self,
        batches: Iterable[Sequence[TokenizedExample]],
        moments: BatchMomentAccumulator | None,
        start: Tensors | None = None,
    ) -> tuple[Tensors, int]:
        """∇θ of the examples' mean loss at the parameters as they are, and the number of examples; see `ParameterGradient`."""
        sums = self.gradients.over(batches, moments, start)
        return sums.mean(), sum(sums.counts)

    # On given text

    def mean_activations(self) -> Tensor:
        """ā_f on the probe, now: [d_sae]."""
        return self._over_probe(lambda total: total(self.parameters))

    def predicted_change(self) -> Tensor:
        """⟨∇_θ ā_f, Δθ⟩ of every feature: [d_sae]."""
        return self.change_along(self.step())

    def change_along(self, step: Tensors) -> Tensor:
        """⟨∇_θ ā_f, Δθ⟩ of every feature for another step Δθ, by parameter: [d_sae]."""
        along = self.jvp.line(step)
        return self._over_probe(lambda total: self.jvp.derivative(total, along, "activations"))

    def change_after(self, step: Tensors) -> Tensor:
        """ā_f(θ + Δθ) − ā_f(θ) of every feature, not to first order but as it is: [d_sae]."""
        moved = {name: (value + step[name]).to(value.dtype) for name, value in self.parameters.items()}

        def change(total: Function) -> Tensor:
            before = total(self.parameters)
            return total(moved) - before

        return self._over_probe(change)

    def activation_gradient(self, feature: int) -> Tensors:
        """∇_θ ā_f by parameter; one backward pass through the probe, below the hook point only."""

        def of(batch: Mapping[str, Tensor]) -> Tensor:
            return self.states(batch).activations(self._differentiable)[:, feature].sum()

        batches = (self.gradients.batch(examples) for examples in own_share(self.probe()))
        return self.gradient_of_sum(of, batches, 1 / self._probe_tokens())

    def _over_probe(self, what: Callable[[Function], Tensor]) -> Tensor:
        """Sum over the probe's batches of `what(total activation as a function of the parameters)`, per token."""
        tokens = self._probe_tokens()
        result = torch.zeros(
            self.dictionary.d_sae, dtype=wide(self._a_parameter), device=self.dictionary.device
        )
        with torch.no_grad(), evaluation_mode(self.model):
            for examples in own_share(self.probe()):
                batch = self.gradients.batch(examples)
                result += what(self._total_of(batch))
        sum_over_processes([result])
        return result / tokens

    def _total_of(self, batch: Mapping[str, Tensor]) -> Function:
        """Activations summed over the answers' tokens of a batch, [d_sae], as a function of the parameters.

        What tokens are attention sinks is decided at the parameters that come first: a token which crosses the limit within a step of a
        finite difference would be no change of an activation.
        """
        answer = batch["completion_mask"].bool()
        sinks: list[Tensor] = []

        def total() -> Tensor:
            hidden = self._hidden(batch)
            if not sinks:
                sinks.append(self.states_of(forward_ad.unpack_dual(hidden).primal, answer).silent)
            parts = AnswerStates(hidden[answer], sinks[0]).parts(self.dictionary.tokens_at_once)
            return torch.stack([part.activations(self._differentiable).sum(0) for part in parts]).sum(0)

        return lambda parameters: self.jvp.at(parameters, total)

    def _differentiable(self, states: Tensor) -> Tensor:
        if self._encode is None:
            self._encode = differentiable_encoder(self.dictionary)
        return self._encode(states)

    def _probe_tokens(self) -> int:
        if not self._tokens:
            counts = [
                int(self.gradients.batch(examples)["completion_mask"].sum())
                for examples in own_share(self.probe())
            ]
            self._tokens = int(sum_of_numbers([sum(counts)], self._a_parameter.device)[0])
            if not self._tokens:
                raise AuditError(
                    "The lookahead's probe has no example; give it some that are not in the data."
                )
        return self._tokens

    # Shared

    def influence(self, gradient: Tensors, examples: Batches | None = None) -> tuple[Tensor, float]:
        """Each example's part of a predicted change [n], and the part that no example has, ⟨gradient, b⟩.

        A forward pass with derivatives over the examples.

        Args:
            gradient: of what changes, such as `activation_gradient(feature)`.
            examples: by default those of the step. Of another one it is what it would add as one of n.
        """
        update, n = self.update(), sum(self._counts)
        offset = sum(float((gradient[name] * value).sum()) for name, value in update.offset.items())
        along = self.jvp.line(
            ComputedTensors(gradient, lambda name: gradient[name] * update.scale[name] / -n)
        )
        parts: list[Tensor] = []
        with torch.no_grad(), evaluation_mode(self.model):
            for some in (examples or self.examples)():
                part = torch.zeros(len(some), dtype=torch.float32)
                for places in self.gradients.batches(some):
                    batch_of = [some[place] for place in places]
                    batch = self.gradients.batch(batch_of)
                    tokens = self.gradients.weights(batch)
                    log_probs = self.gradients.log_probs(batch, tokens.predicted, tokens.targets)
                    change = self.jvp.derivative(log_probs, along, "log-probabilities") * tokens.weights
                    rows = scatter(change, tokens.predicted).sum(1)
                    part = part.to(rows.dtype)
                    part[places] = rows.reshape(self.loss.rows_per_example, len(batch_of)).sum(0).cpu()
                parts.append(part)
        return torch.cat(parts), offset

    def gradient_of_sum(
        self,
        function: Callable[[Mapping[str, Tensor]], Tensor],
        batches: Iterable[Mapping[str, Tensor]],
        factor: float,
    ) -> Tensors:
        """∇θ of a number summed over this process's batches, times a factor, summed over the processes."""
        names, values = list(self.parameters), list(self.parameters.values())
        sums = zeros_like(self.parameters)
        with evaluation_mode(self.model), torch.enable_grad():
            for batch in batches:
                found = torch.autograd.grad(function(batch), values, allow_unused=True)
                accumulate(sums, dict(zip(names, found, strict=True)))
        sum_over_processes(sums.values())
        return {name: value * factor for name, value in sums.items()}

    def states(self, batch: Mapping[str, Tensor]) -> AnswerStates:
        """Hidden states of the answers' tokens; nothing above the hook point is run."""
        return self.states_of(self._hidden(batch), batch["completion_mask"].bool())

    def states_of(self, hidden: Tensor, answer: Tensor) -> AnswerStates:
        """From hidden states [rows, tokens, d_model], those of the answers' tokens [rows, tokens]."""
        silent = silent_tokens(hidden, answer, attention_sinks=self.attention_sinks)
        return AnswerStates(hidden[answer], silent[answer])

    def _hidden(self, batch: Mapping[str, Tensor]) -> Tensor:
        return run_until(self.point, lambda: last_hidden_state(self.point.decoder, batch))

    @contextmanager
    def unmoved_states(self) -> Iterator[list[Tensor]]:
        """What is read at the hook point [rows, tokens, d_model], pass by pass, while passes differentiate forward at the parameters as
        they are."""
        seen: list[Tensor] = []

        def watch(hidden: Tensor) -> None:
            if self.jvp.differentiating:
                seen.append(forward_ad.unpack_dual(hidden).primal.detach())

        handle = self.point.on_read(watch)
        try:
            yield seen
        finally:
            handle.remove()

    @property
    def _a_parameter(self) -> Tensor:
        return next(iter(self.parameters.values()))


def differentiable_encoder(dictionary: FeatureDictionary) -> Callable[[Tensor], Tensor]:
    """[m, d_model] → activations [m, d_sae], with derivatives where the SAE has them (TopK: through the chosen).

    Raises:
        AuditError: for an encoder of another kind, whose derivative is not known.
    """
    encoder = dictionary.encoder
    if encoder is None:
        return lambda hidden: torch.cat(
            [chunk.project(hidden) for chunk in dictionary.chunks(len(hidden))], -1
        )
    from ...saes.encoder import SaeLensEncoder

    if not isinstance(encoder, SaeLensEncoder):
        raise AuditError(
            f"The encoder of dictionary {dictionary.name!r} is a {type(encoder).__name__}, which cannot be differentiated; "
            "load the SAE with load_dictionary, or pass its directions alone."
        )
    return encoder.activations
