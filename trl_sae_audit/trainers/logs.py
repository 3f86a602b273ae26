"""What a trainer logs: which kind of log it is, and metrics that are to be in the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import Trainer

from .method_wraps import Method, MethodWraps

LogKind = Literal["training", "evaluation", "summary"]


def log_kind(logs: Mapping[str, Any]) -> LogKind:
    """What a trainer logs: means over steps, the results of an evaluation, or the sums at the end of training.

    An evaluation is known by its time, under the prefix that all its results have: `evaluate(metric_key_prefix="test")`.
    """
    if "train_runtime" in logs:
        return "summary"
    prefixes = [name.removesuffix("runtime") for name in logs if name.endswith("_runtime")]
    of_evaluation = any(all(name.startswith(prefix) for name in logs) for prefix in ("eval_", *prefixes))
    return "evaluation" if of_evaluation else "training"


class DeferredMetrics:
    """Collects metrics and adds their means to the trainer's next training log; then nothing is left on it.

    For reward models and callbacks, which trainers offer no way to log: `Trainer.log` copies its argument into the history
    and calls the reporters before any callback of the user's is told.
    """

    def __init__(self) -> None:
        self._collected: list[Mapping[str, float]] = []
        self._trainer: Trainer | None = None
        self._wraps = MethodWraps()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, waits for no trainer's log."""
        return vars(DeferredMetrics())

    def add(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Note the metrics of one batch."""
        if trainer is not self._trainer:  # that one, if any, ended without a log
            self.release()
            self._collected, self._trainer = [], trainer
            self._wraps.wrap(trainer, "log", self._log)
        self._collected.append(dict(metrics))

    def _log(self, original: Method, /, logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kind = log_kind(logs)
        if kind != "evaluation":
            self.release()
            if kind == "training":
                logs.update(_means(self._collected))
            self._collected = []
        return original(logs, *args, **kwargs)

    def release(self) -> None:
        """Take the wrapper off the trainer without waiting for its log."""
        self._wraps.undo()
        self._trainer = None


def _means(batches: list[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for batch in batches for name in batch)
    values = {name: [batch[name] for batch in batches if name in batch] for name in names}
    return {name: sum(several) / len(several) for name, several in values.items()}
