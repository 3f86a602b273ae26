"""What a trainer logs: which kind of log it is, and metrics that are to be in the next one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import Trainer

from .method_wraps import Method, MethodWraps

LogKind = Literal["training", "evaluation", "summary"]


def log_kind(logs: Mapping[str, Any]) -> LogKind:
    """What a trainer logs: means over steps, the results of an evaluation, or the sums at the end of training."""
    if all(name.startswith("eval_") for name in logs):
        return "evaluation"
    return "summary" if "train_runtime" in logs else "training"


class DeferredMetrics:
    """Collects metrics and adds their means to the trainer's next training log; then nothing is left on it.

    For reward models and callbacks, which trainers offer no way to log: `Trainer.log` copies its argument into the history
    and calls the reporters before any callback of the user's is told.
    """

    def __init__(self) -> None:
        self._collected: list[Mapping[str, float]] = []
        self._wraps: MethodWraps | None = None

    def add(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Note the metrics of one batch."""
        self._collected.append(dict(metrics))
        if self._wraps is None:
            self._wraps = MethodWraps()
            self._wraps.wrap(trainer, "log", self._log)

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
        if self._wraps is not None:
            self._wraps.undo()
            self._wraps = None


def _means(batches: list[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for batch in batches for name in batch)
    values = {name: [batch[name] for batch in batches if name in batch] for name in names}
    return {name: sum(several) / len(several) for name, several in values.items()}
