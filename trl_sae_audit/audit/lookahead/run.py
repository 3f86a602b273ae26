"""The lookahead of a finished audit: which pairs, which prompts, which answers, and every prediction."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ...data.opener import DatasetLike, Row
from ...errors import AuditError
from ...models.ambient import own_modes
from ...models.batches import batched
from ...models.sampling import Sampling, sample_ids
from ..batches import digests
from ..feature_table import PREDICTIONS
from ..gradients import AuditPass, BatchGradients, Scores
from ..objectives import TokenizedExample
from .answer_places import AnswerPlaces
from .config import LookaheadConfig
from .generations import (
    Generations,
    gradient_in_generations,
    mean_over_generations,
    predict_in_generations,
)
from .lookahead import Lookahead
from .optimizer_step import UpdateRule
from .probe import Ids, Split, draw_rows, has_answers, hold_out, prompts_of, read_probe
from .processes import join_lists, own_share
from .unrolled import UnrolledRun

if TYPE_CHECKING:
    from ..run import AuditRun, RowCheck

logger = logging.getLogger(__name__)

PROMPTS_TOGETHER = 16  # in one call of sampling, whose random numbers are its own
_OTHER_SEED = 7919


class AuditLookahead:
    """A lookahead for an audit of `dataset` by `run`, made before it.

    Args:
        run: the model, the dictionary and the loss.
        dataset: that is audited.
        check: says which of its rows are examples.
        config: what to look at.
        rule: the optimizer's next step.
        tokenizer: of the model.

    Raises:
        AuditError: nothing is trainable; a bad probe; no prompt to sample answers at.
    """

    def __init__(
        self,
        run: AuditRun,
        dataset: DatasetLike,
        check: RowCheck,
        config: LookaheadConfig,
        rule: UpdateRule,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self.run, self.config, self.tokenizer = run, config, tokenizer
        self._dataset = dataset
        probe = None if config.probe is None else read_probe(config.probe)
        self._good = run.good_rows(dataset, check)
        self._drawn = {int(row) for row in draw_rows(self._good, config.pairs, run.config.seed)}
        self._pairs = self._probe_pairs(probe)
        self._prompts = None if probe is None else prompts_of(probe, self._pairs, run.loss, tokenizer)
        self.ahead = self._ahead(rule, self.split.examples)
        self.unrolled = None
        if config.unroll_steps is not None:
            self.unrolled = UnrolledRun(self.ahead, config.unroll_steps, config.unroll_segments)
        self.places = AnswerPlaces(run.dictionary.d_sae)
        self.description = self._describe(probe)

    # What is looked at

    def _ahead(self, rule: UpdateRule, examples: Sequence[TokenizedExample]) -> Lookahead:
        """The step on some examples, in random groups."""
        run, size, n = self.run, self.run.config.batch_size, len(examples)
        groups = max(1, min(self.config.groups, n))
        return Lookahead(
            run.model,
            run.point,
            run.dictionary,
            run.loss,
            rule,
            lambda: [examples],
            lambda: batched(self._pairs, size),
            reference=run.reference,
            method=self.config.method,
            borders=[n * group // groups for group in range(1, groups)],
            attention_sinks=run.config.attention_sinks,
        )

    @cached_property
    def split(self) -> Split:
        """The examples of the step and the prompts to sample at."""
        examples = [example for part in self.run.tokenized(self._dataset, self._drawn) for example in part]
        if self._prompts is not None:
            order = np.random.default_rng([self.run.config.seed, 3]).permutation(len(examples))
            return Split([examples[place] for place in order], self._prompts, held_out=True)
        return hold_out(examples, self.run.loss, self.config.prompts, self.run.config.seed)

    @cached_property
    def generations(self) -> Generations:
        """Answers of the model as it is."""
        return self._sample(self.prompts)

    @property
    def rows(self) -> int:
        """Of the data, those that are examples."""
        return len(self._good)

    @cached_property
    def prompts(self) -> list[Ids]:
        """The prompts that leave room for an answer."""
        assert self.config.sampling is not None
        room = self.run.context - self.config.sampling.max_new_tokens if self.run.context else math.inf
        askable = [prompt for prompt in self.split.prompts if prompt and len(prompt) <= room]
        if not askable:
            raise AuditError(
                "There is no prompt to sample answers at: those of the lookahead's probe are empty, or as long as the model's "
                "context. Add prompts, sample shorter answers, or pass lookahead=None."
            )
        return askable

    def _probe_pairs(self, probe: Sequence[Row] | None) -> list[TokenizedExample]:
        if probe is None or self.run.loss.rows_per_example != 2 or not has_answers(probe):
            return []
        return self.run.loss.tokenize([(row.index, row.columns) for row in probe if row.columns is not None])

    def _describe(self, probe: Sequence[Row] | None) -> dict[str, Any]:
        config, sampling = self.config, self.config.sampling
        return {
            "step": self.ahead.rule.describe(),
            "rows": len(self._drawn),
            "of_rows": len(self._good),
            "pairs": len(self.split.examples),
            "prompts": len(self.prompts) if sampling else 0,
            "held_out": self.split.held_out,
            "probe_sha256": None if probe is None else hashlib.sha256(digests(probe).tobytes()).hexdigest(),
            "sampling": None if sampling is None else asdict(sampling),
            "groups": config.groups,
            "method": config.method,
            "unrolled": None if self.unrolled is None else [self.unrolled.steps, self.unrolled.segments],
            "predictions": list(PREDICTIONS),
        }

    # The step

    def take_step(self, audit_pass: AuditPass, wanted: Callable[[int], bool]) -> dict[int, Scores]:
        """Differentiate the examples of the step, once for the parameters and for the audit.

        Args:
            audit_pass: makes the scores of an example.
            wanted: of which rows.
        """
        if not self.split.examples:  # the audit has none either, and says why
            return {}
        scored: dict[int, Scores] = {}
        quiet = not self.run.progress or not PartialState().is_main_process
        bar = tqdm(
            desc="Differentiating", unit=" rows", disable=quiet or None, total=len(self.split.examples)
        )

        def watch(
            examples: Sequence[TokenizedExample], batch: Mapping[str, Tensor], found: BatchGradients
        ) -> None:
            some = audit_pass.score(examples, batch, found)
            scored.update({row: scores for row, scores in some.items() if wanted(row)})
            bar.update(len(examples))

        with bar:
            self.ahead.take(watch)
        return dict(join_lists(list(scored.items())))

    # What is predicted

    def predictions(self) -> dict[str, np.ndarray]:
        """Every prediction there is, by name: [d_sae] each.

        Raises:
            AuditError: a prediction is not finite.
        """
        found: dict[str, Tensor] = {}
        if self.config.sampling is not None:
            found |= predict_in_generations(self.ahead, self._batches(self.generations), self.places)
        if self._pairs:
            found["probe_activation"] = self.ahead.mean_activations()
            found["predicted_change"] = self.ahead.predicted_change()
        if self.unrolled is not None:
            found |= self._after_the_run(self.unrolled)
        arrays = {name: value.cpu().double().numpy() for name, value in found.items()}
        for name, values in arrays.items():
            if not name.startswith("effect_size") and not np.isfinite(values).all():
                raise AuditError(
                    f"The lookahead's {name} is not finite in {int((~np.isfinite(values)).sum())} features: the model overflows in "
                    f"{next(self.run.model.parameters()).dtype}. Load it in float32 or bfloat16, or pass lookahead=None."
                )
        return arrays

    def predictions_on(self, rows: Iterable[Row]) -> tuple[dict[str, np.ndarray], int]:
        """What a step on other rows of the data does in the same answers, and of how many rows it is: nothing where it is of none.

        Args:
            rows: as they are to be trained on. Those count whose numbers the step was taken on, as often as they occur.
        """
        drawn = {example.row for example in self.split.examples}
        wanted = [(row.index, row.columns) for row in rows if row.columns is not None and row.index in drawn]
        examples = [
            example
            for some in batched(wanted, self.run.config.part_size)
            for example in self.run.loss.tokenize(some)
        ]
        if not examples:
            return {}, 0
        order = np.random.default_rng([self.run.config.seed, 3]).permutation(len(examples))
        ahead = self._ahead(self.ahead.rule, [examples[place] for place in order])
        found = predict_in_generations(ahead, self._batches(self.generations))
        return {name: value.cpu().double().numpy() for name, value in found.items()}, len(examples)

    def _after_the_run(self, unrolled: UnrolledRun) -> dict[str, Tensor]:
        found = {}
        if self._pairs:
            found["unrolled_change"] = self.ahead.change_after(unrolled.shift())
        if self.config.sampling is not None:
            with unrolled.moved():
                after = self._sample(self.prompts)
            now, then = (
                mean_over_generations(self.ahead, self._batches(each))[0]
                for each in (self.generations, after)
            )
            found["unrolled_change_in_generations"] = then - now
        return found

    @own_modes()
    def influence(self, feature: int) -> np.ndarray:
        """Each audited row's part of the change on given text, or without a probe of pairs of that in generations: [n]."""
        if self._pairs:
            gradient = self.ahead.activation_gradient(feature)
        else:
            gradient = gradient_in_generations(self.ahead, feature, lambda: self._batches(self.generations))
        rows = frozenset(self._good.tolist())
        return (
            self.ahead.influence(gradient, lambda: self.run.tokenized(self._dataset, rows))[0]
            .double()
            .numpy()
        )

    # Sampling

    def _batches(self, generations: Generations) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return generations.batches(self.tokenizer, self.run.config.batch_size * 2, self.run.device)

    def _sample(self, prompts: Sequence[Ids]) -> Generations:
        """Answers of the model as it is at the time, always with the same random numbers, however many processes share the work."""
        sampling = self.config.sampling
        assert sampling is not None
        order = sorted(prompts, key=len)
        calls = list(enumerate(batched(order, PROMPTS_TOGETHER)))
        mine = list(own_share(calls))
        quiet = not self.run.progress or not PartialState().is_main_process
        found = [
            (number, self._answers(some, sampling, number))
            for number, some in tqdm(mine, desc="Sampling answers", unit=" batches", disable=quiet or None)
        ]
        joined = [answers for _, some in sorted(join_lists(found)) for answers in some]
        return Generations(order, joined)

    def _answers(self, prompts: Sequence[Ids], sampling: Sampling, number: int) -> list[list[list[int]]]:
        own = replace(sampling, seed=sampling.seed + _OTHER_SEED * number)
        size = sampling.answers * PROMPTS_TOGETHER
        return sample_ids(self.run.model, self.tokenizer, prompts, own, batch_size=size)


def update_rule(
    optimizer: UpdateRule | torch.optim.Optimizer | None, model: nn.Module, usual: Callable[[], UpdateRule]
) -> UpdateRule:
    """The rule of an optimizer; `usual` where none is given."""
    if isinstance(optimizer, UpdateRule):
        return optimizer
    if optimizer is None:
        return usual()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return UpdateRule.from_optimizer(optimizer, trained, usual().max_grad_norm)
