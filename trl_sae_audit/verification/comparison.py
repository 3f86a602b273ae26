"""Verify: do scores computed before training predict which features training changes?

Of each score, against the measured change `r_f` (see `measured_change`, `sampled_change`) over the features:

- `r2`: the share of the variance of r that the least-squares line with intercept through (score, r) explains,
  its slope held at 0 or above, `max(0, correlation)²`. A score's scale is arbitrary, its sign is not: one that says
  up where training goes down explains nothing.
- `spearman`: rank correlation ρ; the many small features count as much as the few large ones.
- `precision`: of the k features with the largest |score|, the share that are among the k with the largest |r|, with the
  same sign. Chance is about k / (2·features).
- `slope`: of the line. It means something for a score in units of activation: a lookahead times the number of steps
  has slope 1 if it is right.

Features active in none of the answers are omitted, since nothing could be predicted about them. Intervals come from drawing
prompts again: they hold for other prompts of this kind, for this dictionary and this one run. What another training seed
would give only several runs can tell, and features are no sample of anything. `ceiling` is the R² that a perfect score would
be expected to reach given how many prompts there are: the part of r's variance over features that is not sampling noise.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from ..audit.result import Audit
from ..errors import AuditError
from ..io.atomic import write_together
from ..io.manifest import MANIFEST, StoredFile, check_free, document
from ..record.reader import RunRecord
from ..statistics import Interval, centred_interval, resampling_counts
from .measured import MeasuredChange
from .samples import Samples

RANDOM = "random"
"""The name of the control that `verify` adds: a score drawn from the standard normal distribution."""
STATISTICS = {"r2": (0.0, 1.0), "spearman": (-1.0, 1.0), "precision": (0.0, 1.0), "slope": (-np.inf, np.inf)}
"""A statistic and its interval."""
_RECORDED = ("generation_drift", "selection", "attribution")
_AUDITED = (
    "attribution",
    "activation_attribution",
    "predicted_change",
    "predicted_change_in_generations",
    "predicted_frequency_change",
    "unrolled_change",
    "unrolled_change_in_generations",
    "selection",
    "disparity",
    "mean_activation_difference",
    "projection_difference",
)
TABLE = "verify.parquet"


@dataclass(frozen=True)
class Verification:
    """How well scores predicted one measured change.

    Attributes:
        kind: of the change, "on given text" or "in generations".
        units: prompts it was measured on.
        top_k: k of `precision`.
        ceiling: R² to expect of a perfect score.
        features: one row a feature that was active: feature, before, measured, standard_error, and every score.
        statistics: {score: {statistic: Interval}}.
    """

    kind: str
    units: int
    top_k: int
    ceiling: float
    features: pd.DataFrame
    statistics: dict[str, dict[str, Interval]]
    _replicates: dict[str, dict[str, np.ndarray]]

    @property
    def table(self) -> pd.DataFrame:
        """One row a score, the largest R² first: score, and for each statistic its value and `_low`, `_high`."""
        rows = []
        for name, statistics_of in self.statistics.items():
            row: dict[str, Any] = {"score": name}
            for statistic, interval in statistics_of.items():
                row |= {
                    statistic: interval.estimate,
                    f"{statistic}_low": interval.low,
                    f"{statistic}_high": interval.high,
                }
            rows.append(row)
        return pd.DataFrame(rows).sort_values("r2", ascending=False, kind="stable").reset_index(drop=True)

    @property
    def best(self) -> str:
        """The score with the largest R²."""
        return max(
            self.statistics, key=lambda name: np.nan_to_num(self.statistics[name]["r2"].estimate, nan=-1.0)
        )

    def lead(self, one: str, other: str, statistic: str = "r2") -> Interval:
        """By how much one score is ahead of another, on the same resamples."""
        estimate = self.statistics[one][statistic].estimate - self.statistics[other][statistic].estimate
        return centred_interval(
            estimate, self._replicates[one][statistic] - self._replicates[other][statistic]
        )

    def to_dict(self) -> dict[str, Any]:
        """What `verify.json` holds of it; what is undefined is null."""
        scores = {
            name: {
                key: [value if np.isfinite(value) else None for value in (each.estimate, each.low, each.high)]
                for key, each in statistics_of.items()
            }
            for name, statistics_of in self.statistics.items()
        }
        return {
            "kind": self.kind,
            "prompts": self.units,
            "features": len(self.features),
            "top_k": self.top_k,
            "ceiling": self.ceiling,
            "scores": scores,
        }


def verify(
    predictors: Mapping[str, ArrayLike],
    measured: MeasuredChange,
    *,
    top_k: int = 20,
    draws: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Verification:
    """Compare scores with the change that training made.

    Args:
        predictors: name → score of every feature [d_sae], computed before training (or from a run's record); a
            random control is added under the name "random".
        measured: from `measured_change` or `sampled_change`.
        top_k: k of the precision.
        draws: bootstrap resamples of the prompts.
        confidence: of the intervals.
        seed: of the resampling and the control.

    Raises:
        AuditError: a score of another length than the dictionary, or one that is not finite; models that do not differ.

    Example:

    ```python
    measured = sampled_change(model_before, model_after, tokenizer, dictionary, held_out_prompts)
    verify(predictors_of(Audit.load("runs/audit")), measured).table
    ```
    """
    counted = np.flatnonzero(measured.active)
    change = measured.change[counted].astype(np.float64)
    if not len(counted) or change.std() == 0:
        raise AuditError(
            "The two models give every feature the same mean activation, so there is no change to predict; check that they are "
            "the model before and the model after training."
        )
    scores = {name: _score(name, value, len(measured.change)) for name, value in predictors.items()}
    scores[RANDOM] = np.random.default_rng((seed, 1)).standard_normal(len(measured.change))
    names, matrix = list(scores), np.stack([score[counted] for score in scores.values()])
    top_k = min(top_k, len(counted))
    counts = resampling_counts(len(measured), draws, seed)
    observed = compare(matrix, change[None], top_k)
    replicates: dict[str, list[np.ndarray]] = {name: [] for name in STATISTICS}
    moments = np.zeros((2, len(counted)))
    width = max(1, 2**25 // max(1, len(counted)))
    for start in range(0, draws, width):
        again = measured.resampled(counts[start : start + width])[:, counted].astype(np.float64)
        deviation = again - change
        moments += [deviation.sum(0), np.square(deviation).sum(0)]
        for name, values in compare(matrix, again, top_k).items():
            replicates[name].append(values)
    joined = {name: np.concatenate(parts, axis=1) for name, parts in replicates.items()}
    variance = moments[1] / draws - np.square(moments[0] / draws)
    features = pd.DataFrame(
        {
            "feature": counted,
            "before": measured.before.mean()[counted],
            "measured": change,
            "standard_error": np.sqrt(variance),
            **{name: score[counted] for name, score in scores.items()},
        }
    )
    return Verification(
        kind=measured.kind,
        units=len(measured),
        top_k=top_k,
        ceiling=float(max(0.0, 1 - variance.mean() / change.var())),
        features=features,
        statistics={
            name: {
                key: centred_interval(float(observed[key][row, 0]), joined[key][row], confidence, bounds)
                for key, bounds in STATISTICS.items()
            }
            for row, name in enumerate(names)
        },
        _replicates={name: {key: joined[key][row] for key in STATISTICS} for row, name in enumerate(names)},
    )


def compare(scores: np.ndarray, measured: np.ndarray, top_k: int) -> dict[str, np.ndarray]:
    """Every statistic of scores [P, F] against several measured changes [D, F]: {statistic: [P, D]}; NaN for a constant."""
    correlation = _correlation(scores, measured)
    spread = measured.std(1)[None] / np.where(scores.std(1) > 0, scores.std(1), np.nan)[:, None]
    ours, theirs = _signed_top(scores, top_k), _signed_top(measured, top_k)
    return {
        "r2": np.square(np.maximum(correlation, 0)),
        "spearman": _correlation(rankdata(scores, axis=1), rankdata(measured, axis=1)),
        "precision": ((ours[:, None] == theirs[None]) & (ours[:, None] != 0)).sum(2) / top_k,
        "slope": correlation * spread,
    }


def predictors_of(source: Audit | RunRecord, dictionary: str | None = None) -> dict[str, np.ndarray]:
    """The scores of an audit, or of a run's record, as `verify` takes them: name → [d_sae].

    Of a record they are the drift in generations, selection and attribution over the run, as far as it has them; they were computed while
    training and so are no forecast.

    Args:
        source: the audit or record.
        dictionary: of a record that has several, which one.
    """
    table = source.features() if isinstance(source, Audit) else source.features(dictionary)
    table = table.set_index("feature").sort_index()
    names = _AUDITED if isinstance(source, Audit) else _RECORDED
    scores = {name: table[name].to_numpy(np.float64) for name in names if name in table}
    if isinstance(source, Audit):
        return scores
    return {name: score for name, score in scores.items() if np.isfinite(score).all()}


def save_verifications(
    verifications: list[Verification],
    directory: str | Path,
    config: Mapping[str, Any],
    samples: Samples | None = None,
) -> Path:
    """Write `manifest.json` (`config`, and each target's statistics) and `verify.parquet` (target, feature, measured, scores).

    Samples are three tables more, `rollouts.parquet`, `rollout_tokens.parquet` and `rollout_activations.parquet`.

    Raises:
        AuditError: the directory cannot be written, or holds something else.
    """
    target = Path(directory)
    if (target / MANIFEST).exists():
        check_free(target, "verification")
    tables = [each.features.assign(target=each.kind) for each in verifications]
    frames = {TABLE: pd.concat(tables, ignore_index=True)}
    body = {"config": dict(config), "targets": {each.kind: each.to_dict() for each in verifications}}
    if samples is not None:
        frames |= {f"{name}.parquet": pd.DataFrame(columns) for name, columns in samples.tables()}
        body["samples"] = {
            "dictionary": samples.dictionary,
            "identity": samples.identity,
            "features": list(samples.features),
        }
    files = {}
    for name, frame in frames.items():
        content = io.BytesIO()
        frame.to_parquet(content, index=False, write_page_checksum=True)
        files[name] = content.getvalue()
    manifest = document("verification", body, [StoredFile.of(name, part) for name, part in files.items()])
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_together({**{target / name: part for name, part in files.items()}, target / MANIFEST: manifest})
    except OSError as error:
        raise AuditError(
            f"The verification cannot be written to {target} ({error.strerror}); choose another output_dir."
        ) from error
    return target


def _score(name: str, values: ArrayLike, d_sae: int) -> np.ndarray:
    score = np.asarray(values, np.float64)
    if score.shape != (d_sae,):
        raise AuditError(
            f"The score {name!r} has shape {score.shape} but the dictionary has {d_sae} features; give one number a feature, "
            "in the order of the features."
        )
    if not np.isfinite(score).all():
        raise AuditError(f"The score {name!r} is not finite at feature {int(np.argmin(np.isfinite(score)))}.")
    if name == RANDOM:
        raise AuditError(f"The name {RANDOM!r} is the control's; give this score another.")
    return score


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of every row with every row: [P, F], [D, F] → [P, D]."""
    a, b = one - one.mean(1, keepdims=True), other - other.mean(1, keepdims=True)
    sizes = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(sizes > 0, a @ b.T / sizes, np.nan)


def _signed_top(values: np.ndarray, top_k: int) -> np.ndarray:
    """The sign of the k entries of each row that are largest in size, 0 elsewhere: [n, F] int8."""
    places = np.argpartition(-np.abs(values), top_k - 1, axis=1)[:, :top_k]
    signs = np.zeros(values.shape, np.int8)
    np.put_along_axis(signs, places, np.sign(np.take_along_axis(values, places, 1)).astype(np.int8), 1)
    return signs
