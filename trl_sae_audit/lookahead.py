"""Lookahead: what one optimizer step on the audited data would do to the features, through the parameters.

`attribution` says what the loss asks of the residual stream at the hook point; a step moves weights, and the features
follow from those. Three quantities, to first order in the step Δθ:

- `ā_f`, the feature's mean activation over the answer tokens of a held-out probe;
- `predicted_change_f = ⟨∇_θ ā_f, Δθ⟩`, for every feature at once by one Jacobian–vector product along Δθ;
- `influence_{i,f}`, example i's part of it. With `Δθ = b − A ⊙ g` (see `AffineUpdate`) and `g = Σ_i ∇L_i / n`,
  `influence_{i,f} = -⟨A ⊙ ∇ā_f, ∇L_i⟩ / n`, so that `Σ_i influence_{i,f} + ⟨∇ā_f, b⟩ = predicted_change_f` exactly.
  A is that of the whole batch: removing an example would change it too, which this leaves out, as a first-order
  score must. Where there is neither momentum nor weight decay, b = 0 and the influences alone add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from .audit_pass import Reference, last_hidden_state
from .dictionary import FeatureDictionary
from .errors import AuditError
from .hook_points import HookPoint
from .language_head import LanguageHead
from .objectives import Loss, TokenizedExample
from .residual_stream import evaluation_mode, stopped_at
from .update_rule import AffineUpdate, Tensors, UpdateRule

Batches = Callable[[], Iterable[Sequence[TokenizedExample]]]
"""The examples, batch by batch, as often as asked."""

METHODS = ("auto", "forward", "finite_difference")


class Lookahead:
    """One optimizer step on some examples, looked at before it is taken.

    Args:
        model: the policy; trainable are its parameters that require a gradient, full or LoRA.
        point: the dictionary's hook point in it.
        dictionary: on the model's device.
        loss: of the examples.
        reference: the reference model, None where it is the policy.
        rule: the optimizer's next step.
        examples: what the step would be taken on.
        probe: held-out examples on whose answer tokens activations are looked at.
        method: "forward" differentiates forward, exact; "finite_difference" takes central differences along the
            step, for models with an operation that has no forward derivative; "auto" falls back to it.

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
        method: str = "auto",
    ) -> None:
        if method not in METHODS:
            raise AuditError(f"method is {method!r}; choose one of {', '.join(METHODS)}.")
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not self.parameters:
            raise AuditError(
                "No parameter of the model requires a gradient, so no step can be looked ahead to; load it for training."
            )
        self.model = model
        self.point = point
        self.dictionary = dictionary
        self.loss = loss
        self.rule = rule
        self.examples = examples
        self.probe = probe
        self.method = method
        self._encode = differentiable_encoder(dictionary)
        self._head = LanguageHead(model, point.decoder)
        self._reference = None if reference is None else Reference(reference)
        self._update: AffineUpdate | None = None
        self._gradient: Tensors = {}
        self._n = 0

    # The step

    def update(self) -> AffineUpdate:
        """The optimizer's step on all examples, computed once: a forward and a backward pass over them."""
        if self._update is None:
            self._gradient, self._n = self._mean_gradient()
            self._update = self.rule.affine(self._gradient, self.parameters)
        return self._update

    def step(self) -> Tensors:
        """Δθ by parameter."""
        return self.update().step(self._gradient)

    def _mean_gradient(self) -> tuple[Tensors, int]:
        sums = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        count = 0
        with evaluation_mode(self.model), torch.enable_grad():
            for examples in self.examples():
                count += len(examples)
                for name, value in self._gradient_of(self._batch(examples)).items():
                    sums[name] += value
        if not count:
            raise AuditError("There is no example to take a step on; give at least one.")
        return {name: value / count for name, value in sums.items()}, count

    def _gradient_of(self, batch: Mapping[str, Tensor]) -> Tensors:
        """∇θ Σ_i L_i of a batch; logits a chunk at a time, so that none outlives its chunk."""
        predicted, targets, weights = self._weights(batch)
        last = last_hidden_state(self.point.decoder, batch)
        hidden = last[:, :-1][predicted]
        leaf = hidden.detach().requires_grad_(True)
        sums: dict[str, Tensor] = {}
        arriving = torch.zeros_like(leaf)
        for part in self._head.chunks(len(leaf)):
            value = (self._head.log_probs(leaf[part], targets[part]) * weights[part]).sum()
            found = torch.autograd.grad(value, [leaf, *self.parameters.values()], allow_unused=True)
            arriving += found[0]
            _accumulate(sums, self.parameters, found[1:])
        found = torch.autograd.grad(hidden, list(self.parameters.values()), arriving, allow_unused=True)
        _accumulate(sums, self.parameters, found)
        return sums

    @torch.no_grad()
    def _weights(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens are predicted [rows, T − 1], which they are [m], and ∂L/∂log π of each [m].

        Where the reference is the policy all log-ratios are 0, whatever the log-probabilities: none is computed.
        """
        predicted = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][predicted]
        log_probs = torch.zeros(predicted.shape, device=predicted.device)
        reference = log_probs
        if self._reference is not None:
            last = last_hidden_state(self.point.decoder, batch)
            values = self._head.score(last[:, :-1][predicted], targets)
            log_probs = log_probs.to(values.dtype).masked_scatter(predicted, values)
            reference = self._reference.log_probs(batch)
        weights = self.loss.weights(batch, log_probs, reference)
        return predicted, targets, weights[predicted].to(_dtype(self.model))

    # What it does to the features

    def mean_activations(self) -> Tensor:
        """ā_f on the probe, now: [d_sae]."""
        with torch.no_grad(), evaluation_mode(self.model):
            return self._mean_activations(self.parameters)

    def predicted_change(self) -> Tensor:
        """⟨∇_θ ā_f, Δθ⟩ of every feature: [d_sae]."""
        return self.change_along(self.step())

    def change_along(self, step: Tensors) -> Tensor:
        """⟨∇_θ ā_f, Δθ⟩ of every feature for another step Δθ, by parameter: [d_sae]."""
        with torch.no_grad(), evaluation_mode(self.model):
            return self._derivative(self._mean_activations, step)

    def change_after(self, step: Tensors) -> Tensor:
        """ā_f(θ + Δθ) − ā_f(θ) of every feature, not to first order but as it is: [d_sae]."""
        with torch.no_grad(), evaluation_mode(self.model):
            moved = {name: value + step[name] for name, value in self.parameters.items()}
            return self._mean_activations(moved) - self._mean_activations(self.parameters)

    def influence(self, feature: int) -> tuple[Tensor, float]:
        """Each example's part of a feature's predicted change [n], and the part that no example has, ⟨∇ā_f, b⟩.

        A backward pass through the probe, and a forward pass with derivatives over the examples.
        """
        update = self.update()
        gradient = self.activation_gradient(feature)
        offset = sum(float((gradient[name] * update.offset[name]).sum()) for name in gradient)
        direction = {name: -update.scale[name] * value / self._n for name, value in gradient.items()}
        parts = []
        with torch.no_grad(), evaluation_mode(self.model):
            for examples in self.examples():
                batch = self._batch(examples)
                predicted, targets, weights = self._weights(batch)
                self._current = batch, predicted, targets
                change = self._derivative(self._log_probs, direction) * weights
                rows = torch.zeros(predicted.shape, dtype=change.dtype, device=change.device)
                rows[predicted] = change
                parts.append(rows.sum(1).reshape(self.loss.rows_per_example, len(examples)).sum(0).cpu())
        return torch.cat(parts), offset

    def activation_gradient(self, feature: int) -> Tensors:
        """∇_θ ā_f by parameter; one backward pass through the probe, below the hook point only."""
        names, values = list(self.parameters), list(self.parameters.values())
        sums = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        tokens = self._probe_tokens()
        with evaluation_mode(self.model), torch.enable_grad():
            for examples in self.probe():
                states = self._probe_states(self._batch(examples))
                mean = self._encode(states)[:, feature].sum() / tokens
                found = torch.autograd.grad(mean, values, allow_unused=True)
                _accumulate(sums, dict(zip(names, values, strict=True)), found)
        return sums

    def _mean_activations(self, parameters: Mapping[str, Tensor]) -> Tensor:
        tokens = self._probe_tokens()

        def total(examples: Sequence[TokenizedExample]) -> Tensor:
            states = self._probe_states(self._batch(examples))
            width = max(1, 64 * 2**20 // (4 * self.dictionary.d_sae))
            return torch.stack([self._encode(part).sum(0) for part in states.split(width)]).sum(0)

        parts = [self._with(parameters, total, examples) for examples in self.probe()]
        return torch.stack(parts).sum(0) / tokens

    def _log_probs(self, parameters: Mapping[str, Tensor]) -> Tensor:
        batch, predicted, targets = self._current

        def scored() -> Tensor:
            hidden = last_hidden_state(self.point.decoder, batch)[:, :-1][predicted]
            parts = [
                self._head.log_probs(hidden[part], targets[part]) for part in self._head.chunks(len(hidden))
            ]
            return torch.cat(parts)

        return self._with(parameters, scored)

    def _probe_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of the answers' tokens [m, d_model]; nothing above the hook point is run."""
        hidden = stopped_at(self.point, lambda: last_hidden_state(self.point.decoder, batch))
        return hidden[batch["completion_mask"].bool()]

    def _probe_tokens(self) -> int:
        if not hasattr(self, "_tokens"):
            self._tokens = sum(
                int(self._batch(examples)["completion_mask"].sum()) for examples in self.probe()
            )
            if not self._tokens:
                raise AuditError(
                    "The lookahead's probe has no example; give it some that are not in the data."
                )
        return self._tokens

    def _batch(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        device = next(self.point.decoder.parameters()).device
        return {name: value.to(device) for name, value in self.loss.collate(examples).items()}

    # Derivatives along a direction in the parameters

    def _derivative(self, function: Callable[[Mapping[str, Tensor]], Tensor], direction: Tensors) -> Tensor:
        """d/ds function(θ + s·direction) at s = 0."""
        if self.method != "finite_difference":
            try:
                return self._forward_derivative(function, direction)
            except NotImplementedError:
                if self.method == "forward":
                    raise
                self.method = "finite_difference"
        return self._difference(function, direction)

    def _forward_derivative(
        self, function: Callable[[Mapping[str, Tensor]], Tensor], direction: Tensors
    ) -> Tensor:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            moving = {
                name: forward_ad.make_dual(value.detach(), direction[name].to(value))
                for name, value in self.parameters.items()
            }
            value, tangent = forward_ad.unpack_dual(function(moving))
            return torch.zeros_like(value) if tangent is None else tangent.clone()

    def _difference(self, function: Callable[[Mapping[str, Tensor]], Tensor], direction: Tensors) -> Tensor:
        """Central difference with `‖h·direction‖ = ε^⅓ ‖θ‖`: the error of the formula, of order h², and that of
        rounding, of order ε/h, are then alike."""
        size = _norm(direction.values())
        if size == 0:
            return torch.zeros_like(function(self.parameters))
        h = torch.finfo(_dtype(self.model)).eps ** (1 / 3) * _norm(self.parameters.values()) / size
        ahead, behind = (
            function({name: value + sign * h * direction[name] for name, value in self.parameters.items()})
            for sign in (1, -1)
        )
        return (ahead - behind) / (2 * h)

    def _with(self, parameters: Mapping[str, Tensor], function: Callable[..., Tensor], *args: Any) -> Tensor:
        """`function(*args)` with other parameters in the model."""
        calling = _Calling(self.model, function)
        return functional_call(calling, {f"model.{name}": value for name, value in parameters.items()}, args)


class _Calling(nn.Module):
    """A module that calls a function, so that `functional_call` can put other parameters into `model` meanwhile."""

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self, *args: Any) -> Tensor:
        return self._function(*args)


def differentiable_encoder(dictionary: FeatureDictionary) -> Callable[[Tensor], Tensor]:
    """[m, d_model] → activations [m, d_sae], with derivatives where the SAE has them (TopK: through the chosen).

    Raises:
        AuditError: for an encoder of one's own that says not how.
    """
    encoder = dictionary.encoder
    if encoder is None:
        return lambda hidden: hidden @ dictionary.directions.to(hidden).T
    from .sae import SaeLensEncoder

    if not isinstance(encoder, SaeLensEncoder):
        raise AuditError(
            f"The encoder of dictionary {dictionary.name!r} is a {type(encoder).__name__}, which cannot be differentiated; "
            "load the SAE with load_dictionary, or pass its directions alone."
        )
    sae = encoder.sae

    def encode(hidden: Tensor) -> Tensor:
        return sae.encode(hidden.to(sae.W_dec.dtype))

    return encode


def _accumulate(
    sums: dict[str, Tensor], parameters: Mapping[str, Tensor], found: Sequence[Tensor | None]
) -> None:
    for name, value in zip(parameters, found, strict=True):
        if value is not None:
            sums[name] = sums[name] + value if name in sums else value


def _norm(tensors: Iterable[Tensor]) -> float:
    return float(torch.stack([value.detach().double().square().sum() for value in tensors]).sum().sqrt())


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
