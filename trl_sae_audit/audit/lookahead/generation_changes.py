"""What is made of sampled answers, and of how each part of a step changes their tokens' log-probabilities; see `generations`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from ...saes.dictionary import FeatureDictionary
from ...statistics import effect_unit, moderated_variance
from ..gradients import scatter
from .answer_places import AnswerPlaces
from .processes import sum_of_numbers, sum_over_processes
from .sampled_tokens import SampledTokens, longest_answer

_CONFIDENCE = 0.95


def still_to_come(of_places: Tensor) -> Tensor:
    """Sum over the places from each on: [places, F]."""
    return of_places.flip(0).cumsum(0).flip(0)


@dataclass(frozen=True)
class Increments:
    """How the parts of the step change the tokens' log-probabilities, less the mean of the place; batch by batch, m tokens each.

    Attributes:
        centred: of the whole step [m].
        so_far: their sum up to each token, of each part [parts, m].
        whole: their sum over each answer, of the whole step [rows].
        parts: how many.
    """

    centred: list[Tensor]
    so_far: list[Tensor]
    whole: list[Tensor]
    parts: int


def centre_by_place(answers: Sequence[SampledTokens], parts: int, device: torch.device) -> Increments:
    sums = torch.zeros(parts + 1, longest_answer(answers), dtype=torch.float64, device=device)
    for some in answers:
        ones = torch.ones(some.tokens, dtype=torch.float64, device=device)
        sums.index_add_(1, some.places, torch.stack([*some.changes, ones]))
    sum_over_processes([sums])
    means = sums[:-1] / sums[-1].clamp_min(1)
    centred, so_far, whole = [], [], []
    for some in answers:
        increments = torch.stack(some.changes) - means[:, some.places]
        table = torch.stack([scatter(each, some.predicted) for each in increments])
        centred.append(increments.sum(0))
        so_far.append(table.cumsum(2)[:, some.predicted])
        whole.append(table.sum((0, 2)))
    return Increments(centred, so_far, whole, parts)


class Readings:
    """What the features do in the answers as they are, over all processes.

    Args:
        dictionary: reads them.
        answers: this process's share.
        found: takes the places where features are most active in it.

    Attributes:
        tokens, answers, prompts: how many.
        mean, mean_root: of activations and of their roots over the tokens [d_sae].
        deviation: of the answers' own mean roots; NaN where there is none [d_sae].
        share: of the answers in which the feature is active [d_sae].
        still_to_come: the roots less their mean, from each place to the answer's end, mean over the answers that reach it
            [places, d_sae].
    """

    def __init__(
        self, dictionary: FeatureDictionary, answers: Sequence[SampledTokens], found: AnswerPlaces
    ) -> None:
        device, d_sae = dictionary.device, dictionary.d_sae
        longest = longest_answer(answers)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, d_sae, dtype=torch.float64, device=device)

        activation, active, of_answers, squares = zeros(4)
        at_places = zeros(longest)
        reached = torch.zeros(longest, dtype=torch.float64, device=device)
        for some in answers:
            rows = len(some.predicted)
            roots, seen = zeros(rows), torch.zeros(rows, d_sae, dtype=torch.bool, device=device)
            found.begin(some.batch)
            for here, values, root in some.encoded(dictionary):
                found.add(values, some.owners[here], some.places[here])
                activation += values.sum(0)
                at_places.index_add_(0, some.places[here], root)
                roots.index_add_(0, some.owners[here], root)
                places, features = (values != 0).nonzero(as_tuple=True)
                seen[some.owners[here][places], features] = True
            found.end()
            means = roots / some.predicted.sum(1, keepdim=True).clamp_min(1)
            of_answers += means.sum(0)
            squares += means.square().sum(0)
            active += seen.sum(0)
            reached += torch.bincount(some.places, minlength=longest)
        sum_over_processes([activation, active, of_answers, squares, at_places, reached])
        counted = [float(sum(len(some.predicted) for some in answers))]
        counted += [float(sum(len(some.prompts.unique()) for some in answers))]
        self.answers, self.prompts = sum_of_numbers(counted, device)
        self.tokens = float(reached.sum())
        self.mean, self.mean_root = activation / self.tokens, at_places.sum(0) / self.tokens
        self.share = active / self.answers
        variance = squares / self.answers - (of_answers / self.answers).square()
        # what rounding leaves of no spread is none
        known = variance > 1e-12 * squares / self.answers
        self.deviation = torch.where(known, variance, torch.nan).sqrt()
        later = still_to_come(at_places - self.mean_root * reached[:, None])
        self.still_to_come = later / reached[:, None].clamp_min(1)

    @property
    def unit(self) -> Tensor:
        """Of the effect size [d_sae]."""
        return torch.from_numpy(effect_unit(self.deviation.cpu().numpy())).to(self.deviation)


class Changes:
    """How the step changes what the features do in the answers, summed over all processes; memory does not depend on how many there
    are."""

    def __init__(
        self,
        dictionary: FeatureDictionary,
        answers: Sequence[SampledTokens],
        increments: Increments,
        readings: Readings,
    ) -> None:
        device, d_sae = dictionary.device, dictionary.d_sae

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, d_sae, dtype=torch.float64, device=device)

        self.readings = readings
        self.activation, self.active = zeros(2)
        self.roots = zeros(increments.parts)
        numbers = torch.zeros(2, dtype=torch.float64, device=device)
        place_count = len(readings.still_to_come)
        batches = zip(answers, increments.centred, increments.so_far, increments.whole, strict=True)
        influences = []
        for some, centred, so_far, whole in batches:
            rows, total = len(some.predicted), so_far.sum(0)
            seen = torch.zeros(rows, d_sae, dtype=torch.bool, device=device)
            numbers_of, prompt = some.prompts.unique(return_inverse=True)
            of_token, n = prompt[some.owners], len(numbers_of)
            weighted, plain = zeros(2, n)
            for here, values, root in some.encoded(dictionary):
                deviations = root - readings.mean_root
                self.activation += total[here] @ values
                self.roots += so_far[:, here] @ deviations
                weighted.index_add_(0, of_token[here], deviations * total[here][:, None])
                plain.index_add_(0, of_token[here], deviations)
                places, features = (values != 0).nonzero(as_tuple=True)
                seen[some.owners[here][places], features] = True
            self.active += whole @ seen.double()
            numbers += torch.stack([total.sum(), whole.sum()])
            shared = torch.zeros(n, place_count, dtype=torch.float64, device=device)
            shared.index_put_((of_token, some.places), centred, accumulate=True)
            influences.append(
                (
                    weighted - shared @ readings.still_to_come,
                    plain,
                    torch.bincount(of_token, minlength=n).double(),
                )
            )
        sum_over_processes([self.activation, self.active, self.roots, numbers])
        self.of_tokens, self.of_answers = numbers[0] / readings.tokens, numbers[1] / readings.answers
        self.root = self.roots.sum(0) / readings.tokens
        squares = zeros()
        for weighted, plain, lengths in influences:
            influence = weighted - self.of_tokens * plain - self.root * lengths[:, None]
            squares += influence.square().sum(0)
        sum_over_processes([squares])
        self.squares = squares

    def predictions(self, counts: Sequence[int]) -> dict[str, Tensor]:
        """By name, [d_sae] each."""
        readings = self.readings
        effect = self.root / readings.unit
        half = torch.from_numpy(
            half_width(
                self.prompt_error().cpu().numpy(),
                (self.roots[: len(counts)] / readings.tokens).cpu().numpy(),
                counts,
                readings.unit.cpu().numpy(),
            )
        ).to(effect)
        return {
            "generation_activation": readings.mean,
            "generation_frequency": readings.share,
            "predicted_change_in_generations": self.activation / readings.tokens
            - readings.mean * self.of_tokens,
            "predicted_frequency_change": self.active / readings.answers - readings.share * self.of_answers,
            "effect_size": effect,
            "effect_size_low": effect - half,
            "effect_size_high": effect + half,
        }

    def prompt_error(self) -> Tensor:
        """Standard error of the roots' change from the spread over prompts, of the ratio linearised: [d_sae]."""
        n = self.readings.prompts
        if n < 2:
            return torch.full_like(self.squares, torch.nan)
        return (self.squares * (n / (n - 1))).sqrt() / self.readings.tokens


def half_width(
    prompt_error: np.ndarray, parts: np.ndarray, counts: Sequence[int], deviation: np.ndarray
) -> np.ndarray:
    """Half of the effect size's interval: [d_sae]; NaN where there is no telling.

    Args:
        prompt_error: standard error of the change over prompts [d_sae].
        parts: change by each group of pairs [groups, d_sae].
        counts: pairs in each group.
        deviation: the unit of the effect size [d_sae].
    """
    sizes = np.array([count for count in counts if count], float)
    free = len(sizes) - 1
    if free < 1:
        return np.full(len(deviation), np.nan)
    given = np.array([count > 0 for count in counts])
    rate = parts[given].sum(0) / sizes.sum()
    spread = (np.square(parts[given] - sizes[:, None] * rate) / sizes[:, None]).sum(0) / free * sizes.sum()
    variance, degrees = moderated_variance(spread / np.square(deviation), free)
    level = (1 + _CONFIDENCE) / 2
    of_pairs = np.sqrt(variance) * (
        stats.t.ppf(level, degrees) if np.isfinite(degrees) else stats.norm.ppf(level)
    )
    return np.hypot(stats.norm.ppf(level) * prompt_error / deviation, of_pairs)
