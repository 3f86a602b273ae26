"""What an optimizer step does to the features in the model's own answers.

A step changes which answers are given. With `C_t = Σ_{s≤t} ⟨∇ log π(y_s | y_<s), Δθ⟩` for an answer y that the model samples,
and a_f as the model reads it now,

    d E_π[Σ_t a_f[t]] = E_π[Σ_t a_f[t]·C_t],

the likelihood-ratio estimate (Williams 1992) with what comes before a token left out, as it cannot depend on the token; and
likewise of the number of tokens T. Each increment of C has expectation 0 given the tokens before it, so its mean over the
answers at the same place is taken off, as in a run's drift in generations: a baseline, the mean of what is still to come. So,
with C so centred, of the mean activation `ā_f = E[Σ_t a_f[t]] / E[T]`, and of the share P_f of the answers in which the feature
is active at all,

    predicted_change_in_generations_f = E[Σ_t (a_f[t] − ā_f)·C_t] / E[T]
    predicted_frequency_change_f      = E[(1{f active in y} − P_f)·C_T]

A mean activation favours features with large activations, and a frequency counts the faintest activation like the strongest.
The effect size is between them and has no unit, so that one ranking serves common and rare, strong and weak features: with
`r = √a` (of a projection with its sign), `r̄` its mean over the tokens of all answers, sd that of the answers' own means, and s
twice its median over the features, which keeps those that hardly ever occur from standing first by noise (Tusher et al. 2001),

    effect_size_f = (E[Σ_t (r_f[t] − r̄_f)·C_t] / E[T]) / √(sd_f² + s²)

In the lab (docs/studies/recovery.md) it finds what is planted in few pairs more often than with sd alone. Its interval covers
other prompts, by the spread over prompts, and other pairs of the same kind, by the spread over random groups of pairs that each
take a part of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...errors import AuditError
from ...models.batches import answer_batches, batched
from ...models.residual_stream import evaluation_mode
from ..gradients import scatter
from .answer_places import AnswerPlaces
from .generation_changes import (
    Changes,
    Readings,
    centre_by_place,
    still_to_come,
)
from .lookahead import Lookahead
from .optimizer_step import Tensors
from .processes import own_share, sum_of_numbers, sum_over_processes
from .sampled_tokens import SampledTokens, longest_answer, places_of, share_prompts
from .stored import ComputedTensors

Batches = Callable[[], Iterator[tuple[Tensor, dict[str, Tensor]]]]
"""Batches of `Generations`, as often as asked."""


@dataclass(frozen=True)
class Generations:
    """Answers that a model sampled at temperature 1, as token ids.

    Attributes:
        prompts: the prompts.
        answers: of each prompt, the answers to it.
    """

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[Sequence[int]]]

    def batches(
        self, tokenizer: PreTrainedTokenizerBase, batch_size: int, device: torch.device
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Prompt number of each row, and a padded batch with `completion_mask`; all answers to a prompt are in one."""
        order = sorted(
            range(len(self.prompts)), key=lambda n: len(self.prompts[n]) + max(map(len, self.answers[n]))
        )
        together = max(1, batch_size // max(1, max(map(len, self.answers), default=1)))
        for numbers in batched(order, together):
            rows = [(number, answer) for number in numbers for answer in self.answers[number]]
            answered = [(self.prompts[number], answer) for number, answer in rows]
            for places, batch in answer_batches(tokenizer, answered, max(1, len(rows))):
                prompts = torch.tensor([rows[place][0] for place in places], device=device)
                yield prompts, {name: value.to(device) for name, value in batch.items()}


def mean_over_generations(
    ahead: Lookahead, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]
) -> tuple[Tensor, float]:
    """ā_f over given answers, read by the model as it is [d_sae], and the number of their tokens."""
    total = torch.zeros(ahead.dictionary.d_sae, dtype=torch.float64, device=ahead.dictionary.device)
    tokens = 0
    with torch.no_grad(), evaluation_mode(ahead.model):
        for _, batch in own_share(batches):
            states = ahead.states(batch)
            tokens += len(states.hidden)
            for part in states.parts(ahead.dictionary.tokens_at_once):
                total += part.activations(ahead.dictionary.encode).sum(0).double()
    sum_over_processes([total])
    (count,) = sum_of_numbers([tokens], total.device)
    return total / count, count


def predict_in_generations(
    ahead: Lookahead,
    batches: Iterator[tuple[Tensor, dict[str, Tensor]]],
    found: AnswerPlaces | None = None,
) -> dict[str, Tensor]:
    """Every prediction of the step's effect on the model's answers, by name: [d_sae] each.

    One pass with derivatives over the answers for each group of the step's examples, a prompt once for all of its answers; what it
    computes at the hook point on the way is what the features are read from.

    Args:
        ahead: the step.
        batches: of `Generations` of the model as it is; every process is given all of them.
        found: takes the places where this process's share of the answers shows the features, if they are wanted.

    Raises:
        AuditError: there are no answers.
    """
    directions, counts = ahead.directions()
    offset = ahead.update().offset
    parts: list[Mapping[str, Tensor]] = [*directions, *([_whole(ahead, offset)] if offset else [])]
    answers = [SampledTokens.of(prompts, batch) for prompts, batch in own_share(batches)]
    with torch.no_grad(), evaluation_mode(ahead.model):
        share_prompts(ahead, answers)
        for part in parts:
            line = ahead.jvp.line(part)
            for some in answers:
                some.change_along(ahead, line)
        total = sum_of_numbers([sum(some.tokens for some in answers)], ahead.dictionary.device)[0]
        if not total:
            raise AuditError("There are no sampled answers to look ahead with; give prompts to sample at.")
        increments = centre_by_place(answers, len(parts), ahead.dictionary.device)
        readings = Readings(ahead.dictionary, answers, found or AnswerPlaces(ahead.dictionary.d_sae))
        return Changes(ahead.dictionary, answers, increments, readings).predictions(counts)


def gradient_in_generations(ahead: Lookahead, feature: int, batches: Batches) -> Tensors:
    """∇_θ of a feature's mean activation in generations, by parameter: one backward pass over the answers."""
    baseline = _baseline_of(ahead, feature, batches())

    def surrogate(batch: Mapping[str, Tensor]) -> Tensor:
        predicted = batch["completion_mask"][:, 1:].bool()
        log_probs = ahead.gradients.log_probs(batch, predicted, batch["input_ids"][:, 1:][predicted])
        with torch.no_grad():
            # Σ_t a[t]·C_t = Σ_s log π(y_s)·Σ_{t≥s} a[t]
            activations = ahead.states(batch).activations(ahead.dictionary.encode)
            activation = activations[:, feature].double() - baseline.mean
            later = scatter(activation, predicted).flip(1).cumsum(1).flip(1)[predicted]
            later -= baseline.still_to_come[places_of(predicted)]
        return (log_probs(ahead.parameters) * later).sum()

    return ahead.gradient_of_sum(surrogate, (batch for _, batch in own_share(batches())), 1 / baseline.tokens)


@dataclass(frozen=True)
class _Baseline:
    """Of one feature: mean activation, tokens, and at each place the mean of what is still to come, less the mean [places]."""

    mean: Tensor
    tokens: float
    still_to_come: Tensor


@torch.no_grad()
def _baseline_of(
    ahead: Lookahead, feature: int, batches: Iterator[tuple[Tensor, dict[str, Tensor]]]
) -> _Baseline:
    device = ahead.dictionary.device
    answers = [SampledTokens.of(prompts, batch) for prompts, batch in own_share(batches)]
    sums = torch.zeros(2, longest_answer(answers), dtype=torch.float64, device=device)
    with evaluation_mode(ahead.model):
        for some in answers:
            values = ahead.states(some.batch).activations(ahead.dictionary.encode)[:, feature].double()
            sums.index_add_(1, some.places, torch.stack([values, torch.ones_like(values)]))
    sum_over_processes([sums])
    (activation, reached), (total, tokens) = sums, sums.sum(1)
    later = still_to_come((activation - total / tokens * reached)[:, None])[:, 0]
    return _Baseline(total / tokens, float(tokens), later / reached.clamp_min(1))


def _whole(ahead: Lookahead, offset: Tensors) -> ComputedTensors:
    parameters = ahead.parameters
    return ComputedTensors(
        parameters, lambda name: offset[name] if name in offset else torch.zeros_like(parameters[name])
    )
