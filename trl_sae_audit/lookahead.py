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

import torch
from torch import Tensor, nn

from .audit_pass import Reference, last_hidden_state
from .batch_moments import MomentsOfBatches, accumulate
from .dictionary import FeatureDictionary
from .directional import Directional, Function
from .errors import AuditError
from .hook_points import HookPoint
from .language_head import LanguageHead
from .objectives import Loss, TokenizedExample
from .residual_stream import evaluation_mode, stopped_at
from .update_rule import AffineUpdate, Tensors, UpdateRule

Batches = Callable[[], Iterable[Sequence[TokenizedExample]]]
"""The examples, batch by batch, as often as asked."""

AnswerBatches = Callable[[], Iterable[Mapping[str, Tensor]]]
"""Padded `input_ids`, `attention_mask`, `completion_mask` [rows, tokens] of answers, batch by batch, as often as asked."""


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
        method: how to differentiate along the step, see `Directional`.

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
        self.directional = Directional(model, self.parameters, method)
        self._encode = differentiable_encoder(dictionary)
        self._head = LanguageHead(model, point.decoder)
        self._reference = None if reference is None else Reference(reference)
        self._update: AffineUpdate | None = None
        self._gradient: Tensors = {}
        self._n = 0
        self._tokens = 0

    # The step

    def update(self) -> AffineUpdate:
        """The optimizer's step on all examples, computed once: a forward and a backward pass over them."""
        if self._update is None:
            moments = self.new_moments()
            self._gradient, self._n = self.gradient(self.examples(), moments)
            if not self._n:
                raise AuditError("There is no example to take a step on; give at least one.")
            batches = None if moments is None else moments.result(self._gradient)
            self._update = self.rule.affine(self._gradient, self.parameters, batches)
        return self._update

    def step(self) -> Tensors:
        """Δθ by parameter."""
        return self.update().step(self._gradient)

    def new_moments(self) -> MomentsOfBatches | None:
        """Where the moments of the run's batches gather, if the rule wants them."""
        return MomentsOfBatches(self.rule) if self.rule.wants_batches else None

    def gradient(
        self,
        batches: Iterable[Sequence[TokenizedExample]],
        moments: MomentsOfBatches | None,
        start: Tensors | None = None,
    ) -> tuple[Tensors, int]:
        """∇θ of the examples' mean loss at the parameters as they are, and the number of examples.

        Args:
            batches: the examples.
            moments: gathers the gradients of the run's batches.
            start: the parameters of the policy before training, where it has moved and is its own reference.
        """
        sums = {name: torch.zeros_like(value) for name, value in self.parameters.items()}
        count = 0
        with evaluation_mode(self.model), torch.enable_grad():
            for examples in batches:
                for part in [examples] if moments is None else moments.cut(examples):
                    found = self._gradient_of(self._batch(part), start)
                    count += len(part)
                    for name, value in found.items():
                        sums[name] += value
                    if moments is not None:
                        moments.add(found, len(part))
        return {name: value / max(count, 1) for name, value in sums.items()}, count

    def _gradient_of(self, batch: Mapping[str, Tensor], start: Tensors | None = None) -> Tensors:
        """∇θ Σ_i L_i of a batch; logits a chunk at a time, so that none outlives its chunk."""
        predicted, targets, weights = self._weights(batch, start)
        last = last_hidden_state(self.point.decoder, batch)
        hidden = last[:, :-1][predicted]
        leaf = hidden.detach().requires_grad_(True)
        sums: dict[str, Tensor] = {}
        arriving = torch.zeros_like(leaf)
        for part in self._head.chunks(len(leaf)):
            value = (self._head.log_probs(leaf[part], targets[part]) * weights[part]).sum()
            found = torch.autograd.grad(value, [leaf, *self.parameters.values()], allow_unused=True)
            arriving += found[0]
            accumulate(sums, dict(zip(self.parameters, found[1:], strict=True)))
        found = torch.autograd.grad(hidden, list(self.parameters.values()), arriving, allow_unused=True)
        accumulate(sums, dict(zip(self.parameters, found, strict=True)))
        return sums

    @torch.no_grad()
    def _weights(
        self, batch: Mapping[str, Tensor], start: Tensors | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which tokens are predicted [rows, T − 1], which they are [m], and ∂L/∂log π of each [m].

        Where the reference is the policy as it is all log-ratios are 0, whatever the log-probabilities: none is computed.
        """
        predicted = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][predicted]
        log_probs = reference = torch.zeros(predicted.shape, device=predicted.device)
        if self._reference is not None or start is not None:
            log_probs_at = self._log_probs(batch, predicted, targets)
            values = log_probs_at(self.parameters)
            empty = torch.zeros(predicted.shape, dtype=values.dtype, device=values.device)
            log_probs = empty.masked_scatter(predicted, values)
            if self._reference is not None:
                reference = self._reference.log_probs(batch)
            elif start is not None:
                reference = empty.masked_scatter(predicted, log_probs_at(start))
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
            return self.directional.derivative(self._mean_activations, step)

    def predicted_sampled_change(self, answers: AnswerBatches) -> Tensor:
        """What the step does to ā_f over answers that the model samples, read by the model as it is: [d_sae].

        A step changes which answers are given. With `C_t = Σ_{s≤t} ⟨∇ log π(y_s | y_<s), Δθ⟩` for an answer y,

            d E_π[Σ_t a_f[t]] = E_π[Σ_t a_f[t]·C_t],

        the likelihood-ratio estimate (Williams 1992) with what comes before a token left out, as it cannot depend on
        the token; and likewise of the number of tokens T, so that `d ā_f = E[Σ_t (a_f[t] − ā_f)·C_t] / E[T]`.

        Args:
            answers: sampled from the model as it is, at temperature 1, with `completion_mask` on the answers' tokens.
        """
        return self.predicted_sampled_changes(answers)[0]

    def predicted_sampled_changes(self, answers: AnswerBatches) -> tuple[Tensor, Tensor]:
        """`predicted_sampled_change`, and what the step does to the share of the answers in which each feature is active.

        The share `P_f` of answers y with a_f ≠ 0 on any token has the derivative `E[(1{f active in y} − P_f)·C_T]`. The mean
        activation is ruled by the features with large activations, the share counts all alike.
        """
        step = self.step()
        d_sae, device = self.dictionary.d_sae, self.dictionary.device
        weighted, total, seen, likelier = (
            torch.zeros(d_sae, dtype=torch.float64, device=device) for _ in range(4)
        )
        weight, tokens, pull, given = 0.0, 0, 0.0, 0
        with torch.no_grad(), evaluation_mode(self.model):
            for batch in answers():
                predicted = batch["completion_mask"][:, 1:].bool()
                log_probs = self._log_probs(batch, predicted, batch["input_ids"][:, 1:][predicted])
                change = self.directional.derivative(log_probs, step).double()
                table = torch.zeros(predicted.shape, dtype=change.dtype, device=change.device)
                table = table.masked_scatter(predicted, change)
                so_far, whole = table.cumsum(1)[predicted], table.sum(1)
                answer = predicted.nonzero()[:, 0]
                active = torch.zeros(len(predicted), d_sae, dtype=torch.bool, device=device)
                states = self._probe_states(batch)
                width = self.dictionary.tokens_at_once
                parts = (states.split(width), so_far.split(width), answer.split(width))
                for part, until, owner in zip(*parts, strict=True):
                    activations = self._encode(part).double()
                    weighted += until @ activations
                    total += activations.sum(0)
                    places, features = (activations != 0).nonzero(as_tuple=True)
                    active[owner[places], features] = True
                seen += active.sum(0)
                likelier += whole @ active.double()
                weight, tokens = weight + float(so_far.sum()), tokens + len(so_far)
                pull, given = pull + float(whole.sum()), given + len(whole)
        if not tokens:
            raise AuditError("There are no sampled answers to look ahead with; give prompts to sample at.")
        return (weighted - total / tokens * weight) / tokens, (likelier - seen / given * pull) / given

    def mean_of_answers(self, answers: Iterable[Mapping[str, Tensor]]) -> Tensor:
        """ā_f over given answers, read by the model as it is: [d_sae]."""
        total, tokens = torch.zeros(self.dictionary.d_sae, dtype=torch.float64), 0
        width = self.dictionary.tokens_at_once
        with torch.no_grad(), evaluation_mode(self.model):
            for batch in answers:
                states = self._probe_states(batch)
                tokens += len(states)
                for part in states.split(width):
                    total += self._encode(part).sum(0).double().cpu()
        return total / tokens

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
                log_probs = self._log_probs(batch, predicted, targets)
                change = self.directional.derivative(log_probs, direction) * weights
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
                accumulate(sums, dict(zip(names, found, strict=True)))
        return sums

    def _mean_activations(self, parameters: Mapping[str, Tensor]) -> Tensor:
        tokens = self._probe_tokens()

        def total(examples: Sequence[TokenizedExample]) -> Tensor:
            states = self._probe_states(self._batch(examples))
            parts = states.split(self.dictionary.tokens_at_once)
            return torch.stack([self._encode(part).sum(0) for part in parts]).sum(0)

        parts = [self.directional.at(parameters, total, examples) for examples in self.probe()]
        return torch.stack(parts).sum(0) / tokens

    def _log_probs(self, batch: Mapping[str, Tensor], predicted: Tensor, targets: Tensor) -> Function:
        """The predicted tokens' log-probabilities [m], of the parameters."""

        def scored() -> Tensor:
            hidden = last_hidden_state(self.point.decoder, batch)[:, :-1][predicted]
            parts = [
                self._head.log_probs(hidden[part], targets[part]) for part in self._head.chunks(len(hidden))
            ]
            return torch.cat(parts)

        return lambda parameters: self.directional.at(parameters, scored)

    def _probe_states(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of the answers' tokens [m, d_model]; nothing above the hook point is run."""
        hidden = stopped_at(self.point, lambda: last_hidden_state(self.point.decoder, batch))
        return hidden[batch["completion_mask"].bool()]

    def _probe_tokens(self) -> int:
        if not self._tokens:
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


def differentiable_encoder(dictionary: FeatureDictionary) -> Callable[[Tensor], Tensor]:
    """[m, d_model] → activations [m, d_sae], with derivatives where the SAE has them (TopK: through the chosen).

    Raises:
        AuditError: for an encoder of one's own that says not how.
    """
    encoder = dictionary.encoder
    if encoder is None:
        return lambda hidden: torch.cat(
            [block.project(hidden) for block in dictionary.blocks(len(hidden))], -1
        )
    from .sae_encoder import SaeLensEncoder

    if not isinstance(encoder, SaeLensEncoder):
        raise AuditError(
            f"The encoder of dictionary {dictionary.name!r} is a {type(encoder).__name__}, which cannot be differentiated; "
            "load the SAE with load_dictionary, or pass its directions alone."
        )
    return encoder.activations


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
