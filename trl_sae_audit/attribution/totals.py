"""Running totals of every feature over a run: of attribution, and of selection where it is computed.

A ranking made from what happened to be in each step's top k is wrong for a feature that is always just below it;
these sums are exact for all features.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..errors import AuditError
from .curriculum import CurriculumMap
from .score_totals import ScoreTotals, check_arrays, raise_unknown
from .selection import selection_column

_SCORES = ("attribution", "selection")
_RESPONSES = ("activation", "frequency")
_ROLLOUTS = "rollouts"
"""What the names of the maps of rollouts begin with in a state."""
_SELECTION_COLUMNS = (
    "score", "standard_error", "z", "q_value", "positive", "negative", "trend", "trend_q_value", *_RESPONSES,
)  # fmt: skip


class FeatureTotals:
    """Totals of one dictionary's features over the optimizer steps of a run. Positive = up-weighted.

    Args:
        n_features: F = d_sae.
        max_bins: time bins of the maps.

    Attributes:
        scores: "attribution" and, if it is computed, "selection" → its totals. The steps whose selection was not known are
            its non-finite ones. Its extras are `activation` and `frequency`: the mean activation over the response tokens,
            and the share of them on which a feature is active.
        rollouts: maps over time of these extras, by name; empty where responses are not the model's own.
    """

    def __init__(self, n_features: int, max_bins: int = 64):
        self.n_features = n_features
        self.scores = {"attribution": ScoreTotals(n_features, max_bins)}
        self.rollouts: dict[str, CurriculumMap] = {}

    @property
    def attribution(self) -> ScoreTotals:
        """The totals of attribution."""
        return self.scores["attribution"]

    @property
    def steps(self) -> int:
        """Optimizer steps seen."""
        return self.attribution.steps

    def update(
        self,
        attribution: np.ndarray,
        positive: np.ndarray,
        negative: np.ndarray,
        variance: np.ndarray,
        share: np.ndarray,
        degrees: np.ndarray | None = None,
        extras: Mapping[str, np.ndarray] | None = None,
        finite: np.ndarray | None = None,
        selection: Mapping[str, np.ndarray] | None = None,
        on_policy: bool = False,
    ) -> None:
        """Add S consecutive optimizer steps.

        Args:
            attribution, positive, negative, variance, share, degrees, extras, finite: see `ScoreTotals.update`.
            selection: of the same steps, [S, F] each: selection, positive, negative, variance, activation and frequency.
                Pass it at every call or never.
            on_policy: keep maps over time of activation and frequency.

        Raises:
            AuditError: an array of another shape, or extras under other names than before.
        """
        if selection is not None:
            self._update_selection(selection, degrees, finite, on_policy)
        self.attribution.update(attribution, positive, negative, variance, share, degrees, extras, finite)

    def _update_selection(
        self,
        selection: Mapping[str, np.ndarray],
        degrees: np.ndarray | None,
        finite: np.ndarray | None,
        on_policy: bool,
    ) -> None:
        if "selection" not in self.scores:
            bins = self.attribution.curriculum.max_bins
            self.scores["selection"] = ScoreTotals(self.n_features, bins)
            names = _RESPONSES if on_policy else ()
            self.rollouts = {name: CurriculumMap(self.n_features, bins) for name in names}
        self.scores["selection"].update(
            selection["selection"],
            selection["positive"],
            selection["negative"],
            selection["variance"],
            share=np.broadcast_to(np.float32(0), selection["selection"].shape),
            degrees=degrees,
            extras={name: selection[name] for name in _RESPONSES},
            finite=finite,
        )
        for name, over_time in self.rollouts.items():
            for row in selection[name]:
                over_time.add(row) if np.isfinite(row).all() else over_time.skip()

    def state_dict(self) -> dict[str, np.ndarray]:
        """Everything, as arrays that share memory with this object: store or copy them before the next update."""
        state = {
            f"{score}.{name}": array
            for score, totals in self.scores.items()
            for name, array in totals.state_dict().items()
        }
        for name, over_time in self.rollouts.items():
            state[f"{_ROLLOUTS}.{name}.sums"] = over_time.sums
            state[f"{_ROLLOUTS}.{name}.counts"] = over_time.counts
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "FeatureTotals":
        """The totals that `state_dict` described, to the bit.

        Raises:
            AuditError: an array is missing, unknown, or of the wrong type or shape.
        """
        parts: dict[str, dict[str, np.ndarray]] = {"attribution": {}}
        for name, array in state.items():
            part, _, rest = name.partition(".")
            if part not in (*_SCORES, _ROLLOUTS):
                raise_unknown(name)
            parts.setdefault(part, {})[rest] = array
        rollouts = parts.pop(_ROLLOUTS, {})
        scores = {score: ScoreTotals.from_state(part) for score, part in parts.items()}
        attribution = scores["attribution"]
        totals = cls(attribution.n_features, attribution.curriculum.max_bins)
        totals.scores = scores
        for each in scores.values():
            if (each.n_features, each.steps) != (attribution.n_features, attribution.steps):
                raise AuditError(
                    "The selection in these totals covers other steps: they are damaged, so use another copy."
                )
        totals._load_rollouts(rollouts)
        return totals

    def _load_rollouts(self, state: Mapping[str, np.ndarray]) -> None:
        over_time = self.attribution.curriculum
        shapes: dict[str, tuple[type, tuple[int, ...]]] = {}
        for name in {each.rpartition(".")[0] for each in state}:
            shapes[f"{name}.sums"] = (np.float32, over_time.sums.shape)
            shapes[f"{name}.counts"] = (np.int64, over_time.counts.shape)
            if name not in _RESPONSES:
                raise_unknown(f"{_ROLLOUTS}.{name}")
        check_arrays(state, shapes)
        for name in (each for each in _RESPONSES if f"{each}.sums" in state):
            self.rollouts[name] = CurriculumMap(self.n_features, over_time.max_bins)
            self.rollouts[name].load(
                state[f"{name}.sums"], state[f"{name}.counts"], over_time.width, self.steps
            )

    def frame(self, d_model: int) -> pd.DataFrame:
        """One row per feature, in the order of the dictionary.

        attribution (sum over the run), attribution_mean (per step), standard_error (of the sum, `sqrt` of the
        steps' summed variances; steps of unknown variance are assumed to have the mean of the others), z, degrees_of_freedom
        (Satterthwaite's, `(Σv)² / Σ(v²/ν)`: few examples per step say little about their own spread), p_value (two-sided,
        Student's t), q_value (Benjamini–Hochberg over the features), share (mean over steps of the squared
        cosine; directions overlap, so shares do not add up over features), lift (`share · d_model`; 1 is what a
        random direction gets), positive_steps, negative_steps, positive and negative (attribution of the two sides),
        trend (least-squares slope of attribution, per step), trend_tau, trend_p_value and trend_q_value
        (Mann–Kendall over the means of the curriculum's bins), then the extras. If selection was computed, also selection
        (its sum), selection_standard_error, selection_z, selection_q_value, selection_positive and selection_negative (of the
        two sides), selection_trend, selection_trend_q_value, response_activation and response_frequency (the feature's mean
        activation over the response tokens, and the share of them on which it is active, means over the steps); NaN if
        selection was known in no step.

        The standard error treats every example of every step as an independent draw. Examples repeated in
        a later epoch are not, and neither are several completions of one prompt: with k passes over the data it is too
        small, by up to a factor `sqrt(k)`, and so are p_value and q_value. The trend test also treats bins as
        independent, which data sorted by difficulty or by source violates.

        Args:
            d_model: width of the residual stream.
        """
        frame = self.attribution.frame(d_model)
        frame = frame.rename(columns={"score": "attribution", "score_mean": "attribution_mean"})
        if "selection" not in self.scores:
            return frame
        selection = self.scores["selection"]
        columns = selection.frame(d_model)[list(_SELECTION_COLUMNS)].rename(columns=selection_column)
        return frame.join(columns if selection.finite_steps else columns * np.nan)
