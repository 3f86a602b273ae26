"""Guard rails: what a run logs is watched, and an alert raised, or the run stopped, when it goes wrong."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from accelerate.utils import broadcast_object_list
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from ..errors import AuditError
from ..metric_names import PENALTY_SHARE, is_fit_metric, parse_feature_metric
from ..statistics import mann_kendall
from ..trainers.kinds import calling_trainer, check_added_once, trainer_kind
from ..trainers.logs import DeferredMetrics, log_kind
from .dashboards import send_alert

logger = logging.getLogger(__name__)

Rule = Literal["trend", "penalty", "fit"]
RULES: tuple[Rule, ...] = get_args(Rule)

Trend = Literal["attribution", "score", "drift", "generation_drift"]
TRENDS: tuple[Trend, ...] = get_args(Trend)
"""Scores whose trend can be tested; the first two are by default. Drift adds up, so in a healthy run too it moves one way for long."""
_SMOOTHED = 3  # logs whose mean is compared with a limit: a single one is noise


@dataclass(frozen=True)
class Alert:
    """One rule broken.

    Attributes:
        rule: which.
        metric: the log's name of what broke it.
        global_step: of the trainer, when it did.
        value: of the metric, as compared.
        sentence: what it means and what to do.
    """

    rule: Rule
    metric: str
    global_step: int
    value: float
    sentence: str


@dataclass
class _Series:
    """What was logged under one name: the latest values, and the first few."""

    latest: deque[float]
    first: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        self.latest.append(value)
        if len(self.first) < _SMOOTHED:
            self.first.append(value)

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.latest)[-_SMOOTHED:]))


class TrainingStopped(AuditError):  # noqa: N818, it says what happened
    """PPO was stopped by a guard: the model is as it was after `alerts[-1].global_step` updates, and callbacks have ended."""

    def __init__(self, alerts: Sequence[Alert]) -> None:
        self.alerts = list(alerts)
        super().__init__(
            f"Training was stopped at step {alerts[-1].global_step} by a guard: {alerts[-1].sentence} The model is as it was "
            "then; catch TrainingStopped to continue with it."
        )


class GuardCallback(TrainerCallback):
    """Raises an alert when a watched feature trends up, a penalty dominates the reward, or the dictionary stops fitting.

    Reads the trainer's own log, so it works with every trainer, and on what FeatureAttributionCallback and shaped
    rewards write there:

    - trend: `sae/{label}/attribution` or `shaping/{label}/score` rises over the last `window` logs, by a
      one-sided Mann–Kendall test at `trend_p`, from `least_logs` logs on. The test is repeated at every log and logs are
      not independent, so `trend_p` is a threshold, not an error rate. `sae/{label}/drift` and `sae/{label}/generation_drift` are tested
      where `trends` names them: they add up over the steps, and alert in every healthy run (docs/shaping.md has the rates);
    - penalty: `shaping/penalty_share`, the spread of the penalty relative to the reward's, above `penalty_share` (mean of 3 logs);
    - fit: `sae/fvu`, the variance the dictionary leaves unexplained on the policy's own tokens, risen by `fvu_rise` since
      the run began (means of 3 logs).

    Each metric alerts once: as a warning, as an alert of trackio and of W&B where the trainer reports to them, in `alerts`, in the log
    entry itself (`guard/{rule}`: how many of that rule) and, for reporters, as `guard/alerts` in the next log. With `stop`, the first alert ends training. PPO, which has no
    way to be stopped, is left by raising TrainingStopped after the step, when the other callbacks' training has ended:

    ```python
    with contextlib.suppress(TrainingStopped):
        trainer.train()
    ```

    Args:
        watch: labels whose trend counts; all that are logged by default.
        trends: which scores' trend counts, of "attribution", "score", "drift" and "generation_drift".
        stop: rules whose alert ends training: True for all, or their names.
        trend_p: threshold of the trend test.
        least_logs: logs before a trend is tested.
        window: logs a trend is tested over.
        penalty_share: largest allowed; None for no limit.
        fvu_rise: largest allowed; None for no limit.

    Raises:
        AuditError: for an invalid value.
    """

    def __init__(
        self,
        *,
        watch: Sequence[str] | None = None,
        trends: Sequence[Trend] = TRENDS[:2],
        stop: bool | Sequence[Rule] = False,
        trend_p: float = 0.001,
        least_logs: int = 10,
        window: int = 100,
        penalty_share: float | None = 1.0,
        fvu_rise: float | None = 0.2,
    ) -> None:
        rules = (RULES if stop else ()) if isinstance(stop, bool) else tuple(stop)
        if isinstance(stop, str) or not set(rules) <= set(RULES):
            raise AuditError(f"stop is {stop!r}; give True, or a list of {', '.join(RULES)}.")
        if isinstance(trends, str) or not set(trends) <= set(TRENDS):
            raise AuditError(f"trends is {trends!r}; give a list of {', '.join(TRENDS)}.")
        if isinstance(watch, str):
            raise AuditError(f"watch is {watch!r}; give a list of labels.")
        if not 0 < trend_p < 1:
            raise AuditError(f"trend_p is {trend_p}; give a number between 0 and 1.")
        if least_logs < 4 or window < least_logs:
            raise AuditError(
                f"least_logs is {least_logs} and window {window}; give at least 4 logs, and a window of at least as many."
            )
        for name, limit in (("penalty_share", penalty_share), ("fvu_rise", fvu_rise)):
            if limit is not None and not limit > 0:
                raise AuditError(f"{name} is {limit}; give a number above 0, or None for no limit.")
        self.watch = None if watch is None else set(watch)
        self.trends = frozenset(trends)
        self.stop = frozenset(rules)
        self.trend_p = trend_p
        self.least_logs = least_logs
        self.window = window
        self.penalty_share = penalty_share
        self.fvu_rise = fvu_rise
        self._forget()

    def _forget(self) -> None:
        self.alerts: list[Alert] = []
        self._series: dict[str, _Series] = {}
        self._deferred = DeferredMetrics()
        self._stopping = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_added_once(self, calling_trainer(self))
        self._deferred.release()  # a run that was left by an exception made no log after its last alert
        self._forget()

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: Mapping[str, Any] = kwargs["logs"]
        if log_kind(logs) != "training":
            return
        trainer = calling_trainer(self)
        raised = self._from_main_process(list(self._check(logs, state.global_step)), trainer)
        if not raised:
            return
        self.alerts += raised
        for alert in raised:
            logger.warning("Guard: %s", alert.sentence)
            if trainer.is_world_process_zero():
                send_alert(
                    trainer.callback_handler.callbacks, f"{alert.rule}: {alert.metric}", alert.sentence
                )
            name = f"guard/{alert.rule}"
            if state.log_history:
                state.log_history[-1][name] = state.log_history[-1].get(name, 0.0) + 1.0
        self._deferred.add(trainer, {"guard/alerts": float(len(self.alerts))})
        if any(alert.rule in self.stop for alert in raised):
            self._stopping = True
            control.should_training_stop = True

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._stopping:
            return
        trainer = calling_trainer(self)
        if trainer_kind(trainer) != "PPOTrainer":
            control.should_training_stop = True
            return
        self._deferred.release()
        self._stopping = False
        trainer.callback_handler.on_train_end(args, state, control)
        raise TrainingStopped(self.alerts)

    def _check(self, logs: Mapping[str, Any], global_step: int) -> Iterator[Alert]:
        for metric, value in logs.items():
            rule = self._rule_of(metric)
            if rule is None or not isinstance(value, (int, float)) or not np.isfinite(value):
                continue
            series = self._series.setdefault(metric, _Series(deque(maxlen=self.window)))
            series.add(float(value))
            if any(alert.metric == metric for alert in self.alerts):
                continue
            broken = {"trend": self._trend, "penalty": self._penalty, "fit": self._fit}[rule](metric, series)
            if broken is not None:
                yield Alert(rule, metric, global_step, *broken)

    def _rule_of(self, metric: str) -> Rule | None:
        if metric == PENALTY_SHARE:
            return "penalty" if self.penalty_share is not None else None
        if is_fit_metric(metric):
            return "fit" if self.fvu_rise is not None else None
        feature = parse_feature_metric(metric)
        if feature is None or feature.score not in self.trends:
            return None
        is_watched = not feature.is_ranked if self.watch is None else feature.label in self.watch
        return "trend" if is_watched else None

    def _trend(self, metric: str, series: _Series) -> tuple[float, str] | None:
        values = series.latest
        if len(values) < self.least_logs:
            return None
        tau, p = mann_kendall(np.array(values)[:, None])
        if not (tau[0] > 0 and p[0] / 2 < self.trend_p):
            return None
        return values[-1], (
            f"{metric} has been rising over the last {len(values)} logs, from {values[0]:.3g} to {values[-1]:.3g} "
            f"(tau {tau[0]:.2f}): the run teaches this feature. Look at it, and shape or filter it."
        )

    def _penalty(self, metric: str, series: _Series) -> tuple[float, str] | None:
        assert self.penalty_share is not None
        if len(series.latest) < _SMOOTHED or series.mean <= self.penalty_share:
            return None
        return series.mean, (
            f"{metric} is {series.mean:.3g}, above {self.penalty_share:.3g}: the penalty differs more between responses than "
            "the reward does, which then teaches little. Lower the coefficient, or clip the penalty."
        )

    def _fit(self, metric: str, series: _Series) -> tuple[float, str] | None:
        assert self.fvu_rise is not None
        start = float(np.mean(series.first))
        if len(series.latest) < 2 * _SMOOTHED or series.mean - start <= self.fvu_rise:
            return None
        return series.mean, (
            f"{metric} has risen from {start:.3g} to {series.mean:.3g}: the dictionary no longer explains the policy's "
            "activations, and scores by it mean less than they did. Train or load a dictionary for the model as it is now."
        )

    def _from_main_process(self, alerts: list[Alert], trainer: Trainer) -> list[Alert]:
        """What the main process found, on all of them: they must stop together."""
        if trainer.accelerator.num_processes == 1:
            return alerts
        return broadcast_object_list([alerts], from_process=0)[0]
