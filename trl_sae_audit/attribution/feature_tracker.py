"""One dictionary in one training run: from the gradient at its hook point to scores, rows and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..errors import AuditError
from ..models.hook_points import HookPoint
from ..saes.dictionary import FeatureDictionary
from ..saes.fit import Health
from .contexts import ContextReservoir
from .gradient_hook import GradientHook
from .microbatch import Batch, RowGradients, match_rows
from .observers import SelectionObserver, TokenSample, TokenScoreObserver
from .packed_steps import PackedSteps, pack, unpack
from .responses import Responses
from .selection import SelectionSums
from .step_tables import Columns, ScoredSteps, Window, example_rows
from .totals import FeatureTotals

OFFLOADED_TOKENS = (
    "Token scores read the whole dictionary for every few tokens, and an offloaded one would go to the GPU each time: omit "
    "token_scores, or do not offload."
)


class FeatureTracker:
    """A dictionary, its hook on the model, and what has been learned so far.

    A gradient passes it in three places: a micro-batch, `begin_microbatch` to `end_microbatch`; the optimizer step it is
    part of, `end_step`; and, for several steps at once, the sum over the processes between `pack` and `apply`.

    Args:
        dictionary: on the model's device.
        point: its hook point in the model.
        watch: label → feature.
        sided: the trainer's loss has sides, so that every row must be known.
        paired: row j and row j + rows/2 of a batch are one example.
        top_k: features logged per step besides the watched ones.
        health_tokens: sample size for `TokenSample`; 0 for none.
        token_scores: computes token share and activation attribution; None for neither.
        examples: also give a row per example and watched feature.
        selection: looks at response tokens, to see what the step selects for; None for no selection.
        on_policy: the responses are the model's own, so that what the features do in them is kept over time.
        totals: to continue, when a run resumes.
    """

    def __init__(
        self,
        dictionary: FeatureDictionary,
        point: HookPoint,
        watch: dict[str, int],
        *,
        sided: bool = False,
        paired: bool = False,
        top_k: int = 20,
        health_tokens: int = 0,
        token_scores: TokenScoreObserver | None = None,
        examples: bool = False,
        selection: SelectionObserver | None = None,
        on_policy: bool = False,
        totals: FeatureTotals | None = None,
    ) -> None:
        if token_scores is not None and dictionary.decoder.device.type != dictionary.device.type:
            raise AuditError(OFFLOADED_TOKENS)
        if totals is not None and totals.steps and ("selection" in totals.scores) != (selection is not None):
            was = "with" if "selection" in totals.scores else "without"
            raise AuditError(
                f"The run that is resumed recorded dictionary {dictionary.name!r} {was} selection; set selection= as it was."
            )
        self.dictionary = dictionary
        self.point = point
        self.watch = watch
        self.watched = torch.tensor(list(watch.values()), dtype=torch.long, device=dictionary.device)
        self.totals = totals or FeatureTotals(dictionary.d_sae)
        self.health: Health | None = None
        self._layout = {"sided": sided, "paired": paired}
        self._parts = {"token_scores": token_scores is not None, "selection": selection is not None}
        self._top_k = min(top_k, dictionary.d_sae)
        self._examples = examples
        self._window = Window(dictionary.d_sae)
        self._sample = TokenSample(health_tokens) if health_tokens and dictionary.encoder else None
        self._tokens = token_scores
        self._selection = selection
        self.on_policy = on_policy
        observers = [observer for observer in (self._sample, self._tokens, selection) if observer is not None]
        self._microbatches: list[RowGradients] = []
        self._steps: list[RowGradients] = []
        self._hook = GradientHook(
            point,
            dictionary.d_model,
            observers,
            loss_positions=token_scores is not None,
            keep_last=selection is not None and selection.head is not None,
        )

    def begin_microbatch(self) -> None:
        """Collect the gradients that reach the hook point from now on."""
        self._hook.open()
        for observer in (self._tokens, self._selection):
            if observer is not None:
                observer.begin(self.totals.steps + len(self._steps), len(self._microbatches))

    @property
    def selects(self) -> bool:
        """Whether selection is computed."""
        return self._selection is not None

    def add_responses(self, responses: Responses) -> None:
        """What the forward that has just ended gives the trainer's loss."""
        if self.selects:
            self._hook.add_responses(responses)

    def end_microbatch(self, batches: Sequence[Batch]) -> None:
        """Tell whose gradients they were, by what the trainer computed its loss on."""
        forwards = self._hook.close()
        seen = self._selection.select(forwards) if self._selection else None
        gradients = match_rows(forwards, batches, **self._layout)
        if gradients and self._tokens:
            gradients[0] = replace(gradients[0], tokens=self._tokens.take())
        if gradients and gradients[0].selection is not None and seen is not None:
            gradients[0] = replace(gradients[0], selection=gradients[0].selection.with_responses(seen))
        self._microbatches += gradients

    def end_step(self, divisor: float) -> bool:
        """The optimizer is about to step: what has arrived, divided by `divisor`, is one step's gradient.

        Returns:
            Whether any has; a step without one counts as zero.
        """
        parts, self._microbatches = self._microbatches, []
        nothing = torch.zeros(0, self.dictionary.d_model, dtype=torch.float32, device=self.dictionary.device)
        step = RowGradients.join(parts or [RowGradients.of(nothing, None)], divisor)
        if self.selects and step.selection is None:
            step = replace(step, selection=SelectionSums.zero(self.dictionary.d_sae, self.dictionary.device))
        self._steps.append(step)
        return bool(parts)

    def pack(self) -> PackedSteps:
        """Take the steps that have ended: their `sums` are to be summed over the processes."""
        steps, self._steps = self._steps, []
        return pack(steps, self.dictionary, **self._parts)

    def apply(self, packed: PackedSteps, steps: Columns) -> dict[str, list[Columns]]:
        """Score steps, add them to totals and means, and give their rows of the record, by table.

        Args:
            packed: what `pack` gave, its `sums` those of all processes.
            steps: columns `step` and `global_step` of the steps, arrays [S].
        """
        scores = unpack(packed.sums, self.dictionary, compared=self._layout["sided"], **self._parts)
        scored = ScoredSteps.of(scores, steps, self.dictionary, self._top_k)
        self.totals.update(
            **scored.dense,
            degrees=scored.counts[:, 0] - 1,
            extras=scored.extras,
            finite=scored.finite,
            selection=scored.selection,
            on_policy=self.on_policy,
        )
        self._window.add(scored)
        if self._selection and scored.selection is not None:
            self._selection.report(scored.finite & np.isnan(scored.selection["selection"]).any(1))
        tables = {
            "steps": [scored.feature_rows(self.dictionary, self.watch)],
            "gradient": [scored.gradient_rows(self.dictionary)],
        }
        if self._examples and self.watch:
            tables["examples"] = [
                example_rows(step, gradients, self.dictionary, self.watch)
                for step, gradients in zip(steps["step"], packed.steps, strict=True)
            ]
        return tables

    @property
    def contexts(self) -> ContextReservoir | None:
        """Where the features are most active in the responses; None without selection."""
        return None if self._selection is None else self._selection.contexts

    def report_responses(self, report: Callable[[int, Tensor, Tensor], None]) -> None:
        """From now on tell of each micro-batch's responses: the optimizer step they are of, token ids, and which of these are theirs."""
        if self._selection is not None:
            self._selection.on_responses = lambda ids, own: report(self.totals.steps + len(self._steps) + 1, ids, own)  # fmt: skip

    def take_window(self) -> Window | None:
        """Means since the last call, None if there was no finite step."""
        window, self._window = self._window, Window(self.dictionary.d_sae)
        if window.steps == 0:
            return None
        window.average()
        return window

    def measure_health(self) -> Columns | None:
        """How the dictionary fits the latest micro-batch's tokens, as a row without its step."""
        self.health = self._sample.health(self.dictionary) if self._sample else None
        if self.health is None:
            return None
        shown = ("fvu", "token_fvu", "l0", "tokens")
        return {"dictionary": [self.dictionary.name]} | {name: [getattr(self.health, name)] for name in shown}

    def report_sinks(self) -> None:
        """At the end of a run, how many of its response tokens were attention sinks."""
        if self._selection is not None:
            self._selection.report_sinks()

    def remove(self) -> None:
        """Take the hook off the model."""
        self._hook.remove()
