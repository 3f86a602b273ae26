"""What a model generates now compared with the start, computed from answers that were sampled once at the start.

The answers `y` are the start model's. How often today's model would give them is known from their log-probabilities, so that
a mean over them, weighted, is one over today's answers. With `ρ_t = π_now(y_t | …) / π_start(y_t | …)` and `a_f[t]` the
activation of feature f at token t of an answer, as the start model reads it:

- A token counts `w_t = ρ_1 · … · ρ_t` times: the tokens before it decide whether it is ever reached, those after it do not
  matter (per-decision importance sampling, Precup et al. 2000). The product is a sum of increments,
  `w_t − 1 = Σ_{s≤t} δ_s` with `δ_s = w_{s−1} · (ρ_s − 1)`.
- Each increment has expectation 0 given the tokens before it. So its mean over the answers at the same place, which only noise
  makes differ from 0, is taken off: `v_t = Σ_{s≤t} (δ_s − δ̄_s)`. That equals a baseline, the mean of what is still to come,
  in a policy gradient, and is what makes the estimate precise: see docs/scores.md.
- `w_{s−1}` and `ρ_s` are held within e^±1.5 each; without that, a few answers are all that counts after some training.

The mean activation now is `Σ_t (1 + v_t) · a_f[t] / Σ_t (1 + v_t)`, its drift that less the mean at the start. How much a token
counts does not depend on the feature, so one sparse product serves all of them.

Far from the start the answers say little, see `LEAST_NEAR`. Then today's model is asked again, and `measure_drift` compares what it
gives with the answers of the start, one model reading both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from ..statistics import resampling_counts

CLIP = 1.5
"""Largest |log| of what the tokens before count, and of one token's own ratio."""
LEAST_EFFECTIVE, LEAST_COVERED = 0.2, 0.8
"""Least share of effective answers, and least share of today's answers that are covered, at which a drift is trusted."""
LEAST_NEAR = 0.5
"""Least share of effective answers at which weighted answers say more than as many that today's model is asked for: n answers worth a share
e have a variance of 1/(e·n), and the difference of two means of n answers has 2/n."""
DRAWS = 400
CONFIDENCE = 0.95
_COLUMNS = 4096
"""Features whose bootstrap replicates are in memory at a time."""
_NONE = np.empty(0, np.int64)


@dataclass(frozen=True)
class AnswerLayout:
    """Whose the tokens are, when answers follow each other.

    Attributes:
        prompts: which prompt each answer is to, from 0 [answers].
        lengths: tokens of each answer [answers], none 0.
    """

    prompts: np.ndarray
    lengths: np.ndarray

    @property
    def n_tokens(self) -> int:
        return int(self.lengths.sum())

    @property
    def n_prompts(self) -> int:
        return int(self.prompts.max()) + 1

    @cached_property
    def answer(self) -> np.ndarray:
        """Of each token [tokens]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each answer [answers]."""
        return np.cumsum(self.lengths) - self.lengths

    @cached_property
    def place(self) -> np.ndarray:
        """Of each token in its answer, from 0 [tokens]."""
        return np.arange(self.n_tokens) - self.starts[self.answer]

    @cached_property
    def reached(self) -> np.ndarray:
        """How many answers have a token at each place [places]."""
        return np.bincount(self.place)

    @cached_property
    def at_place(self) -> sparse.csr_array:
        """1 where a token has a place [places, tokens]."""
        return _spread(np.ones(self.n_tokens), self.place)

    @cached_property
    def by_place(self) -> np.ndarray:
        """The tokens in the order of their places [tokens]."""
        return np.argsort(self.place, kind="stable")

    @cached_property
    def place_starts(self) -> np.ndarray:
        """Where in `by_place` each place begins [places]."""
        return np.cumsum(self.reached) - self.reached

    def by_prompt(self, values: np.ndarray) -> sparse.csr_array:
        """Each token's value in the row of its prompt [prompts, tokens]."""
        return _spread(values, self.prompts[self.answer])

    def running_sums(self, values: np.ndarray) -> np.ndarray:
        """Sum over the tokens of an answer up to each, itself included [tokens]."""
        sums = np.cumsum(values)
        return sums - (sums - values)[self.starts][self.answer]

    def before(self, values: np.ndarray, first: float) -> np.ndarray:
        """The value of the token before; `first` where an answer begins [tokens]."""
        shifted = np.roll(values, 1)
        shifted[self.starts] = first
        return shifted


def _spread(values: np.ndarray, rows: np.ndarray) -> sparse.csr_array:
    return sparse.csr_array((values, (rows, np.arange(len(rows)))))


@dataclass(frozen=True)
class AnswerActivations:
    """What one dictionary's features read in the answers, of those that are active anywhere in them.

    Takes 12 bytes for each active feature of a token.

    Attributes:
        features: which, rising [k].
        values: [k, tokens], sparse.
    """

    features: np.ndarray
    values: sparse.csr_array

    @classmethod
    def from_tokens(cls, counts: np.ndarray, features: np.ndarray, values: np.ndarray) -> AnswerActivations:
        """From the active features, token by token.

        Args:
            counts: how many are active at each token [tokens].
            features: which [n]. values: their activations [n].
        """
        known, rows = np.unique(features, return_inverse=True)
        tokens = np.repeat(np.arange(len(counts)), counts)
        matrix = sparse.csr_array((values, (rows, tokens)), shape=(len(known), len(counts)))
        return cls(known, matrix)

    def moments(self, layout: AnswerLayout) -> tuple[np.ndarray, np.ndarray]:
        """Mean activation over the tokens, and standard deviation over the answers of their own means: each [k]."""
        of_answer = _spread(1 / layout.lengths[layout.answer], layout.answer)
        means = self.values @ of_answer.T
        squares = means.multiply(means).sum(1) / len(layout.lengths)
        variance = squares - (means.sum(1) / len(layout.lengths)) ** 2
        return self.values.sum(1) / layout.n_tokens, np.sqrt(np.maximum(variance, 0.0))


@dataclass(frozen=True)
class TokenWeights:
    """How much more each token counts now than at the start.

    Attributes:
        excess: `v_t`, 0 where nothing changed [tokens].
        shared: what is taken off a prompt's sum for the baseline, for each activation summed over a place [prompts, places].
    """

    excess: np.ndarray
    shared: np.ndarray


def weigh_tokens(log_ratios: np.ndarray, layout: AnswerLayout, clip: float = CLIP) -> TokenWeights:
    """The weights of the module's first lines.

    Args:
        log_ratios: `log π_now(y_t) − log π_start(y_t)` [tokens].
        layout: of the answers.
        clip: as CLIP; infinite for none.
    """
    log_ratios = np.asarray(log_ratios, np.float64)
    so_far = layout.running_sums(log_ratios)
    before = np.exp(np.clip(layout.before(so_far, 0.0), -clip, clip))
    increments = before * np.expm1(np.clip(log_ratios, -clip, clip))
    centred = increments - (layout.at_place @ increments / layout.reached)[layout.place]
    per_prompt = layout.by_prompt(centred) @ layout.at_place.T
    return TokenWeights(
        layout.running_sums(centred), np.cumsum(per_prompt.toarray() / layout.reached, axis=1)
    )


def effective_answers(log_ratios: np.ndarray, layout: AnswerLayout) -> float:
    """How many of today's answers the sampled ones are worth: Kish's `(Σ w_t)² / Σ w_t²` at each place, averaged over the tokens.

    The `w_t` are those before anything is held back, so that it falls as the models part, whatever the estimate does about it.
    At a place that not all answers reach it counts for as large a share of all answers as it is of those that do.
    """
    logs = layout.running_sums(np.asarray(log_ratios, np.float64))
    weights = np.exp(logs - np.maximum.reduceat(logs[layout.by_place], layout.place_starts)[layout.place])
    kish = (layout.at_place @ weights) ** 2 / (layout.at_place @ weights**2)
    return float(kish.sum() / layout.n_tokens * len(layout.lengths))


def covered_share(log_ratios: np.ndarray, layout: AnswerLayout) -> float:
    """Which share of today's answers are of a kind that was sampled: the mean of `π_now(y) / π_start(y)` over whole answers.

    It is 1, up to noise, in expectation. What the start model hardly ever gives, and today's does, is not among the answers, and
    what it takes from the others is then missing here.
    """
    return float(np.exp(np.add.reduceat(np.asarray(log_ratios, np.float64), layout.starts)).mean())


@dataclass(frozen=True)
class Drift:
    """How far the mean activation of some features has moved in what the model generates, with a 95 % interval over prompts."""

    features: np.ndarray
    change: np.ndarray
    low: np.ndarray
    high: np.ndarray


def estimate_drift(
    activations: AnswerActivations, layout: AnswerLayout, weights: TokenWeights, *, seed: int = 0
) -> Drift:
    """Of all features that are active in the answers; of the others the answers say nothing.

    The interval is a percentile bootstrap's over prompts, in which the baseline stays as it is: that changes it in second order.
    """
    once, counts = _draws(layout, seed)
    start, moved = (layout.by_prompt(values).T for values in (np.ones(layout.n_tokens), weights.excess))
    tokens = start.sum(0)
    tokens_now = tokens + moved.sum(0) - weights.shared @ layout.reached
    parts = [np.empty((3, 0))]
    for first in range(0, len(activations.features), _COLUMNS):
        values = activations.values[first : first + _COLUMNS]
        before = (values @ start).toarray()
        now = before + (values @ moved).toarray() - (values @ layout.at_place.T).toarray() @ weights.shared.T
        changes = [
            (now @ taken) / (tokens_now @ taken) - (before @ taken) / (tokens @ taken)
            for taken in (once, counts)
        ]
        parts.append(_with_interval(*changes))
    return Drift(activations.features, *np.concatenate(parts, axis=1))


def measure_drift(
    before: tuple[AnswerActivations, AnswerLayout],
    now: tuple[AnswerActivations, AnswerLayout],
    *,
    known: np.ndarray = _NONE,
    seed: int = 0,
) -> Drift:
    """From answers that today's model was asked for, of all features that are active in either: mean activation less that before.

    Args:
        before, now: what one model reads in the answers of the start and in today's, and their layout, to the same prompts.
        known: features to include though neither shows them, with a drift of 0.
        seed: of the bootstrap over prompts.
    """
    features = np.unique(np.concatenate([known, before[0].features, now[0].features]))
    draws = _draws(before[1], seed)
    sides = []
    for activations, layout in (now, before):
        ones = layout.by_prompt(np.ones(layout.n_tokens)).T
        sides.append((activations, ones, [ones.sum(0) @ taken for taken in draws]))
    parts = [np.empty((3, 0))]
    for first in range(0, len(features), _COLUMNS):
        some = features[first : first + _COLUMNS]
        means = []
        for activations, ones, tokens in sides:
            sums = np.zeros((len(some), ones.shape[1]))
            sums[np.isin(some, activations.features)] = (
                activations.values[np.isin(activations.features, some)] @ ones
            ).toarray()
            means.append([(sums @ taken) / each for taken, each in zip(draws, tokens, strict=True)])
        parts.append(_with_interval(*(after - start for after, start in zip(*means, strict=True))))
    return Drift(features, *np.concatenate(parts, axis=1))


def _draws(layout: AnswerLayout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each prompt is taken: once, and in every bootstrap sample: [prompts, 1] and [prompts, DRAWS]."""
    counts = resampling_counts(layout.n_prompts, DRAWS, seed).T.astype(np.float64)
    return np.ones((layout.n_prompts, 1)), counts


def _with_interval(change: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """[3, features]: a change [features, 1], and the ends of its interval by those of the samples [features, DRAWS]."""
    ends = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=1)
    return np.stack([change[:, 0], *ends])
