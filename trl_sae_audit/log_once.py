"""Metrics for trainers that offer reward models no way to log: added to the next training log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer

from .method_wraps import MethodWraps


class NextLog:
    """Collects metrics and adds their means to the trainer's next training log; then nothing is left on it."""

    def __init__(self) -> None:
        self._collected: list[Mapping[str, float]] = []
        self._wraps: MethodWraps | None = None

    def add(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Note the metrics of one batch."""
        self._collected.append(dict(metrics))
        if self._wraps is None:
            self._wraps = MethodWraps()
            self._wraps.wrap(trainer, "log", self._log)

    def _log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def log(logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not all(name.startswith("eval_") for name in logs):
                self.release()
                if "train_runtime" not in logs:
                    logs.update(_means(self._collected))
                self._collected = []
            return original(logs, *args, **kwargs)

        return log

    def release(self) -> None:
        """Take the wrapper off the trainer without waiting for its log."""
        if self._wraps is not None:
            self._wraps.undo()
            self._wraps = None


def _means(batches: list[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for batch in batches for name in batch)
    values = {name: [batch[name] for batch in batches if name in batch] for name in names}
    return {name: sum(several) / len(several) for name, several in values.items()}
