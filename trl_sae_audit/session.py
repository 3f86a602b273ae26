"""One training run seen by the attribution callback, from its first to its last optimizer step."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import Trainer

from . import metrics, reporters
from .channel import Channel, Columns
from .checkpoint import CallbackState
from .continuation import Continuation
from .dictionary import FeatureDictionary
from .engines import check_engine, check_probe, gradient_divisor, whole_forward
from .errors import AuditError
from .hook_points import HookPoint
from .microbatch import Batch
from .preflight import as_probe, check_dictionary, model_name, resolve_watch
from .record import RunRecord
from .record_keeping import RecordKeeper
from .seams import Seams
from .totals import FeatureTotals
from .trainers import LAYOUTS, policy_of, trainer_kind

logger = logging.getLogger(__name__)

_MOST_BUFFERED_STEPS = 64
_MOST_BUFFERED_SCORES = 2**22  # of one kind; of the four kinds in float64 128 MiB


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user asked of the callback; see FeatureAttributionCallback for each field."""

    dictionaries: tuple[FeatureDictionary, ...]
    output_dir: Path | None
    watch: Mapping[str, Any]
    top_k: int
    log_top: int
    token_scores: bool
    examples: bool
    health_tokens: int
    probe: Any
    probe_steps: int
    flush_seconds: float


def record_directory(settings: Settings, trainer: Trainer) -> Path:
    """Where the run record goes."""
    return settings.output_dir or Path(trainer.args.output_dir) / "sae_audit"


class Session:
    """Listens to one trainer while it trains; everything it puts on model and trainer goes when it ends.

    Args:
        settings: the callback's.
        trainer: whose `train` is running.
        position: which of the trainer's attribution callbacks this is; names its part of a checkpoint.

    Raises:
        AuditError: before the first step, for whatever would make the scores wrong or lose them.
    """

    def __init__(self, settings: Settings, trainer: Trainer, position: int) -> None:
        self.settings = settings
        self.trainer = trainer
        self.step = 0
        self.global_steps: list[int] = []
        self.finished = False
        self.failed = False
        self._projected_step = 0
        self._health_step = 0
        self._baselines: dict[str, Tensor] = {}
        self._drift: dict[str, float] = {}
        self._divisor: float | None = None
        self._warned_of_missing_gradient = False
        check_engine(trainer)
        policy = policy_of(trainer)
        self.layout = LAYOUTS[trainer_kind(trainer)]
        points = [check_dictionary(dictionary, policy) for dictionary in settings.dictionaries]
        watch = resolve_watch(settings.watch, settings.dictionaries)
        widest = max(dictionary.d_sae for dictionary in settings.dictionaries)
        self._buffered_steps = min(_MOST_BUFFERED_STEPS, max(1, _MOST_BUFFERED_SCORES // widest))
        self._probe = as_probe(settings.probe, trainer)
        if self._probe is not None:
            check_probe(trainer.accelerator)
        output_dir = record_directory(settings, trainer)
        self._continuation = Continuation(trainer, output_dir, settings.dictionaries, position)
        state = self._continuation.load()
        if state:
            self.step = self._projected_step = state.step
            self._baselines = dict(state.baselines)
        self._keeper: RecordKeeper | None = None
        if trainer.accelerator.is_main_process:
            writer = self._continuation.open_record(self._header(points, watch), state)
            self._keeper = RecordKeeper(writer, settings.flush_seconds)
        self.channels: list[Channel] = []
        self._seams: Seams | None = None
        try:
            for dictionary, point in zip(settings.dictionaries, points, strict=True):
                self.channels.append(
                    Channel(
                        dictionary.to(trainer.accelerator.device),
                        point,
                        watch[dictionary.name],
                        top_k=settings.top_k,
                        health_tokens=settings.health_tokens,
                        token_scores=settings.token_scores,
                        totals=state.totals[dictionary.name] if state else None,
                    )
                )
            if state is None:
                self._measure_drift()
            elif self._keeper is not None and not self._continuation.is_saved:
                self._continuation.save(state)
            self._seams = Seams(trainer, self)
        except BaseException:
            self.abort()
            raise

    # What the trainer reports

    def begin_microbatch(self) -> None:
        if self._divisor is None:
            self._divisor = gradient_divisor(self.trainer.accelerator)
        for channel in self.channels:
            channel.tap.open()

    def end_microbatch(self, batches: list[Batch]) -> None:
        for channel in self.channels:
            channel.end_microbatch(batches, sided=self.layout.sides is not None, paired=self.layout.paired)

    def before_optimizer_step(self) -> None:
        """The gradient of this step is complete.

        Raises:
            AuditError: if none arrived at the very first step.
        """
        divisor, self._divisor = self._divisor or 1.0, None
        for channel in self.channels:
            if not channel.buffer.has_gradient:
                self._report_missing_gradient(channel)
            channel.buffer.finish_step(divisor)
        self.step += 1
        self.global_steps.append(self.trainer.state.global_step + 1)
        if len(self.global_steps) >= self._buffered_steps:
            self._project()

    def after_step(self) -> None:
        """An optimizer step was made: look at the probe if it is time."""
        if self._probe is not None and self.step % self.settings.probe_steps == 0:
            self._project()
            self._measure_drift()

    def enrich_log(self, logs: dict[str, Any]) -> None:
        """Add the window's means to a training log; evaluation logs and the final summary stay as they are."""
        if "train_runtime" in logs or all(name.startswith("eval_") for name in logs):
            return
        self._project()
        self._measure_health()
        self._record_log(logs)
        sides = self.layout.sides
        for channel in self.channels:
            prefix = "sae" if len(self.channels) == 1 else f"sae/{channel.dictionary.name}"
            logs.update(metrics.of_channel(channel, prefix, sides, self.settings.log_top))
            logs.update(metrics.of_drift(channel, prefix, self._drift))
        if self._keeper is not None and self._keeper.due:
            self._keeper.write(self.step, self._totals())

    def before_checkpoint(self) -> None:
        """Put the record on disk, with what a resumed run needs if this process dies before `after_checkpoint`."""
        self._project()
        if self._keeper is None:
            return
        self._continuation.discard()
        self._keeper.write(self.step, self._totals(), self._state().note(self.trainer.state.global_step))

    def after_checkpoint(self) -> None:
        """Put what a resumed run needs into the checkpoint that the trainer has made."""
        if self._keeper is not None:
            self._continuation.save(self._state())

    def before_train_end(self) -> None:
        """Show the top features on the trainer's dashboards, which close before this callback hears of the end."""
        self._project()
        callbacks = self.trainer.callback_handler.callbacks
        if self._keeper is None or not reporters.reports_tables(callbacks):
            return
        if self._keeper.write(self.step, self._totals()):
            record = RunRecord.load(self._keeper.directory)
            reporters.publish(callbacks, record, self.trainer.state.global_step)

    def finish(self) -> None:
        """Training ended well."""
        if self.step == 0:
            logger.warning(
                "Training ended and no optimizer step was seen: the record is empty. The trainer makes its steps in a loop of "
                "its own, or the callback was not told of on_pre_optimizer_step."
            )
        try:
            self._project()
            self._measure_health()
            if self._keeper is not None:
                self._keeper.close("finished", self.step, self._totals())
        finally:
            self._detach()

    def abort(self) -> None:
        """Training ended with an exception. No communication between processes: the others may be gone."""
        self.failed = True
        self._detach()
        if self._keeper is None:
            return
        if self._projected_step and len(self.channels) == len(self.settings.dictionaries):
            self._keeper.close("failed", self._projected_step, self._totals())
        else:
            self._keeper.close("failed")

    # Behind it

    def _detach(self) -> None:
        self.finished = True
        if self._seams is not None:
            self._seams.remove()
        for channel in self.channels:
            channel.tap.remove()

    def _report_missing_gradient(self, channel: Channel) -> None:
        message = (
            f"No gradient reached {channel.point.path!r} in optimizer step {self.step + 1}. Likely causes: all "
            "trainable parameters lie below the hook point or the loss does not depend on it; the model was compiled "
            "or called before the callback was attached; gradient checkpointing with use_reentrant=True over inputs "
            "that require no gradient; or the trainer runs a copy of the model. Choose a hook point below the "
            "trainable parameters, or look at the trainer's loss."
        )
        if self.step == 0:
            raise AuditError(message)
        if not self._warned_of_missing_gradient:
            self._warned_of_missing_gradient = True
            logger.warning("%s The step is recorded as zero.", message)
        channel.add_nothing()

    def _project(self) -> None:
        """Turn buffered steps into scores, on every process alike."""
        if not self.global_steps:
            return
        global_steps, self.global_steps = self.global_steps, []
        columns: Columns = {
            "step": np.arange(self.step - len(global_steps) + 1, self.step + 1),
            "global_step": np.array(global_steps),
        }
        examples: list[Columns] = []
        for channel, packed in zip(self.channels, self._summed_over_processes(), strict=True):
            tables = channel.project(columns, packed, keep_examples=self.settings.examples)
            examples += tables.pop("examples", [])
            for table, parts in tables.items():
                self._append(table, parts)
        if self.settings.examples:
            self._append("examples", self._of_all_processes(examples))
        self._projected_step = self.step

    def _append(self, table: str, parts: list[Columns]) -> None:
        if self._keeper is not None:
            for part in parts:
                self._keeper.append(table, part)

    def _summed_over_processes(self) -> Sequence[Tensor]:
        """What every channel is to project, by one sum over the processes."""
        packed = [channel.pack() for channel in self.channels]
        if self.trainer.accelerator.num_processes == 1:
            return packed
        widths = [part.shape[1] for part in packed]
        return self.trainer.accelerator.reduce(torch.cat(packed, dim=1), "sum").split(widths, dim=1)

    def _of_all_processes(self, parts: list[Columns]) -> list[Columns]:
        process = self.trainer.accelerator.process_index
        parts = [part | {"process": np.full(len(part["step"]), process)} for part in parts]
        return parts if self.trainer.accelerator.num_processes == 1 else gather_object(parts)

    def _record_log(self, logs: Mapping[str, Any]) -> None:
        """The trainer's own numbers, so that the record shows reward, penalty and loss beside the features."""
        numbers = {
            name: float(value)
            for name, value in logs.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if self._keeper is not None and numbers:
            self._keeper.append(
                "log",
                {
                    "step": [self.step] * len(numbers),
                    "global_step": [self.trainer.state.global_step] * len(numbers),
                    "name": list(numbers),
                    "value": list(numbers.values()),
                },
            )

    def _measure_health(self) -> None:
        if self._health_step == self.step:
            return
        self._health_step = self.step
        for channel in self.channels:
            row = channel.measure_health()
            if row is not None and self._keeper is not None:
                self._keeper.append("health", {"step": [self.step], **row})

    def _measure_drift(self) -> None:
        if self._probe is None:
            return
        forward = whole_forward(self.trainer)
        for channel in self.channels:
            if not channel.watch:
                continue
            name = channel.dictionary.name
            activation = self._probe.mean_activations(
                channel.point, channel.dictionary, channel.watched, forward
            ).cpu()
            drift = activation - self._baselines.setdefault(name, activation)
            for index, label in enumerate(channel.watch):
                self._drift[f"{name}/{label}"] = float(drift[index])
            if self._keeper is not None:
                self._keeper.append(
                    "drift",
                    {
                        "step": [self.step] * len(channel.watch),
                        "dictionary": [name] * len(channel.watch),
                        "feature": list(channel.watch.values()),
                        "label": list(channel.watch),
                        "activation": activation.tolist(),
                        "drift": drift.tolist(),
                    },
                )

    def _totals(self) -> dict[str, FeatureTotals]:
        return {channel.dictionary.name: channel.totals for channel in self.channels}

    def _state(self) -> CallbackState:
        return CallbackState(self.step, self._totals(), self._baselines)

    def _header(self, points: list[HookPoint], watch: dict[str, dict[str, int]]) -> dict[str, Any]:
        trainer = self.trainer
        return {
            "trainer": trainer_kind(trainer),
            "trainer_class": f"{type(trainer).__module__}.{type(trainer).__qualname__}",
            "model": model_name(policy_of(trainer)),
            "sides": list(self.layout.sides) if self.layout.sides else None,
            "processes": trainer.accelerator.num_processes,
            "dictionaries": [
                dataclasses.asdict(dictionary.info) | {"module": point.path}
                for dictionary, point in zip(self.settings.dictionaries, points, strict=True)
            ],
            "watch": watch,
            "settings": {
                name: getattr(self.settings, name)
                for name in ("top_k", "token_scores", "examples", "health_tokens", "probe_steps")
            },
            "arguments": json.loads(json.dumps(trainer.args.to_dict(), default=str)),
        }
