"""One dictionary in one training run: from the gradient at its hook point to scores, rows and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import scores as formulas
from .dictionary import FeatureDictionary
from .errors import AuditError
from .health import Health, HealthTotals
from .hook_points import HookPoint
from .microbatch import Batch, blocks
from .step_buffer import StepBuffer, StepScores, StepSums, pack, unpack
from .tap import GradientTap
from .totals import FeatureTotals

Columns = dict[str, Any]

OFFLOADED_TOKENS = (
    "Token scores read the whole dictionary for every few tokens, and an offloaded one would go to the GPU each time: leave "
    "token_scores away, or do not offload."
)


class TokenSample:
    """Some tokens of the latest micro-batch, to see on them how well the dictionary fits.

    A token counts if a gradient reaches it and its predecessor: so padding does not, nor a row's first token,
    whose norm in many models is far from all others'.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None

    def __call__(self, gradient: Tensor, hidden: Tensor, loss_positions: Tensor | None) -> None:
        rows, length, width = hidden.shape
        index = torch.linspace(
            0, rows * length - 1, min(self.size, rows * length), device=hidden.device
        ).long()
        before = (index - 1).clamp(min=0)
        flat = gradient.reshape(-1, width)
        reached = (flat[index] != 0).any(-1) & (flat[before] != 0).any(-1) & (index % length > 0)
        self.hidden, self.weight = hidden.reshape(-1, width)[index], reached.float()

    def health(self, dictionary: FeatureDictionary) -> Health | None:
        """How the dictionary fits the sample; None before there is one."""
        if self.hidden is None:
            return None
        totals = HealthTotals(dictionary)
        totals.update(self.hidden, weight=self.weight)
        return totals.result()


class TokenObserver:
    """Token-level scores of one micro-batch, at its loss positions."""

    def __init__(self, dictionary: FeatureDictionary) -> None:
        self.dictionary = dictionary
        self.scores = formulas.TokenScores.zero(dictionary)

    def __call__(self, gradient: Tensor, hidden: Tensor, loss_positions: Tensor | None) -> None:
        if loss_positions is None:
            return
        g, h = gradient[loss_positions], hidden[loss_positions]
        self.scores.add(g.float(), h.float(), self.dictionary)

    def take(self) -> formulas.TokenScores:
        """Hand over the micro-batch's scores and begin anew."""
        taken, self.scores = self.scores, formulas.TokenScores.zero(self.dictionary)
        return taken


@dataclass
class Window:
    """Means over the optimizer steps since the last log."""

    steps: int
    norm: float
    coverage: float
    attribution: np.ndarray
    positive: np.ndarray
    negative: np.ndarray
    share: np.ndarray

    @classmethod
    def empty(cls, n_features: int) -> Window:
        return cls(0, 0.0, 0.0, *(np.zeros(n_features) for _ in range(4)))


class Channel:
    """A dictionary, its tap on the model, and what has been learned so far.

    Args:
        dictionary: on the model's device.
        point: its hook point in the model.
        watch: label → feature.
        top_k: features logged per step besides the watched ones.
        health_tokens: sample size for `TokenSample`; 0 for none.
        token_scores: also compute token share and activation attribution.
        totals: to go on from, when a run resumes.
    """

    def __init__(
        self,
        dictionary: FeatureDictionary,
        point: HookPoint,
        watch: dict[str, int],
        *,
        top_k: int,
        health_tokens: int,
        token_scores: bool,
        totals: FeatureTotals | None,
    ) -> None:
        if token_scores and dictionary.decoder.device.type != dictionary.device.type:
            raise AuditError(OFFLOADED_TOKENS)
        self.dictionary = dictionary
        self.point = point
        self.watch = watch
        self.totals = totals or FeatureTotals(dictionary.d_sae)
        self.buffer = StepBuffer()
        self._packed: list[StepSums] = []
        self.window = Window.empty(dictionary.d_sae)
        self.watched = torch.tensor(list(watch.values()), dtype=torch.long, device=dictionary.device)
        self.sample = TokenSample(health_tokens) if health_tokens and dictionary.encoder else None
        self.health: Health | None = None
        self._top_k = min(top_k, dictionary.d_sae)
        self._tokens = TokenObserver(dictionary) if token_scores else None
        observers = tuple(observer for observer in (self.sample, self._tokens) if observer is not None)
        self.tap = GradientTap(point, dictionary.d_model, observers, loss_positions=token_scores)

    def end_microbatch(self, batches: Sequence[Batch], *, sided: bool, paired: bool) -> None:
        """Take what the tap has collected, of what the trainer computed its loss on."""
        made = blocks(self.tap.close(), batches, sided=sided, paired=paired)
        for block in made:
            self.buffer.add(block.rows, block.sides, paired=block.paired)
        if made and self._tokens:
            self.buffer.add_tokens(self._tokens.take())

    def add_nothing(self) -> None:
        """A step in which no gradient arrived counts as zero."""
        self.buffer.add(
            torch.zeros(0, self.dictionary.d_model, device=self.dictionary.device), None, paired=False
        )
        if self._tokens:
            self.buffer.add_tokens(self._tokens.take())

    def pack(self) -> Tensor:
        """Take the buffered steps: what is to be summed over the processes, one row a step."""
        self._packed = self.buffer.take()
        return pack(self._packed, self.dictionary, token_scores=self._tokens is not None)

    def project(self, steps: Columns, packed: Tensor, *, keep_examples: bool) -> dict[str, list[Columns]]:
        """Score the steps taken by `pack`; update totals and window; give the rows of the record, by table.

        Args:
            steps: columns `step` and `global_step` of the steps, arrays [S].
            packed: what `pack` gave, summed over the processes.
            keep_examples: also give a row per example and watched feature of this process.
        """
        taken, self._packed = self._packed, []
        scores = unpack(packed, self.dictionary, token_scores=self._tokens is not None)
        cosine = formulas.cosine(scores.attribution, scores.gradient)
        share = formulas.share(cosine)
        top = scores.attribution.nan_to_num().abs().topk(self._top_k, dim=1).indices
        norm = torch.linalg.vector_norm(scores.gradient, dim=1)
        covered = formulas.coverage(scores.gradient, self.dictionary.rows(top))
        arrays = {
            "attribution": scores.attribution,
            "positive": scores.positive,
            "negative": scores.negative,
            "variance": scores.variance,
            "share": share,
        }
        dense = {name: value.cpu().numpy() for name, value in arrays.items()}
        extras = {}
        if scores.token_share is not None and scores.activation_attribution is not None:
            extras["token_share"] = scores.token_share.cpu().numpy()
            extras["activation_attribution"] = scores.activation_attribution.cpu().numpy()
        norms = norm.double().cpu().numpy()
        coverages = covered.double().cpu().numpy()
        finite = np.isfinite(norms) & np.isfinite(dense["positive"]).all(1)
        degrees = scores.counts[:, 0].cpu().numpy() - 1
        self.totals.update(**dense, degrees=degrees, extras=extras, finite=finite)
        self._update_window(dense, norms, coverages, finite)
        rows = {
            "steps": [self._step_rows(steps, dense, extras, cosine.cpu().numpy(), top.cpu().numpy(), finite)],
            "gradient": [self._gradient_rows(steps, scores, norms, coverages, finite)],
        }
        if keep_examples and self.watch:
            rows["examples"] = [
                self._example_rows(steps["step"][index], step.examples, step.example_sides)
                for index, step in enumerate(taken)
            ]
        return rows

    def measure_health(self) -> Columns | None:
        """How the dictionary fits the latest micro-batch's tokens, as a row without its step."""
        self.health = self.sample.health(self.dictionary) if self.sample else None
        if self.health is None:
            return None
        return {
            "dictionary": [self.dictionary.name],
            "fvu": [self.health.fvu],
            "token_fvu": [self.health.token_fvu],
            "l0": [self.health.l0],
            "tokens": [self.health.tokens],
        }

    def _update_window(
        self, dense: dict[str, np.ndarray], norms: np.ndarray, coverages: np.ndarray, finite: np.ndarray
    ) -> None:
        self.window.steps += int(finite.sum())
        self.window.norm += float(norms[finite].sum())
        self.window.coverage += float(coverages[finite].sum())
        for name in ("attribution", "positive", "negative", "share"):
            total = getattr(self.window, name)
            total += dense[name][finite].sum(0)

    def take_window(self) -> Window | None:
        """Means since the last call, None if there was no finite step."""
        window, self.window = self.window, Window.empty(self.dictionary.d_sae)
        if window.steps == 0:
            return None
        for name in ("attribution", "positive", "negative", "share"):
            mean = getattr(window, name)
            mean /= window.steps
        window.norm /= window.steps
        window.coverage /= window.steps
        return window

    def _step_rows(
        self,
        steps: Columns,
        dense: dict[str, np.ndarray],
        extras: dict[str, np.ndarray],
        cosine: np.ndarray,
        top: np.ndarray,
        finite: np.ndarray,
    ) -> Columns:
        labels = {feature: label for label, feature in self.watch.items()}
        watched = np.array(sorted(labels), dtype=np.int64)
        logged = [np.concatenate([watched, row[~np.isin(row, watched)]]) for row in top]
        index = np.repeat(np.arange(len(logged)), [len(row) for row in logged])
        index = index[finite[index]]
        feature = np.concatenate(
            [row for row, kept in zip(logged, finite, strict=True) if kept] or [watched[:0]]
        )

        def pick(values: np.ndarray) -> np.ndarray:
            return values[index, feature]

        columns = {
            "step": steps["step"][index],
            "global_step": steps["global_step"][index],
            "dictionary": [self.dictionary.name] * len(index),
            "feature": feature,
            "label": [labels.get(int(f), "") for f in feature],
            "attribution": pick(dense["attribution"]),
            "cosine": pick(cosine),
            "share": pick(dense["share"]),
            "lift": pick(dense["share"]) * self.dictionary.d_model,
            "standard_error": np.sqrt(pick(dense["variance"])),
            "chosen": pick(dense["positive"]),
            "rejected": pick(dense["negative"]),
        }
        return columns | {name: pick(values) for name, values in extras.items()}

    def _gradient_rows(
        self, steps: Columns, scores: StepScores, norms: np.ndarray, coverages: np.ndarray, finite: np.ndarray
    ) -> Columns:
        counts = scores.counts.cpu().numpy().astype(np.int64)
        return {
            "step": steps["step"],
            "global_step": steps["global_step"],
            "dictionary": [self.dictionary.name] * len(norms),
            "norm": norms,
            "examples": counts[:, 0],
            "chosen_rows": counts[:, 1],
            "rejected_rows": counts[:, 2],
            "coverage": coverages,
            "coverage_random": np.full(len(norms), min(1.0, self._top_k / self.dictionary.d_model)),
            "finite": finite,
        }

    def _example_rows(self, step: int, examples: Tensor, sides: Tensor | None) -> Columns:
        vectors = self.dictionary.rows(self.watched)
        values = -(examples.to(vectors) @ vectors.T).cpu().numpy()
        n, w = values.shape
        labels, features = list(self.watch), list(self.watch.values())
        return {
            "step": np.full(n * w, step),
            "example": np.repeat(np.arange(n), w),
            "dictionary": [self.dictionary.name] * (n * w),
            "feature": np.tile(features, n),
            "label": labels * n,
            "side": np.repeat(np.zeros(n) if sides is None else sides.cpu().numpy(), w).astype(np.int64),
            "attribution": values.reshape(-1),
        }
