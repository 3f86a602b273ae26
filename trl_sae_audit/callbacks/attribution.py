"""The callback a TRL user passes to a trainer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from torch import nn
from transformers import TrainerCallback

from ..errors import AuditError
from ..models.tokenizers import Processing
from ..trainers.kinds import calling_trainer, check_added_once
from .config import AttributionConfig
from .session import AttributionSession

P = ParamSpec("P")


def _take_arguments_of(
    config: Callable[P, Any],
) -> Callable[[Callable[..., None]], Callable[Concatenate[Any, P], None]]:
    """Give an `__init__` the signature of a dataclass, for type checkers and for `help`."""

    def give(init: Callable[..., None]) -> Callable[Concatenate[Any, P], None]:
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = inspect.signature(config).parameters.values()
        init.__signature__ = inspect.Signature([own, *parameters])  # type: ignore[attr-defined]
        return init

    return give


class FeatureAttributionCallback(TrainerCallback):
    """Logs, at every optimizer step, which SAE features the step up- or down-weights.

    The gradient `G` of the step's loss at the dictionary's hook point is summed over all tokens and projected
    onto the unit decoder directions: `attribution_f = -⟨G, d_f⟩`, positive where the step up-weights the feature.
    Training itself is not changed: the weights after it are, bit for bit, those without the callback.

    Its arguments are the fields of `AttributionConfig`, which describes them: `dictionary`, `output_dir`, and by name `watch`,
    `top_k`, `log_top`, `token_scores`, `examples`, `health_tokens`, `probe`, `probe_steps`, `generations`,
    `generation_prompts`, `generation_steps`, `flush_seconds`, `overwrite`, `selection`, `selection_tokens`, `contexts`,
    `attention_sinks`, `dataset`.

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

    @_take_arguments_of(AttributionConfig)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.config = AttributionConfig(*args, **kwargs)
        self._session: AttributionSession | None = None

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        output_dir: str | Path | None = None,
        *,
        tokenizer: Processing | None = None,
        texts: Sequence[str] | None = None,
        **options: Any,
    ) -> FeatureAttributionCallback:
        """The callback with the best registered SAE of a model, as `load_dictionary("auto")` chooses it from the local cache.

        Args:
            model: that will be trained.
            output_dir: where the run record goes.
            tokenizer, texts: where given, the SAE is chosen by its fit on these texts.
            options: the other options of the callback.

        Raises:
            AuditError: none is registered or none is in the cache, with what to fetch.
        """
        from ..saes.loading import load_dictionary  # sae-lens takes seconds to import

        dictionary = load_dictionary("auto", model=model, tokenizer=tokenizer, texts=texts)
        return cls(dictionary, output_dir, **options)

    @property
    def record_directory(self) -> Path | None:
        """Where the record of the latest run is, which has a number where an earlier run's was in `output_dir`.

        None before the first run, and on the processes that do not write it.
        """
        return None if self._session is None else self._session.record_directory

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._session is not None and not self._session.finished:
            self._session.abort()
        trainer = calling_trainer(self)
        check_added_once(self, trainer)
        callbacks = trainer.callback_handler.callbacks
        attached = [each for each in callbacks if isinstance(each, FeatureAttributionCallback)]
        self._session = AttributionSession(self.config, trainer, attached.index(self))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_session().before_optimizer_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_session().after_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._require_session().finish()

    def detach(self) -> None:
        """Take everything off model and trainer at once, if a run was left by an exception."""
        if self._session is not None and not self._session.finished:
            self._session.abort()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, has the options and no run: it observes nothing until a trainer calls it."""
        return {**vars(self), "_session": None}

    def _require_session(self) -> AttributionSession:
        if self._session is None or self._session.finished:
            raise AuditError(
                "The attribution callback was called while no training runs; let the trainer call it."
            )
        return self._session
