"""One pass over examples: per-example gradients at a hook point and feature activations, and nothing else.

No weight gets a gradient, nothing below the hook point is differentiated, and where policy and reference are one
model the reference costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .dictionary import FeatureDictionary
from .errors import AuditError
from .hook_points import HookPoint
from .language_head import LanguageHead, causal_model
from .objectives import Loss, TokenizedExample
from .residual_stream import evaluation_mode


@dataclass
class ExampleArrays:
    """What the pass keeps of n examples with R answers each; answer r of example i is row `i·R + r`.

    Attributes:
        gradient: Σ_t ∂L_i/∂h[t] of each answer's tokens, L_i the example's own loss: [n, R, d_model] float32.
        side: +1 or -1 of each answer [n, R]. length: its tokens that enter the loss [n, R]. log_prob: its
            log-probability under the policy, or its reward where a reward model was audited [n, R].
        indptr, feature, mean, extreme, effect: activations in rows as in a CSR matrix. Row i·R + r holds the
            features active in the answer: their mean activation over its tokens, the activation largest in size,
            and `-Σ_t a_f·⟨g[t], ∂h/∂a_f⟩` over the tokens whose logits enter the loss.
    """

    gradient: np.ndarray
    side: np.ndarray
    length: np.ndarray
    log_prob: np.ndarray
    indptr: np.ndarray
    feature: np.ndarray
    mean: np.ndarray
    extreme: np.ndarray
    effect: np.ndarray

    @property
    def finite(self) -> np.ndarray:
        """Whether each example's gradient is finite [n]."""
        return np.isfinite(self.gradient).all(axis=(1, 2))


@dataclass
class _AnswerScores:
    """One answer: its summed gradient, and its active features."""

    gradient: np.ndarray
    side: int
    length: int
    log_prob: float
    feature: np.ndarray
    mean: np.ndarray
    extreme: np.ndarray
    effect: np.ndarray


class AuditPass:
    """Runs a frozen model over examples.

    Args:
        model: the policy; its weights, modes and hooks are as before after every call.
        point: the dictionary's hook point in it.
        dictionary: on the model's device.
        loss: what is differentiated.
        reference: the reference model, None where it is the policy itself.
        activations: whether to encode the answers' tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        point: HookPoint,
        dictionary: FeatureDictionary,
        loss: Loss,
        *,
        reference: nn.Module | None = None,
        activations: bool = True,
    ) -> None:
        self.model = model
        self.point = point
        self.dictionary = dictionary
        self.loss = loss
        self.activations = activations
        self._reference = None if reference is None else Reference(reference)

    def run(self, examples: Sequence[TokenizedExample], batch_size: int) -> ExampleArrays:
        """Score examples, in batches of similar length; the result is in the order given."""
        batches = _batches_by_length(examples, batch_size)
        answers: list[list[_AnswerScores]] = [[] for _ in examples]
        with frozen(self.model), evaluation_mode(self.model):
            for places in batches:
                scored = self._batch([examples[place] for place in places])
                for offset, answer in enumerate(scored):
                    answers[places[offset % len(places)]].append(answer)
        return _gather(answers, self.loss.rows_per_example, self.dictionary.d_model)

    def _batch(self, examples: Sequence[TokenizedExample]) -> list[_AnswerScores]:
        """Every answer of a batch, first answers of all examples first."""
        device = next(self.point.decoder.parameters()).device
        batch = {name: value.to(device) for name, value in self.loss.collate(examples).items()}
        return self._answers(batch, *self._differentiate(batch))

    def _differentiate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradient and hidden states at the hook point [rows, T, d_model], loss positions [rows, T], and the
        log-probabilities of the answers' tokens [rows, T − 1]."""
        head = LanguageHead(self.model, self.point.decoder)
        predicted = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][predicted]
        with leaf_at(self.point, self.dictionary.d_model) as leaves, torch.enable_grad():
            last = last_hidden_state(self.point.decoder, batch)
        (hidden,) = leaves
        values, slopes = head.slopes(last.detach()[:, :-1][predicted], targets)
        log_probs = _scatter(values, predicted)
        reference = log_probs if self._reference is None else self._reference.log_probs(batch)
        weights = self.loss.weights(batch, log_probs, reference).to(values)
        arriving = torch.zeros_like(last)
        positions = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        positions[:, :-1] = predicted
        arriving[positions] = (slopes * weights[predicted][:, None]).to(arriving.dtype)
        (gradient,) = torch.autograd.grad(last, hidden, arriving)
        return gradient, hidden.detach(), positions, log_probs

    @torch.no_grad()
    def _answers(
        self,
        batch: Mapping[str, Tensor],
        gradient: Tensor,
        hidden: Tensor,
        positions: Tensor,
        log_probs: Tensor,
    ) -> list[_AnswerScores]:
        sums = gradient.sum(1, dtype=torch.float32).cpu().numpy()
        lengths = positions.sum(1).tolist()
        totals = log_probs.sum(1).tolist()
        sides = self.loss.row_sides(batch).tolist()
        answer = batch["completion_mask"].bool()
        scored = []
        for row, (side, length, total) in enumerate(zip(sides, lengths, totals, strict=True)):
            active = (
                active_features(self.dictionary, hidden[row], gradient[row], answer[row], positions[row])
                if self.activations
                else _NOTHING
            )
            scored.append(_AnswerScores(sums[row], int(side), int(length), float(total), *active))
        return scored


class RewardPass(AuditPass):
    """The same over a reward model: what is differentiated is less its reward.

    The reward is read at the last token and reaches the others through attention; activation attribution counts
    every token of the answer.
    """

    def _differentiate(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        with leaf_at(self.point, self.dictionary.d_model) as leaves, torch.enable_grad():
            output = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
            reward = output.logits[:, 0]
            (gradient,) = torch.autograd.grad(-reward.sum(), leaves[0])
        positions = batch["completion_mask"].bool()
        return gradient, leaves[0].detach(), positions, reward.detach().float()[:, None]


_Active = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_NOTHING: _Active = (np.zeros(0, np.int32), *(np.zeros(0, np.float32) for _ in range(3)))  # type: ignore[assignment]


def active_features(
    dictionary: FeatureDictionary, hidden: Tensor, gradient: Tensor, answer: Tensor, positions: Tensor
) -> _Active:
    """Features active in one answer, with mean and extreme activation and effect; see `ExampleArrays`.

    Args:
        hidden: [T, d_model]
        gradient: [T, d_model]
        answer: the answer's own tokens [T]
        positions: tokens whose logits enter the loss [T], mostly the answer's shifted by one
    """
    either = answer | positions
    tokens = (hidden[either].float(), gradient[either].float(), answer[either], positions[either])
    seen = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=dictionary.device)
    total, extreme, effect = torch.zeros(3, dictionary.d_sae, device=dictionary.device)
    parts = (values.split(dictionary.tokens_at_once) for values in tokens)
    for states, arriving, own, scored in zip(*parts, strict=True):
        activations = dictionary.encode(states)
        feature = (activations != 0).any(0).nonzero()[:, 0]
        kept = activations[:, feature]
        of_answer = torch.where(own[:, None], kept, 0.0)
        largest = of_answer.gather(0, of_answer.abs().argmax(0, keepdim=True))[0]
        seen[feature] = True
        total[feature] += of_answer.sum(0)
        extreme[feature] = torch.where(largest.abs() > extreme[feature].abs(), largest, extreme[feature])
        written = dictionary.written_norms(states[scored], feature)
        projected = arriving[scored] @ dictionary.rows(feature).T
        effect[feature] -= (kept[scored] * projected * written).sum(0)
    found = seen.nonzero()[:, 0]
    mean = total[found] / answer.sum().clamp(min=1)
    numbers = (found.to(torch.int32), mean, extreme[found], effect[found])
    return tuple(values.cpu().numpy() for values in numbers)  # type: ignore[return-value]


class Reference:
    """A reference model of its own, run without gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = LanguageHead(model, causal_model(model).get_decoder())

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        predicted = batch["completion_mask"][:, 1:].bool()
        with torch.no_grad(), evaluation_mode(self._model):
            last = last_hidden_state(self._head.decoder, batch)
            values = self._head.score(last[:, :-1][predicted], batch["input_ids"][:, 1:][predicted])
        return _scatter(values, predicted)


def last_hidden_state(decoder: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the logits are made of: [rows, tokens, d_model]."""
    output = decoder(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return output.last_hidden_state


def _scatter(values: Tensor, places: Tensor) -> Tensor:
    """[n] at the true places of [rows, tokens], 0 elsewhere."""
    filled = torch.zeros(places.shape, dtype=values.dtype, device=values.device)
    filled[places] = values
    return filled


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter needs a gradient for a while: none is computed, and no graph is built below a leaf."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def leaf_at(point: HookPoint, width: int) -> Iterator[list[Tensor]]:
    """Cut the graph at the hook point: its output becomes a leaf that needs a gradient, and is listed."""
    leaves: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.shape[-1] != width:
            raise AuditError(
                f"Module {point.path!r} writes {hidden.shape[-1]} dimensions but the dictionary reads {width}; it belongs "
                "to another model or another place in this one."
            )
        leaf = hidden.detach().requires_grad_(True)
        leaves.append(leaf)
        return (leaf, *output[1:]) if isinstance(output, tuple) else leaf

    handle = point.module.register_forward_hook(cut)
    try:
        yield leaves
    finally:
        handle.remove()


def _batches_by_length(examples: Sequence[TokenizedExample], batch_size: int) -> list[list[int]]:
    """Places of the examples of each batch, long ones together: the less padding, the faster."""
    order = sorted(range(len(examples)), key=lambda place: (-examples[place].size, place))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _gather(answers: list[list[_AnswerScores]], per_example: int, d_model: int) -> ExampleArrays:
    flat = [answer for example in answers for answer in example]
    shape = (len(answers), per_example)
    gradients = [answer.gradient for answer in flat]
    counts = [len(answer.feature) for answer in flat]

    def joined(name: str, dtype: type) -> np.ndarray:
        parts = [getattr(answer, name) for answer in flat]
        return np.concatenate(parts) if parts else np.zeros(0, dtype)

    return ExampleArrays(
        gradient=np.stack(gradients).reshape(*shape, d_model)
        if flat
        else np.zeros((*shape, d_model), np.float32),
        side=np.array([answer.side for answer in flat], np.int8).reshape(shape),
        length=np.array([answer.length for answer in flat], np.int32).reshape(shape),
        log_prob=np.array([answer.log_prob for answer in flat], np.float32).reshape(shape),
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        feature=joined("feature", np.int32),
        mean=joined("mean", np.float32),
        extreme=joined("extreme", np.float32),
        effect=joined("effect", np.float32),
    )
