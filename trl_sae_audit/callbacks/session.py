"""One training run seen by the attribution callback, from its first to its last optimizer step."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer

from ..attribution.feature_tracker import FeatureTracker
from ..attribution.microbatch import Batch
from ..attribution.packed_steps import PackedSteps
from ..attribution.responses import Responses
from ..attribution.step_tables import Columns
from ..attribution.totals import FeatureTotals
from ..errors import AuditError
from ..metric_names import sae_prefix
from ..models.sampling import Sampling
from ..models.weight_sample import sample_weights
from ..record.checkpoint import CallbackState
from ..record.columns import WEIGHTS
from ..record.contexts import CONTEXTS, WORDS, words_table
from ..record.reader import RunRecord
from ..record.resilient_writer import ResilientWriter
from ..saes.compatibility import check_dictionary
from ..saes.fit import POOR_FVU
from ..trainers.engines import check_engine, check_probe, whole_forward
from ..trainers.hooks import TrainerHooks
from ..trainers.kinds import LAYOUTS, policy_of, trainer_kind
from ..trainers.lifecycle import TrainerListener
from ..trainers.logs import log_kind
from . import dashboards as reporters
from . import metrics
from .config import AttributionConfig, record_directory
from .contexts import ContextWriter
from .generations import GenerationDrift, check_generations, spreads_parameters
from .probe import ProbeDrift
from .record_rows import log_rows, record_header
from .resume import ResumeState
from .rollouts import RolloutKeeper
from .sampled_answers import SampledAnswers
from .selection import make_selection, make_token_scores
from .token_budget import with_token_budget
from .watch import as_probe, resolve_watch

logger = logging.getLogger(__name__)

_MOST_BUFFERED_STEPS = 10
"""A number of steps and not of seconds: where steps are projected decides the last bits of the totals, and a resumed run must have the same."""
_MOST_BUFFERED_SCORES = 2**22  # of one kind; of the four kinds in float64 128 MiB
_MOST_BUFFERED_SELECTIONS = 2**21  # the same of the seven kinds that selection adds: 112 MiB


class AttributionSession(TrainerListener):
    """Listens to one trainer while it trains; everything it puts on model and trainer goes when it ends.

    Args:
        config: the callback's.
        trainer: whose `train` is running.
        position: which of the trainer's attribution callbacks this is; names its part of a checkpoint.

    Raises:
        AuditError: before the first step, for whatever would make the scores wrong or lose them.
    """

    def __init__(self, config: AttributionConfig, trainer: Trainer, position: int) -> None:
        self.config = config = with_token_budget(config, trainer)
        self.trainer = trainer
        self.step = 0
        self.global_steps: list[int] = []
        self.finished = False
        self._projected_step = 0
        self._health_step = 0
        self._warned_of_missing_gradient = False
        self._warned_of_fit: set[str] = set()
        check_engine(trainer)
        policy = policy_of(trainer)
        self.layout = LAYOUTS[trainer_kind(trainer)]
        if trainer_kind(trainer) == "Trainer" and type(trainer) is not Trainer:
            logger.warning(
                "%s is read without sides: which of its rows are chosen and which rejected is not known, so examples are rows.",
                type(trainer).__name__,
            )
        points = [check_dictionary(dictionary, policy) for dictionary in config.dictionaries]
        watch = resolve_watch(config.watch or {}, config.dictionaries)
        widest = max(dictionary.d_sae for dictionary in config.dictionaries)
        most = _MOST_BUFFERED_SELECTIONS if config.selection else _MOST_BUFFERED_SCORES
        self._buffered_steps = min(_MOST_BUFFERED_STEPS, max(1, most // widest))
        probe = as_probe(config.probe, trainer)
        self._probe = None if probe is None else ProbeDrift(probe, attention_sinks=config.attention_sinks)
        if probe is not None:
            check_probe(trainer.accelerator)
        if config.generations is not None:
            check_generations(trainer)
        output_dir = record_directory(config, trainer)
        self._resume = ResumeState(trainer, output_dir, config.dictionaries, position, config.overwrite)
        state = self._resume.load()
        if state:
            self.step = self._projected_step = state.step
            if self._probe is not None:
                self._probe.baselines = dict(state.baselines)
        self._writer: ResilientWriter | None = None
        if trainer.accelerator.is_main_process:
            writer = self._resume.open_record(record_header(config, trainer, points, watch), state)
            self._writer = ResilientWriter(writer, config.flush_seconds)
        self.trackers: list[FeatureTracker] = []
        self._generations: GenerationDrift | None = None
        self._hooks: TrainerHooks | None = None
        try:
            for original, point in zip(config.dictionaries, points, strict=True):
                dictionary = original.to(trainer.accelerator.device)
                self.trackers.append(
                    FeatureTracker(
                        dictionary,
                        point,
                        watch[dictionary.name],
                        sided=self.layout.sides is not None,
                        paired=self.layout.paired,
                        top_k=config.top_k,
                        health_tokens=config.health_tokens,
                        token_scores=make_token_scores(config, trainer, dictionary),
                        examples=config.examples,
                        selection=make_selection(config, trainer, dictionary, point),
                        on_policy=self.layout.on_policy,
                        totals=state.totals[dictionary.name] if state else None,
                    )
                )
            append = None if self._writer is None else self._writer.append
            pair = self.layout.sides if self.layout.paired else None
            self._contexts = ContextWriter(trainer, self.trackers, append, pair)
            self._rollouts = self._start_rollouts()
            if config.generations is not None:
                self._generations = self._start_generations(config.generations, resumed=state is not None)
            if state is None:
                self._measure_drift()
            elif self._writer is not None and not self._resume.is_saved:
                self._resume.save(state)
            self._hooks = TrainerHooks(trainer, self)
            if any(tracker.selects for tracker in self.trackers):
                self._hooks.report_responses(self._add_responses)
        except BaseException:
            self.abort()
            raise

    @property
    def record_directory(self) -> Path | None:
        """Where this run's record is; None on the processes that do not write it."""
        return None if self._writer is None else self._writer.directory

    # What the trainer reports

    def begin_microbatch(self) -> None:
        for tracker in self.trackers:
            tracker.begin_microbatch()

    def end_microbatch(self, batches: list[Batch]) -> None:
        for tracker in self.trackers:
            tracker.end_microbatch(batches)

    def before_optimizer_step(self) -> None:
        """The gradient of this step is complete.

        Raises:
            AuditError: if none arrived at the very first step.
        """
        assert self._hooks is not None
        divisor = self._hooks.take_divisor()
        for tracker in self.trackers:
            if not tracker.end_step(divisor):
                self._report_missing_gradient(tracker)
        self.step += 1
        self.global_steps.append(self.trainer.state.global_step + 1)
        if len(self.global_steps) >= self._buffered_steps:
            self._project()

    def after_step(self) -> None:
        """An optimizer step was made: look at the probe and at the answers if it is time."""
        if self._probe is not None and self.step % self.config.probe_steps == 0:
            self._project()
            self._measure_drift()
        state = self.trainer.state
        last = state.global_step >= state.max_steps
        if self._generations is not None and (self._generations.due(self.step) or last):
            self._look_at_generations(last=last)

    def enrich_log(self, logs: dict[str, Any]) -> None:
        """Add the window's means to a training log; evaluation logs and the final summary stay as they are."""
        if log_kind(logs) != "training":
            return
        self._project()
        self._measure_health()
        if self._writer is not None:  # so that the record shows reward, penalty and loss beside the features
            for rows in log_rows(logs, self.step, self.trainer.state.global_step):
                self._writer.append("log", rows)
        if self._contexts.on_log(self.step) and self._rollouts is not None:
            self._rollouts.write(self.step)
        sides = self.layout.sides
        look = None if self._generations is None else self._generations.take_look()
        for tracker in self.trackers:
            prefix = sae_prefix(tracker.dictionary.name, is_only=len(self.trackers) == 1)
            logs.update(metrics.of_tracker(tracker, prefix, sides, self.config.log_top))
            logs.update(metrics.of_drift(tracker, prefix, self._probe.latest if self._probe else {}))
            logs.update(metrics.of_generations(tracker, prefix, look))
        self._write_if_due()

    def before_checkpoint(self, directory: Path) -> None:
        """Put the record on disk, with what a resumed run needs if this process dies before `after_checkpoint`."""
        self._project()
        self._contexts.write(self.step)
        if self._writer is None:
            return
        self._resume.discard(directory)
        self._writer.write(self.step, self._totals(), self._state().note(self.trainer.state.global_step))

    def after_checkpoint(self, directory: Path) -> None:
        """Put what a resumed run needs into the checkpoint that the trainer has made."""
        if self._writer is not None:
            self._resume.save(self._state(), directory)

    def before_train_end(self) -> None:
        """Show the top features on the trainer's dashboards, which close before this callback is told of the end."""
        self._project()
        best_is_loaded = self.trainer.args.load_best_model_at_end
        if self._generations is not None and not best_is_loaded:
            self._generations.look_at_end(self.step, self.trainer.state.global_step)
        callbacks = self.trainer.callback_handler.callbacks
        if not reporters.reports_tables(callbacks):
            return
        self._contexts.write(self.step)
        if self._writer is None:
            return
        if self._rollouts is not None:
            self._rollouts.write(self.step)
        if self._writer.write(self.step, self._totals()):
            record = RunRecord.load(self._writer.directory)
            completions = bool(self.trainer.args.to_dict().get("log_completions"))
            reporters.publish(callbacks, record, self.trainer.state.global_step, completions=completions)

    def after_train_end(self) -> None:
        """Close the record whatever the other callbacks did."""
        if not self.finished:
            self.finish()

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
            self._contexts.write(self.step)
            if self._rollouts is not None:
                self._rollouts.write(self.step)
            self._keep_words()
            self._keep_weights()
            for tracker in self.trackers:
                tracker.report_sinks()
            if self._writer is not None:
                self._writer.close("finished", self.step, self._totals())
        finally:
            self._detach()

    def abort(self) -> None:
        """Training ended with an exception, if it has not ended well. No communication between processes: the others may be gone."""
        if self.finished:
            return
        self._detach()
        if self._writer is None:
            return
        if self._projected_step and len(self.trackers) == len(self.config.dictionaries):
            self._writer.close("failed", self._projected_step, self._totals())
        else:
            self._writer.close("failed")

    # Behind it

    def _add_responses(self, responses: Responses) -> None:
        for tracker in self.trackers:
            tracker.add_responses(responses)

    def _detach(self) -> None:
        self.finished = True
        if self._hooks is not None:
            self._hooks.remove()
        for tracker in self.trackers:
            tracker.remove()

    def _report_missing_gradient(self, tracker: FeatureTracker) -> None:
        message = (
            f"No gradient reached {tracker.point.path!r} in optimizer step {self.step + 1}. Likely causes: all "
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
        for tracker, packed in zip(self.trackers, self._pack(), strict=True):
            tables = tracker.apply(packed, columns)
            examples += tables.pop("examples", [])
            for table, parts in tables.items():
                self._append(table, parts)
        if self.config.examples:
            self._append("examples", self._of_all_processes(examples))
        self._projected_step = self.step
        self._write_if_due()

    def _keep_words(self) -> None:
        """Put each feature's words on the record, so that whoever reads it need not make them."""
        if self._writer is None or not self._writer.write(self.step, self._totals()):
            return
        record = RunRecord.load(self._writer.directory)
        if CONTEXTS in record.tables:
            self._append(WORDS, [words_table(record.table(CONTEXTS), self.step)])

    def _keep_weights(self) -> None:
        """Put some of the weights that the run ended with on the record, by which `verify` tells the trained model from another."""
        if self._writer is not None and not spreads_parameters(self.trainer):
            sample = sample_weights(policy_of(self.trainer))
            self._append(WEIGHTS, [{"step": np.full(len(sample["place"]), self.step), **sample}])

    def _write_if_due(self) -> None:
        """Put the record on disk where `flush_seconds` have passed, whether or not the trainer logs."""
        if self._writer is not None and self._writer.due:
            self._writer.write(self.step, self._totals())

    def _append(self, table: str, parts: list[Columns]) -> None:
        if self._writer is not None:
            for part in parts:
                self._writer.append(table, part)

    def _pack(self) -> list[PackedSteps]:
        """The trackers' steps, summed over the processes at once."""
        packed = [tracker.pack() for tracker in self.trackers]
        if self.trainer.accelerator.num_processes == 1:
            return packed
        sums = [part.sums for part in packed]
        total = self.trainer.accelerator.reduce(torch.cat(sums, dim=1), "sum")
        parts = total.split([part.shape[1] for part in sums], dim=1)
        return [dataclasses.replace(part, sums=sums) for part, sums in zip(packed, parts, strict=True)]

    def _of_all_processes(self, parts: list[Columns]) -> list[Columns]:
        process = self.trainer.accelerator.process_index
        parts = [part | {"process": np.full(len(part["step"]), process)} for part in parts]
        return parts if self.trainer.accelerator.num_processes == 1 else gather_object(parts)

    def _measure_health(self) -> None:
        if self._health_step == self.step:
            return
        self._health_step = self.step
        for tracker in self.trackers:
            row = tracker.measure_health()
            self._warn_of_bad_fit(tracker)
            if row is not None and self._writer is not None:
                self._writer.append("health", {"step": [self.step], **row})

    def _warn_of_bad_fit(self, tracker: FeatureTracker) -> None:
        name, health = tracker.dictionary.name, tracker.health
        if health is None or not health.token_fvu > POOR_FVU or name in self._warned_of_fit:
            return
        self._warned_of_fit.add(name)
        logger.warning(
            "Dictionary %r leaves %.0f %% of this run's average token unexplained (sae/token_fvu %.2f, limit %.2f): its features "
            "say little of this model on these texts. `trl-sae-audit doctor` looks for the reason; `trl-sae-audit train-sae` makes "
            "a dictionary that fits.",
            name,
            100 * health.token_fvu,
            health.token_fvu,
            POOR_FVU,
        )

    def _measure_drift(self) -> None:
        if self._probe is None:
            return
        rows = self._probe.measure(self.trackers, self.step, whole_forward(self.trainer))
        if self._writer is not None:
            for part in rows:
                self._writer.append("drift", part)

    def _start_generations(self, sampling: Sampling, *, resumed: bool) -> GenerationDrift:
        kept = None
        if resumed and self._writer is not None:
            kept = SampledAnswers.from_record(RunRecord.load(self._writer.directory))
            if kept is None:
                logger.warning(
                    "The record of the run that resumes holds no sampled answers: they are sampled from the model as it is after "
                    "step %d, and generation_drift is the change since then.",
                    self.step,
                )
        return GenerationDrift(
            self.trainer,
            [tracker.dictionary for tracker in self.trackers],
            [tracker.point for tracker in self.trackers],
            sampling,
            self.config.generation_prompts,
            every=self.config.generation_steps,
            step=self.step,
            append=None if self._writer is None else self._writer.append,
            kept=kept,
            attention_sinks=self.config.attention_sinks,
        )

    def _start_rollouts(self) -> RolloutKeeper | None:
        """What keeps answers of an on-policy run, in the main process, where that can read them by itself."""
        if self._writer is None or not self.config.contexts or not self.layout.on_policy:
            return None
        if spreads_parameters(self.trainer):
            return None
        reader = next((tracker for tracker in self.trackers if tracker.contexts is not None), None)
        if reader is None:
            return None
        keeper = RolloutKeeper(
            self.trainer,
            self.trackers,
            self._writer.append,
            attention_sinks=self.config.attention_sinks,
        )
        reader.report_responses(keeper.add)
        return keeper

    def _look_at_generations(self, *, last: bool) -> None:
        assert self._generations is not None
        self._project()
        self._generations.look(self.step, self.trainer.state.global_step, last=last)

    def _totals(self) -> dict[str, FeatureTotals]:
        return {tracker.dictionary.name: tracker.totals for tracker in self.trackers}

    def _state(self) -> CallbackState:
        record = "" if self._writer is None else self._writer.directory.name
        baselines = {} if self._probe is None else self._probe.baselines
        return CallbackState(self.step, self._totals(), baselines, record)
