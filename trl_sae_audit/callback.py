"""The callback a TRL user passes to a trainer."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .dictionary import FeatureDictionary
from .errors import AuditError
from .session import Session, Settings, record_directory
from .trainers import calling_trainer

logger = logging.getLogger(__name__)


class FeatureAttributionCallback(TrainerCallback):
    """Logs, at every optimizer step, which SAE features the step up- or down-weights.

    The gradient `G` of the step's loss at the dictionary's hook point is summed over all tokens and projected
    onto the unit decoder directions: `attribution_f = -⟨G, d_f⟩`, positive where the step up-weights the feature.
    Training itself is not changed: the weights after it are, bit for bit, those without the callback.

    Args:
        dictionary: what to project onto, or several, one per layer.
        output_dir: where the run record goes; by default `sae_audit` in the trainer's output directory.
        watch: label → feature, always logged; with several dictionaries label → (dictionary name, feature).
        top_k: features recorded per step besides the watched ones, by size of attribution.
        log_top: how many top features the trainer's log names.
        token_scores: also record token share and activation attribution, from every token whose logits enter
            the loss. Costs two products with the dictionary per token, and a synchronisation per micro-batch.
        examples: also record every example's own attribution to the watched features.
        health_tokens: tokens per log on which fit of the SAE (FVU, L0) is measured; 0 for none.
        probe: texts, or a tokenized batch, on which the watched features' activation is measured as training goes.
        probe_steps: optimizer steps between two looks at the probe.
        flush_seconds: at most this much of the record is lost when the process is killed.

    Raises:
        AuditError: for arguments that contradict each other; and from `trainer.train()`, before the first
            optimizer step, for a dictionary that does not fit the model or a trainer whose step is not known.

    Example:

    ```python
    callback = FeatureAttributionCallback(load_dictionary("path/to/sae"), output_dir="runs/dpo")
    trainer = DPOTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer, callbacks=[callback])
    trainer.train()
    RunRecord.load("runs/dpo").features().head(10)
    ```
    """

    def __init__(
        self,
        dictionary: FeatureDictionary | Sequence[FeatureDictionary],
        output_dir: str | Path | None = None,
        *,
        watch: Mapping[str, int | tuple[str, int]] | None = None,
        top_k: int = 20,
        log_top: int = 3,
        token_scores: bool = False,
        examples: bool = False,
        health_tokens: int = 64,
        probe: Sequence[str] | Mapping[str, Tensor] | None = None,
        probe_steps: int = 50,
        flush_seconds: float = 30.0,
    ) -> None:
        dictionaries = (dictionary,) if isinstance(dictionary, FeatureDictionary) else tuple(dictionary)
        if not dictionaries or not all(isinstance(one, FeatureDictionary) for one in dictionaries):
            raise AuditError(
                "FeatureAttributionCallback needs a FeatureDictionary or a list of them; make one with load_dictionary."
            )
        names = [one.name for one in dictionaries]
        if len(set(names)) < len(names):
            raise AuditError(
                f"Two dictionaries have the same name among {names}; pass name= to load_dictionary."
            )
        for option, value, least in (
            ("top_k", top_k, 1),
            ("log_top", log_top, 0),
            ("health_tokens", health_tokens, 0),
            ("probe_steps", probe_steps, 1),
        ):
            if value < least:
                raise AuditError(f"{option} is {value}; it must be at least {least}.")
        if probe is not None and not watch:
            raise AuditError(
                "A probe measures the drift of watched features, but none is watched; pass watch=."
            )
        self.settings = Settings(
            dictionaries=dictionaries,
            output_dir=None if output_dir is None else Path(output_dir),
            watch=dict(watch or {}),
            top_k=top_k,
            log_top=log_top,
            token_scores=token_scores,
            examples=examples,
            health_tokens=health_tokens,
            probe=probe,
            probe_steps=probe_steps,
            flush_seconds=flush_seconds,
        )
        self._session: Session | None = None
        self._attempts = 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._session is not None and not self._session.finished:
            self._session.abort()
        trainer = calling_trainer(self)
        attached = [one for one in trainer.callback_handler.callbacks if isinstance(one, type(self))]
        self._session = Session(self._settings_of_attempt(trainer), trainer, attached.index(self))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().before_optimizer_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._running().finish()

    def detach(self) -> None:
        """Take everything off model and trainer at once, if a run was left by an exception."""
        if self._session is not None and not self._session.finished:
            self._session.abort()

    def _settings_of_attempt(self, trainer: Trainer) -> Settings:
        """With auto_find_batch_size a run that ran out of memory begins anew: the record so far is kept, another begun."""
        before = self._session
        if before is None or not (before.failed and before.step and trainer.args.auto_find_batch_size):
            self._attempts = 1
            return self.settings
        self._attempts += 1
        first = record_directory(self.settings, trainer)
        directory = first.with_name(f"{first.name}-{self._attempts}")
        logger.warning(
            "Training failed after step %d and auto_find_batch_size begins it anew with a smaller batch; this attempt's record is "
            "%s.",
            before.step,
            directory,
        )
        return dataclasses.replace(self.settings, output_dir=directory)

    def _running(self) -> Session:
        if self._session is None or self._session.finished:
            raise AuditError(
                "The attribution callback was called while no training runs; let the trainer call it."
            )
        return self._session
