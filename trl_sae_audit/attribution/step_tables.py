"""What a run's optimizer steps leave in its record and log, from their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..saes.dictionary import FeatureDictionary
from . import scores as formulas
from .microbatch import RowGradients
from .packed_steps import StepScores
from .selection import selection_column

Columns = dict[str, Any]


@dataclass(frozen=True)
class ScoredSteps:
    """Scores of S consecutive optimizer steps, in the host's memory.

    Attributes:
        numbers: columns `step` and `global_step`, [S].
        dense: attribution, positive, negative, variance and share, [S, d_sae].
        extras: token share and activation attribution, if requested, [S, d_sae].
        cosine: [S, d_sae].
        selection: selection itself, positive, negative, variance, activation and frequency, [S, d_sae]; None if not computed.
        top: the features of largest |attribution|, [S, k].
        selected: those of largest |selection| in units of its standard error, [S, k]; [S, 0] without it.
        norm: ‖G‖, [S].
        coverage: the part of ‖G‖² that the top features span, [S].
        counts: the examples, and the rows of each side, [S, 3].
        finite: whether everything about the step is, [S].
    """

    numbers: Columns
    dense: dict[str, np.ndarray]
    extras: dict[str, np.ndarray]
    selection: dict[str, np.ndarray] | None
    cosine: np.ndarray
    top: np.ndarray
    selected: np.ndarray
    norm: np.ndarray
    coverage: np.ndarray
    counts: np.ndarray
    finite: np.ndarray

    @classmethod
    def of(
        cls, scores: StepScores, numbers: Columns, dictionary: FeatureDictionary, top_k: int
    ) -> ScoredSteps:
        cosine = formulas.cosine(scores.attribution, scores.gradient)
        top = scores.attribution.nan_to_num().abs().topk(top_k, dim=1).indices
        norm = torch.linalg.vector_norm(scores.gradient, dim=1).double().cpu().numpy()
        coverage = formulas.coverage(scores.gradient, dictionary.rows(top)).double().cpu().numpy()
        dense = {
            "attribution": scores.attribution,
            "positive": scores.positive,
            "negative": scores.negative,
            "variance": scores.variance,
            "share": formulas.share(cosine),
        }
        extras = {
            "token_share": scores.token_share,
            "activation_attribution": scores.activation_attribution,
        }
        arrays = {name: values.cpu().numpy() for name, values in dense.items()}
        selected = top[:, :0]
        if scores.selection is not None:
            size = standard_errors(scores.selection.selection, scores.selection.variance)
            selected = size.abs().topk(top_k, dim=1).indices
        return cls(
            numbers=numbers,
            dense=arrays,
            extras={name: values.cpu().numpy() for name, values in extras.items() if values is not None},
            selection=None
            if scores.selection is None
            else {name: values.cpu().numpy() for name, values in vars(scores.selection).items()},
            cosine=cosine.cpu().numpy(),
            top=top.cpu().numpy(),
            selected=selected.cpu().numpy(),
            norm=norm,
            coverage=coverage,
            counts=scores.counts.cpu().numpy(),
            finite=np.isfinite(norm) & np.isfinite(arrays["positive"]).all(1),
        )

    def feature_rows(self, dictionary: FeatureDictionary, watch: dict[str, int]) -> Columns:
        """A row for each step and feature that is watched or among the step's top, by selection or attribution."""
        labels = {feature: label for label, feature in watch.items()}
        watched = np.array(sorted(labels), dtype=np.int64)
        kept = np.flatnonzero(self.finite)
        top = np.concatenate([self.selected, self.top], axis=1)
        logged = [list(dict.fromkeys([*watched, *row])) for row in top[kept]]
        index = np.repeat(kept, [len(row) for row in logged])
        feature = np.concatenate([*logged, watched[:0]]).astype(np.int64)
        values = {name: array[index, feature] for name, array in self.dense.items()}
        return {
            "step": self.numbers["step"][index],
            "global_step": self.numbers["global_step"][index],
            "dictionary": [dictionary.name] * len(index),
            "feature": feature,
            "label": [labels.get(int(number), "") for number in feature],
            "attribution": values["attribution"],
            "cosine": self.cosine[index, feature],
            "share": values["share"],
            "lift": values["share"] * dictionary.d_model,
            "standard_error": np.sqrt(values["variance"]),
            "positive": values["positive"],
            "negative": values["negative"],
            **{name: array[index, feature] for name, array in self.extras.items()},
            **self._selection_columns(index, feature),
        }

    def _selection_columns(self, index: np.ndarray, feature: np.ndarray) -> Columns:
        if self.selection is None:
            return {}
        values = {name: array[index, feature] for name, array in self.selection.items()}
        values = {
            "score": values.pop("selection"),
            "standard_error": np.sqrt(values.pop("variance")),
            **values,
        }
        return {selection_column(name): column for name, column in values.items()}

    def gradient_rows(self, dictionary: FeatureDictionary) -> Columns:
        """A row for each step."""
        counts = self.counts.astype(np.int64)
        random = min(1.0, self.top.shape[1] / dictionary.d_model)
        return {
            **self.numbers,
            "dictionary": [dictionary.name] * len(counts),
            "norm": self.norm,
            "examples": counts[:, 0],
            "positive_rows": counts[:, 1],
            "negative_rows": counts[:, 2],
            "coverage": self.coverage,
            "coverage_random": np.full(len(counts), random),
            "finite": self.finite,
        }


def example_rows(
    step: int, gradients: RowGradients, dictionary: FeatureDictionary, watch: dict[str, int]
) -> Columns:
    """A row for each example that a step has on this process, and each watched feature."""
    vectors = dictionary.rows(list(watch.values()))
    values = -(gradients.examples.to(vectors) @ vectors.T).cpu().numpy()
    sides = np.zeros(len(values)) if gradients.sides is None else gradients.sides.cpu().numpy()
    n, w = values.shape
    return {
        "step": np.full(n * w, step),
        "example": np.repeat(np.arange(n), w),
        "dictionary": [dictionary.name] * (n * w),
        "feature": np.tile(list(watch.values()), n),
        "label": list(watch) * n,
        "side": np.repeat(sides, w).astype(np.int64),
        "attribution": values.reshape(-1),
    }


def standard_errors(selection: Tensor, variance: Tensor) -> Tensor:
    """Selection in units of its standard error; 0 where there is none."""
    return torch.where(variance > 0, selection / variance.sqrt(), 0.0).nan_to_num(0.0, 0.0, 0.0)


class Window:
    """Sums over the finite optimizer steps since the last log.

    Attributes:
        steps: how many.
        norm, coverage: of the steps' gradients.
        scores: attribution, positive, negative and share, [d_sae].
        selected_steps: steps whose selection was known.
        selection: of these, selection, variance, and the activation and frequency in the responses, [d_sae].
    """

    def __init__(self, n_features: int) -> None:
        self.steps = self.selected_steps = 0
        self.norm = self.coverage = 0.0
        self.scores = {
            name: np.zeros(n_features) for name in ("attribution", "positive", "negative", "share")
        }
        self.selection = {
            name: np.zeros(n_features) for name in ("selection", "variance", "activation", "frequency")
        }

    def add(self, scored: ScoredSteps) -> None:
        finite = scored.finite
        self.steps += int(finite.sum())
        self.norm += float(scored.norm[finite].sum())
        self.coverage += float(scored.coverage[finite].sum())
        for name, total in self.scores.items():
            total += scored.dense[name][finite].sum(0)
        if scored.selection is not None:
            known = finite & np.isfinite(scored.selection["selection"]).all(1)
            self.selected_steps += int(known.sum())
            for name, total in self.selection.items():
                total += scored.selection[name][known].sum(0)

    def selection_sizes(self) -> np.ndarray:
        """Selection in units of its standard error, up to a factor that all features have in common."""
        return np.divide(
            self.selection["selection"],
            np.sqrt(self.selection["variance"]),
            out=np.zeros_like(self.selection["variance"]),
            where=self.selection["variance"] > 0,
        )

    def average(self) -> None:
        """Turn the sums into means."""
        self.norm /= self.steps
        self.coverage /= self.steps
        for total in self.scores.values():
            total /= self.steps
        for total in self.selection.values():
            total /= self.selected_steps or np.nan
