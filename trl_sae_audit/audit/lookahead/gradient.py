"""The gradient of a loss by the model's parameters, over examples."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import AuditError
from ...models.batches import token_batches
from ...models.hook_points import HookPoint
from ...models.language_head import LanguageHead, Reference
from ...models.residual_stream import checkpointed, evaluation_mode, gradient_at, last_hidden_state
from ..batches import tokens_at_once
from ..gradients import BatchGradients, scatter
from ..objectives import Loss, TokenizedExample
from .batch_moments import BatchMomentAccumulator, accumulate, wide, zeros_like
from .jvp import Function, Jvp
from .optimizer_step import Tensors
from .processes import is_mine, sum_of_numbers, sum_over_processes
from .stored import StoredTensors

Batches = Callable[[], Iterable[Sequence[TokenizedExample]]]
"""The examples, batch by batch, as often as asked."""

_LOSS_SCALES = (1.0, 2.0**16, 2.0**10, 2.0**4, 1.0)


Watch = Callable[[Sequence[TokenizedExample], Mapping[str, Tensor], BatchGradients], None]
"""Is shown each batch of examples as it is differentiated."""


@dataclass(frozen=True)
class GradientSums:
    """Gradients summed over the examples of several groups, in float32 or wider.

    Attributes:
        groups: of each group, Σ ∇L_i by parameter. Several are on disk, since each is as large as the model.
        counts: examples in each.
    """

    groups: Sequence[Mapping[str, Tensor]]
    counts: list[int]

    def mean(self) -> Tensors:
        """∇ of the mean loss of all examples; zero where there are none."""
        n = max(sum(self.counts), 1)
        first, *rest = self.groups
        means: Tensors = {}
        for name, value in first.items():
            means[name] = value / n
            for group in rest:
                means[name].add_(group[name], alpha=1 / n)
        return means


@dataclass(frozen=True)
class WeighedTokens:
    """Which tokens of a batch are predicted [rows, T − 1], which they are [m], and ∂L/∂log π of each [m]."""

    predicted: Tensor
    targets: Tensor
    weights: Tensor


class _NotFiniteError(Exception):
    """Some examples of a batch, by their places, have a loss that is not finite."""

    def __init__(self, examples: Tensor) -> None:
        self.examples = set(examples.tolist())


class ParameterGradient:
    """Differentiates a loss by the trainable parameters of a model.

    Args:
        model: the policy; trainable are its parameters that require a gradient, full or LoRA.
        point: a hook point in it.
        width: of the residual stream there.
        loss: of the examples.
        jvp: puts other parameters into the model.
        reference: the reference model, None where it is the policy.

    Raises:
        AuditError: nothing is trainable.
    """

    def __init__(
        self,
        model: nn.Module,
        point: HookPoint,
        width: int,
        loss: Loss,
        jvp: Jvp,
        reference: nn.Module | None,
    ) -> None:
        self.model = model
        self.parameters = jvp.parameters
        self.point = point
        self.decoder = point.decoder
        self.width = width
        self.loss = loss
        self.jvp = jvp
        self.head = LanguageHead(model, point.decoder)
        self._reference = None if reference is None else Reference(reference)

    def over(
        self,
        batches: Iterable[Sequence[TokenizedExample]],
        moments: BatchMomentAccumulator | None,
        start: Mapping[str, Tensor] | None = None,
        borders: Sequence[int] = (),
        watch: Watch | None = None,
    ) -> GradientSums:
        """The gradient over examples at the parameters as they are, summed over all processes.

        Besides what `moments` takes, one parameter size of memory; sums of several groups are put aside on disk.

        Args:
            batches: the examples; every process is given all of them and works on its share.
            moments: gathers the gradients of the run's batches.
            start: the parameters of the policy before training, where it has moved and is its own reference.
            borders: how many examples come before each group but the first.
            watch: is shown every batch of this process's share; see `differentiate`.
        """
        group, counts = 0, [0] * (len(borders) + 1)
        summed: Tensors = zeros_like(self.parameters)
        done: list[Mapping[str, Tensor]] = []
        with evaluation_mode(self.model), torch.enable_grad():
            for number, (of_group, piece) in enumerate(_pieces(batches, borders, moments)):
                for _ in range(of_group - group):
                    done.append(self._put_aside(summed))
                group = of_group
                if is_mine(number) if moments is None else moments.mine:
                    sums = [summed] if moments is None else [summed, moments.gradient]
                    for places in self.batches(piece):
                        self.add([piece[place] for place in places], sums, start, watch)
                    counts[group] += len(piece)
                if moments is not None:
                    moments.count(len(piece))
        last: Mapping[str, Tensor] = summed
        if borders:
            done += [self._put_aside(summed) for _ in range(len(borders) - group)]
            last = self._put_aside(summed)
        else:
            sum_over_processes(summed.values())
        device = next(iter(self.parameters.values())).device
        return GradientSums([*done, last], [int(count) for count in sum_of_numbers(counts, device)])

    def _put_aside(self, summed: Tensors) -> StoredTensors:
        sum_over_processes(summed.values())
        stored = StoredTensors(summed)
        for value in summed.values():
            value.zero_()
        return stored

    def batches(self, examples: Sequence[TokenizedExample]) -> Iterator[list[int]]:
        """Places of examples of like length, as many as there are tokens for."""
        rows = self.loss.rows_per_example
        return token_batches([example.size * rows for example in examples], tokens_at_once(self.model))

    def of_batch(self, batch: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> Tensors:
        """∇θ Σ_i L_i of a batch."""
        summed: Tensors = zeros_like(self.parameters)
        self.differentiate(batch, [summed], start)
        return summed

    def add(
        self,
        examples: Sequence[TokenizedExample],
        sums: Sequence[Tensors],
        start: Mapping[str, Tensor] | None,
        watch: Watch | None,
    ) -> None:
        """Add the gradient of some examples to each of the sums; those whose loss is not finite are left out, and not shown."""
        batch = self.batch(examples)
        try:
            found = self.differentiate(batch, sums, start)
        except _NotFiniteError as error:
            finite = [example for place, example in enumerate(examples) if place not in error.examples]
            if finite:
                self.add(finite, sums, start, watch)
            return
        if watch is not None:
            watch(examples, batch, found)

    def differentiate(
        self, batch: Mapping[str, Tensor], sums: Sequence[Tensors], start: Mapping[str, Tensor] | None = None
    ) -> BatchGradients:
        """Add ∇θ Σ_i L_i of a batch to each of the sums, and return what the same backward pass finds at the hook point.

        A parameter at a time, so that no second gradient of the model's size is ever in memory; logits a chunk at a time. Layers
        that the model checkpoints are computed again.
        """
        weighed = self.weights(batch, start)
        if not any(value.dtype == torch.float16 for value in self.parameters.values()):
            return self._backward(batch, weighed, sums, 1.0)
        # in float16 what is small is lost; what a scale makes too large asks for a smaller one
        for scale in _LOSS_SCALES:
            summed: Tensors = zeros_like(self.parameters)
            found = self._backward(batch, weighed, [summed], scale)
            if all(bool(value.isfinite().all()) for value in summed.values()):
                for each in sums:
                    accumulate(each, summed)
                return found
        raise AuditError(
            f"The gradient of {type(self.model).__name__} is not finite in float16; load it in bfloat16 or float32."
        )

    def _backward(
        self, batch: Mapping[str, Tensor], weighed: WeighedTokens, sums: Sequence[Tensors], scale: float
    ) -> BatchGradients:
        predicted, targets, weights = weighed.predicted, weighed.targets, weighed.weights * scale
        with checkpointed(self.model), gradient_at(self.point, self.width) as here, torch.enable_grad():
            last = last_hidden_state(self.point.decoder, batch)
            hidden = last[:, :-1][predicted]
            self._check_finite(hidden, weighed)
            with _gradients_into(self.parameters, sums, 1 / scale):
                values, arriving = [], []
                for part in self.head.chunks(len(hidden)):
                    leaf = hidden[part].detach().requires_grad_(True)
                    value = self.head.log_probs(leaf, targets[part])
                    (value * weights[part]).sum().backward()
                    values.append(value.detach())
                    assert leaf.grad is not None
                    arriving.append(leaf.grad)
                hidden.backward(torch.cat(arriving))
        log_probs = scatter(torch.cat(values).float(), predicted)
        return BatchGradients(
            gradient=here.gradient / scale,
            hidden=here.read,
            written=here.written,
            positions=F.pad(predicted, (0, 1)),
            log_probs=log_probs.sum(1),
            weights=F.pad(scatter(-weighed.weights.float(), predicted), (1, 0)),
        )

    @torch.no_grad()
    def _check_finite(self, hidden: Tensor, weighed: WeighedTokens) -> None:
        """Before anything is added to the sums."""
        finite = hidden.isfinite().all(1) & weighed.weights.isfinite()
        if not bool(finite.all()):
            rows = weighed.predicted.nonzero()[:, 0][~finite].unique()
            raise _NotFiniteError(rows % (len(weighed.predicted) // self.loss.rows_per_example))

    @torch.no_grad()
    def weights(
        self, batch: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None
    ) -> WeighedTokens:
        """How the loss weighs the log-probabilities of a batch.

        Where the reference is the policy as it is all log-ratios are 0, whatever the log-probabilities: none is computed.
        """
        predicted = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][predicted]
        log_probs = reference = torch.zeros(predicted.shape, dtype=torch.float32, device=predicted.device)
        if self._reference is not None or start is not None:
            log_probs_at = self.log_probs(batch, predicted, targets)
            values = log_probs_at(self.parameters)
            empty = torch.zeros(predicted.shape, dtype=values.dtype, device=values.device)
            log_probs = empty.masked_scatter(predicted, values)
            if self._reference is not None:
                reference = self._reference.log_probs(batch)
            elif start is not None:
                reference = empty.masked_scatter(predicted, log_probs_at(start))
        weights = self.loss.weights(batch, log_probs, reference)
        return WeighedTokens(predicted, targets, weights[predicted].to(wide(next(self.model.parameters()))))

    def log_probs(self, batch: Mapping[str, Tensor], predicted: Tensor, targets: Tensor) -> Function:
        """The predicted tokens' log-probabilities [m], of the parameters."""
        return self.log_probs_of(lambda: last_hidden_state(self.decoder, batch)[:, :-1][predicted], targets)

    def log_probs_of(self, states: Callable[[], Tensor], targets: Tensor) -> Function:
        """Log-probabilities of tokens [m] after the last hidden states [m, d_model] that are computed, of the parameters."""

        def scored() -> Tensor:
            hidden = states()
            parts = [
                self.head.log_probs(hidden[part], targets[part]) for part in self.head.chunks(len(hidden))
            ]
            return torch.cat(parts)

        return lambda parameters: self.jvp.at(parameters, scored)

    def batch(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """The examples padded, on the model's device."""
        device = next(self.decoder.parameters()).device
        return {name: value.to(device) for name, value in self.loss.collate(examples).items()}


def _pieces(
    batches: Iterable[Sequence[TokenizedExample]],
    borders: Sequence[int],
    moments: BatchMomentAccumulator | None,
) -> Iterator[tuple[int, Sequence[TokenizedExample]]]:
    """Group and examples of each piece: no piece is of two groups, or of two of the run's batches."""
    position = 0
    for examples in batches:
        cuts = [border - position for border in borders if position < border < position + len(examples)]
        for start, stop in pairwise([0, *cuts, len(examples)]):
            group = bisect_right(borders, position + start)
            part = examples[start:stop]
            for piece in [part] if moments is None else moments.cut(part):
                yield group, piece
        position += len(examples)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that require a gradient, by name.

    Raises:
        AuditError: there are none.
    """
    parameters: dict[str, Tensor] = {
        name: value for name, value in model.named_parameters() if value.requires_grad
    }
    if not parameters:
        raise AuditError(
            "No parameter of the model requires a gradient, so no step can be looked ahead to; load it for training, or pass "
            "lookahead=None."
        )
    return parameters


@contextmanager
def _gradients_into(
    parameters: Mapping[str, Tensor], sums: Sequence[Tensors], factor: float
) -> Iterator[None]:
    """Add what backward passes find of each parameter, times a factor, to the sums and not to its `grad`."""
    own = {name: value.grad for name, value in parameters.items()}
    handles = []
    for name, value in parameters.items():

        def take(parameter: Tensor, name: str = name) -> None:
            assert parameter.grad is not None
            for each in sums:
                each[name].add_(parameter.grad.to(each[name].dtype), alpha=factor)
            parameter.grad = None

        value.grad = None
        handles.append(value.register_post_accumulate_grad_hook(take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, value in parameters.items():
            value.grad = own[name]
