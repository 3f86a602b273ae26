"""One pass over examples: per-example gradients at a hook point and feature activations, and nothing else.

No weight gets a gradient, nothing below the hook point is differentiated, and where policy and reference are one
model the reference costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.attention_sinks import silent_tokens
from ..models.batches import token_batches
from ..models.hook_points import HookPoint
from ..models.language_head import LanguageHead, Reference
from ..models.residual_stream import evaluation_mode, frozen, last_hidden_state, leaf_at
from ..models.reward_models import padded_with
from ..saes.dictionary import FeatureDictionary
from .batches import tokens_at_once
from .objectives import Loss, TokenizedExample
from .prompt_states import PromptStates, state_size
from .rewards import RewardLoss


@dataclass
class ExampleArrays:
    """What the pass keeps of n examples with R answers each; answer r of example i is row `i·R + r`.

    Attributes:
        gradient: Σ_t ∂L_i/∂h[t] of each answer's tokens, L_i the example's own loss: [n, R, d_model] float32.
        side: +1 or -1 of each answer [n, R]. length: its tokens that enter the loss [n, R]. log_prob: its
            log-probability under the policy, or its reward where a reward model was audited [n, R].
        weight: how much the loss asks for each answer, `Σ_t c_t` over its tokens with `c_t = −∂L_i/∂log π(y_t)`; where a reward
            model was audited its reward less the example's mean, in equal parts over the tokens [n, R].
        residual: the mean hidden state over each answer's tokens [n, R, d_model] float32; of a transcoder the MLP's output.
        indptr, feature, mean, max_activation, activation_attribution, selected: activations in rows as in a CSR matrix. Row
            i·R + r holds the features active in the answer: their mean activation over its tokens, the activation
            largest in size, `-Σ_t a_f·⟨g[t], ∂h/∂a_f⟩` over the tokens whose logits enter the loss, and `Σ_t c_t·a_f[t]`.
        peak, active_tokens: in the same rows, at which of the answer's tokens that largest activation is, and on how many of
            them the feature is active.
        token_indptr, token: the answers' token ids, in rows as in a CSR matrix without columns.
        prompt_tail: the last token ids before each answer, -1 where there are fewer [n, R, PROMPT_TAIL].
        prompt_state: what `PromptStates` keeps of each example's prompt [n, numbers] float32.
    """

    gradient: np.ndarray
    side: np.ndarray
    length: np.ndarray
    log_prob: np.ndarray
    weight: np.ndarray
    residual: np.ndarray
    indptr: np.ndarray
    feature: np.ndarray
    mean: np.ndarray
    max_activation: np.ndarray
    activation_attribution: np.ndarray
    selected: np.ndarray
    peak: np.ndarray
    active_tokens: np.ndarray
    token_indptr: np.ndarray
    token: np.ndarray
    prompt_tail: np.ndarray
    prompt_state: np.ndarray

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
    weight: float
    residual: np.ndarray
    feature: np.ndarray
    mean: np.ndarray
    max_activation: np.ndarray
    activation_attribution: np.ndarray
    selected: np.ndarray
    peak: np.ndarray
    active_tokens: np.ndarray
    token: np.ndarray
    prompt_tail: np.ndarray
    prompt_state: np.ndarray


Scores = list[_AnswerScores]
"""Of the answers of one example."""


@dataclass(frozen=True)
class BatchGradients:
    """One batch differentiated.

    Attributes:
        gradient, hidden: at the hook point, and what is read there [rows, T, d_model].
        written: the hidden states whose gradient it is; the same as `hidden`, save for a transcoder [rows, T, d_model].
        positions: tokens whose logits enter the loss [rows, T].
        log_probs: of each answer, or its reward where a reward model is audited [rows].
        weights: `c_t` of the answers' tokens, see `ExampleArrays`; 0 elsewhere [rows, T].
    """

    gradient: Tensor
    hidden: Tensor
    written: Tensor
    positions: Tensor
    log_probs: Tensor
    weights: Tensor


class AuditPass:
    """Runs a frozen model over examples.

    Args:
        model: the policy; its weights, modes and hooks are as before after every call.
        point: the dictionary's hook point in it.
        dictionary: on the model's device.
        loss: what is differentiated.
        reference: the reference model, None where it is the policy itself.
        activations: whether to encode the answers' tokens.
        attention_sinks: count features as active at tokens of more than ten times the median norm of their answer's too. Gradients
            are of all tokens in any case.

    Attributes:
        sinks: how many such tokens were left out so far.
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
        attention_sinks: bool = False,
    ) -> None:
        self.attention_sinks = attention_sinks
        self.sinks = 0
        self.model = model
        self.point = point
        self.dictionary = dictionary
        self.loss = loss
        self.activations = activations
        self._prompt_states = PromptStates(dictionary.d_model)
        self._reference = None if reference is None else Reference(reference)

    def run(
        self,
        examples: Sequence[TokenizedExample],
        batch_size: int,
        scored: Mapping[int, Scores] | None = None,
        advance: Callable[[int], object] = int,
    ) -> ExampleArrays:
        """Score examples, in batches of similar length; the result is in the order given.

        Args:
            examples: to score.
            batch_size: most examples of a batch; fewer where they are long.
            scored: of some rows the scores, if they were differentiated before.
            advance: is told of how many examples more there are scores.
        """
        known = dict(scored or {})
        others = [example for example in examples if example.row not in known]
        tokens = tokens_at_once(self.model)
        lengths = [example.size * self.loss.rows_per_example for example in others]
        with frozen(self.model), evaluation_mode(self.model):
            for places in token_batches(lengths, tokens, batch_size):
                known |= self._batch([others[place] for place in places])
                advance(len(places))
        answers = [known[example.row] for example in examples]
        return _gather(answers, self.loss.rows_per_example, self.dictionary.d_model)

    def _batch(self, examples: Sequence[TokenizedExample]) -> dict[int, Scores]:
        device = next(self.point.decoder.parameters()).device
        batch = {name: value.to(device) for name, value in self.loss.collate(examples).items()}
        return self.score(examples, batch, self.differentiate(batch))

    def score(
        self, examples: Sequence[TokenizedExample], batch: Mapping[str, Tensor], found: BatchGradients
    ) -> dict[int, Scores]:
        """What is kept of the answers of each example, by its row, once its batch is differentiated."""
        answers = self._answers(batch, found)  # first answers of all examples first
        return {example.row: answers[place :: len(examples)] for place, example in enumerate(examples)}

    def differentiate(self, batch: Mapping[str, Tensor]) -> BatchGradients:
        """The loss's gradient at the hook point, and what it is made of."""
        head = LanguageHead(self.model, self.point.decoder)
        predicted = batch["completion_mask"][:, 1:].bool()
        targets = batch["input_ids"][:, 1:][predicted]
        with leaf_at(self.point, self.dictionary.d_model) as states, torch.enable_grad():
            last = last_hidden_state(self.point.decoder, batch)
        values, slopes = head.slopes(last.detach()[:, :-1][predicted], targets)
        log_probs = scatter(values, predicted)
        reference = log_probs if self._reference is None else self._reference.log_probs(batch)
        weights = self.loss.weights(batch, log_probs, reference).to(values)
        arriving = torch.zeros_like(last)
        positions = torch.zeros_like(batch["completion_mask"], dtype=torch.bool)
        positions[:, :-1] = predicted
        arriving[positions] = (slopes * weights[predicted][:, None]).to(arriving.dtype)
        (gradient,) = torch.autograd.grad(last, states.leaf, arriving)
        of_tokens = F.pad(-weights.masked_fill(~predicted, 0), (1, 0))
        return BatchGradients(gradient, states.read, states.written, positions, log_probs.sum(1), of_tokens)

    @torch.no_grad()
    def _answers(self, batch: Mapping[str, Tensor], found: BatchGradients) -> list[_AnswerScores]:
        sums = found.gradient.sum(1, dtype=torch.float32).cpu().numpy()
        answer = batch["completion_mask"].bool()
        either = answer | found.positions
        silent = silent_tokens(found.hidden, answer, either, attention_sinks=self.attention_sinks)
        self.sinks += int((silent & answer).sum())
        usual = answer & ~silent
        states = torch.where(usual[..., None], found.written, 0).sum(1, dtype=torch.float32)
        residuals = (states / usual.sum(1, keepdim=True).clamp_min(1)).cpu().numpy()
        prompts = self._states_of_prompts(batch, found.hidden)
        figures = zip(
            self.loss.row_sides(batch).tolist(),
            found.positions.sum(1).tolist(),
            found.log_probs.tolist(),
            found.weights.sum(1).tolist(),
            residuals,
            strict=True,
        )
        ids, own, real = (
            batch[name].cpu().numpy() for name in ("input_ids", "completion_mask", "attention_mask")
        )
        scored = []
        for row, figure in enumerate(figures):
            places = (
                found.hidden[row],
                found.gradient[row],
                answer[row],
                found.positions[row],
                found.weights[row],
                silent[row],
            )
            active = active_features(self.dictionary, *places) if self.activations else _NOTHING
            texts = _texts(ids[row], own[row], real[row])
            scored.append(_AnswerScores(sums[row], *figure, *active, *texts, prompts[row % len(prompts)]))
        return scored

    def _states_of_prompts(self, batch: Mapping[str, Tensor], hidden: Tensor) -> np.ndarray:
        """Of each example of a batch; first answers come first, and all answers of an example have its prompt."""
        n = len(hidden) // self.loss.rows_per_example
        states = self._prompt_states.of(hidden[:n], batch["attention_mask"][:n], batch["completion_mask"][:n])
        return states.cpu().numpy()


class RewardPass(AuditPass):
    """The same over a reward model: what is differentiated is less its reward.

    The reward is read at the last token and reaches the others through attention; activation attribution counts
    every token of the answer.
    """

    def differentiate(self, batch: Mapping[str, Tensor]) -> BatchGradients:
        assert isinstance(self.loss, RewardLoss)
        padded = padded_with(self.model, self.loss.padding)
        with padded, leaf_at(self.point, self.dictionary.d_model) as states, torch.enable_grad():
            output = self.model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
            )
            reward = output.logits[:, 0]
            (gradient,) = torch.autograd.grad(-reward.sum(), states.leaf)
        positions = batch["completion_mask"].bool()
        reward = reward.detach().float()
        advantage = reward - reward.reshape(2, -1).mean(0).repeat(2)
        weights = positions * (advantage / positions.sum(1).clamp_min(1))[:, None]
        return BatchGradients(gradient, states.read, states.written, positions, reward, weights)


PROMPT_TAIL = 24
"""Tokens of a prompt that are kept to be shown before its answer."""

_Active = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
_INTEGERS, _FLOATS = np.zeros(0, np.int32), np.zeros(0, np.float32)
_NOTHING: _Active = (_INTEGERS, _FLOATS, _FLOATS, _FLOATS, _FLOATS, _INTEGERS, _INTEGERS)


def active_features(
    dictionary: FeatureDictionary,
    hidden: Tensor,
    gradient: Tensor,
    answer: Tensor,
    positions: Tensor,
    weights: Tensor,
    silent: Tensor | None = None,
) -> _Active:
    """Features active in one answer: mean and largest activation, activation attribution, `Σ c·a`, peak, active tokens.

    See `ExampleArrays`.

    Args:
        hidden: [T, d_model]
        gradient: [T, d_model]
        answer: the answer's own tokens [T]
        positions: tokens whose logits enter the loss [T], mostly the answer's shifted by one
        weights: `c_t` of the answer's tokens [T]
        silent: tokens at which no feature counts as active [T]; by default none
    """
    silent = torch.zeros_like(answer, dtype=torch.bool) if silent is None else silent
    either = answer | positions
    number = answer.cumsum(0) - 1
    tokens = (
        *(hidden[either].float(), gradient[either].float(), answer[either], positions[either]),
        *(weights[either].float(), number[either].int(), silent[either]),
    )
    seen = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=dictionary.device)
    total, largest, attributed, selected = torch.zeros(
        4, dictionary.d_sae, dtype=torch.float32, device=dictionary.device
    )
    peak, count = torch.zeros(2, dictionary.d_sae, dtype=torch.int32, device=dictionary.device)
    parts = (values.split(dictionary.tokens_at_once) for values in tokens)
    for states, arriving, own, scored, asked, numbers, none in zip(*parts, strict=True):
        activations = dictionary.encode(states, none)
        feature = (activations != 0).any(0).nonzero()[:, 0]
        kept = activations[:, feature]
        of_answer = torch.where(own[:, None], kept, 0.0)
        place = of_answer.abs().argmax(0)
        here = of_answer.gather(0, place[None])[0]
        higher = here.abs() > largest[feature].abs()
        seen[feature] = True
        total[feature] += of_answer.sum(0)
        selected[feature] += asked @ of_answer
        largest[feature] = torch.where(higher, here, largest[feature])
        peak[feature] = torch.where(higher, numbers[place], peak[feature])
        count[feature] += (of_answer != 0).sum(0, dtype=torch.int32)
        written = dictionary.written_norms(states[scored], feature)
        projected = arriving[scored] @ dictionary.rows(feature).T
        attributed[feature] -= (kept[scored] * projected * written).sum(0)
    found = seen.nonzero()[:, 0]
    mean = total[found] / answer.sum().clamp(min=1)
    others = (largest, attributed, selected, peak, count)
    figures = (found.to(torch.int32), mean, *(each[found] for each in others))
    return tuple(values.cpu().numpy() for values in figures)


def _texts(ids: np.ndarray, answer: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of one row [T]: the answer's token ids, and the last before it."""
    own = answer.astype(bool)
    before = ids[(real.astype(bool) & ~own) & (np.arange(len(ids)) < own.argmax())][-PROMPT_TAIL:]
    tail = np.full(PROMPT_TAIL, -1, np.int32)
    tail[PROMPT_TAIL - len(before) :] = before
    return ids[own].astype(np.int32), tail


def scatter(values: Tensor, places: Tensor) -> Tensor:
    """[n] at the true places of [rows, tokens], 0 elsewhere."""
    filled = torch.zeros(places.shape, dtype=values.dtype, device=values.device)
    filled[places] = values
    return filled


def _gather(answers: list[list[_AnswerScores]], per_example: int, d_model: int) -> ExampleArrays:
    flat = [answer for example in answers for answer in example]
    shape = (len(answers), per_example)
    gradients = [answer.gradient for answer in flat]
    counts = [len(answer.feature) for answer in flat]
    tails = [answer.prompt_tail for answer in flat]
    states = [example[0].prompt_state for example in answers]

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
        weight=np.array([answer.weight for answer in flat], np.float32).reshape(shape),
        residual=np.stack([answer.residual for answer in flat]).reshape(*shape, d_model)
        if flat
        else np.zeros((*shape, d_model), np.float32),
        indptr=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        feature=joined("feature", np.int32),
        mean=joined("mean", np.float32),
        max_activation=joined("max_activation", np.float32),
        activation_attribution=joined("activation_attribution", np.float32),
        selected=joined("selected", np.float32),
        peak=joined("peak", np.int32),
        active_tokens=joined("active_tokens", np.int32),
        token_indptr=np.cumsum([0, *(len(answer.token) for answer in flat)]).astype(np.int64),
        token=joined("token", np.int32),
        prompt_tail=np.array(tails, np.int32).reshape(*shape, PROMPT_TAIL),
        prompt_state=np.array(states, np.float32).reshape(len(answers), state_size(d_model)),
    )
