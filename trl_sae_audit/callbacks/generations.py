"""Drift in generations while a model trains: answers sampled at the start, weighed again by one forward pass, and at the end sampled
again where that says too little."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType, broadcast_object_list, gather_object
from transformers import Trainer

from ..attribution.drift import (
    LEAST_COVERED,
    LEAST_EFFECTIVE,
    LEAST_NEAR,
    AnswerActivations,
    AnswerLayout,
    Drift,
    covered_share,
    effective_answers,
    estimate_drift,
    measure_drift,
    weigh_tokens,
)
from ..errors import AuditError
from ..models.hook_points import HookPoint
from ..models.sampling import Sampling, sample_ids
from ..models.sharding import is_sharded
from ..models.token_ids import Ids
from ..saes.active import Active
from ..saes.dictionary import FeatureDictionary
from ..trainers.kinds import policy_of, trainer_kind
from .generation_prompts import prompts_for, tokenizer_of
from .sampled_answers import (
    Answered,
    SampledAnswers,
    answer_activations,
    answer_log_probs,
    draw_within,
    join,
)

logger = logging.getLogger(__name__)

TOKENS_A_LOOK = 10_240
"""Answer tokens that are read in a look where no prompts are given, so that it takes about as long as two optimizer steps."""
_SAMPLED_TOGETHER = 32

Append = Callable[[str, Mapping[str, Any]], None]


@dataclasses.dataclass(frozen=True)
class Look:
    """What the model generates at one time, against the start.

    Attributes:
        drifts: dictionary name → of its features.
        answers, prompts: how many there are.
        effective: how many of today's answers those of the start are worth.
        covered: which share of today's answers is of a kind that was sampled at the start, up to noise.
        divergence: estimate of the divergence of an answer, `KL(π_start ‖ π_now)`, in nats.
        sampled_again: whether today's model was asked again, and the drifts are from its own answers.
    """

    drifts: dict[str, Drift]
    answers: int
    prompts: int
    effective: float
    covered: float
    divergence: float
    sampled_again: bool = False

    @property
    def trusted(self) -> bool:
        """Whether today's model was asked again; or enough answers are effective, and enough of what is generated now is among them."""
        return self.sampled_again or self._are_worth(LEAST_EFFECTIVE)

    @property
    def is_near(self) -> bool:
        """Whether the answers of the start say more of today's model than as many of its own would."""
        return self._are_worth(LEAST_NEAR)

    def _are_worth(self, share: float) -> bool:
        return self.effective >= share * self.answers and self.covered >= LEAST_COVERED

    def tables(self, step: int, global_step: int) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and columns of what a record keeps of it."""
        yield (
            "generation_looks",
            {
                "step": [step],
                "global_step": [global_step],
                "prompts": [self.prompts],
                "answers": [self.answers],
                "effective_sample_size": [self.effective],
                "covered_share": [self.covered],
                "trusted": [self.trusted],
                "divergence": [self.divergence],
                "sampled_again": [self.sampled_again],
            },
        )
        for name, drift in self.drifts.items():
            n = len(drift.features)
            yield (
                "generation_drift",
                {
                    "step": np.full(n, step),
                    "global_step": np.full(n, global_step),
                    "dictionary": [name] * n,
                    "feature": drift.features,
                    "drift": drift.change.astype(np.float32),
                    "low": drift.low.astype(np.float32),
                    "high": drift.high.astype(np.float32),
                },
            )


def check_generations(trainer: Trainer) -> None:
    """Raises:
    AuditError: if the model cannot generate, or not between two steps.
    """
    if trainer_kind(trainer) == "RewardTrainer":
        raise AuditError(
            "RewardTrainer trains a model that gives a number and generates nothing; take generations= out."
        )
    if spreads_parameters(trainer):
        raise AuditError(
            "The parameters are spread over the processes (FSDP, DeepSpeed ZeRO-3), so the model cannot sample answers between "
            "two steps; take generations= out, or train with DDP or ZeRO-2."
        )


def spreads_parameters(trainer: Trainer) -> bool:
    """Whether no process has all parameters, so that none can run the model by itself."""
    accelerator = trainer.accelerator
    zero3 = (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )
    return zero3 or accelerator.distributed_type == DistributedType.FSDP or is_sharded(trainer.model)


class GenerationDrift:
    """Samples answers when training starts, or takes those of the resumed run, weights them during training, and samples again at its end
    where they say too little by then.

    Each process has the answers to its share of the prompts; the main process has all of them, estimates and records. Neither the
    model nor torch's random state is changed.

    Args:
        trainer: whose model it is, see `check_generations`.
        dictionaries: that read the answers, on the trainer's device.
        points: where, one for each.
        sampling: how answers are sampled.
        prompts: see `prompts_for`; where there are None, `draw_within` TOKENS_A_LOOK says how many answers are kept.
        every: optimizer steps between two looks.
        step: optimizer steps made so far.
        append: in the main process, adds columns to a table of the record.
        kept: in the main process, what the record of the run that is resumed has; None samples.
        attention_sinks: count features as active at attention sinks too.

    Attributes:
        looked: optimizer steps made at the last look.
        latest: in the main process, what it showed.

    Raises:
        AuditError: no prompts, or fewer than processes.
    """

    def __init__(
        self,
        trainer: Trainer,
        dictionaries: Sequence[FeatureDictionary],
        points: Sequence[HookPoint],
        sampling: Sampling,
        prompts: Any = None,
        *,
        every: int = 50,
        step: int = 0,
        append: Append | None = None,
        kept: SampledAnswers | None = None,
        attention_sinks: bool = False,
    ) -> None:
        self.trainer = trainer
        self.sampling = sampling
        self._readers = list(zip(dictionaries, points, strict=True))
        self._attention_sinks = attention_sinks
        self.every = every
        self.looked = step
        self.latest: Look | None = None
        self._logged = self._ended = False
        self._append = append
        self._activations: dict[str, AnswerActivations] = {}
        known = self._from_main_process(None if kept is None else (kept.rows, kept.prompts))
        rows, numbers = known or self._sample(prompts, step)
        if kept is not None:
            self._keep(kept)
        self._lengths = np.array([len(answer) for _, answer in rows])
        processes = trainer.accelerator.num_processes
        self._shares = [
            np.flatnonzero(np.array(numbers) % processes == process) for process in range(processes)
        ]
        own = self._shares[trainer.accelerator.process_index]
        self._own, self._own_numbers = [rows[place] for place in own], [numbers[place] for place in own]

    def due(self, step: int) -> bool:
        """Whether it is time to look again, also where steps come several at a time."""
        return step // self.every > self.looked // self.every

    def look(self, step: int, global_step: int, *, last: bool = False) -> None:
        """See what the model generates after `step` optimizer steps, in all processes at once; the main process records it.

        If it is the `last` look and the answers of the start say too little, the model is asked again.
        """
        self.looked, self._ended = step, last
        look = self.measure()
        if last and self._from_main_process(None if look is None else not look.is_near):
            drifts = self._ask_again()
            if look is not None and drifts is not None:
                look = dataclasses.replace(look, drifts=drifts, sampled_again=True)
        if look is None:
            return
        if not look.trusted and (self.latest is None or self.latest.trusted):
            logger.warning(
                "After step %d the %d answers sampled at the start are worth %.0f of today's, and cover %.0f %% of what the model "
                "generates: generation_drift is too small, and has the right direction at best, until the answers are sampled again "
                "when training ends.",
                *(step, look.answers, look.effective, 100 * min(look.covered, 1.0)),
            )
        self.latest, self._logged = look, False
        if self._append is not None:
            for table, columns in look.tables(step, global_step):
                self._append(table, columns)

    def look_at_end(self, step: int, global_step: int) -> None:
        """The last look, in all processes at once, where it was not taken yet: a run may be stopped at a step that was looked at."""
        if self._ended:
            return
        unsure = self.latest is not None and not self.latest.is_near
        if self.looked < step or self._from_main_process(unsure):
            self.look(step, global_step, last=True)

    def take_look(self) -> Look | None:
        """In the main process, the last look if it was not taken yet: a log names it once."""
        look, self._logged = None if self._logged else self.latest, True
        return look

    def measure(self) -> Look | None:
        """One forward pass over the answers, in all processes at once; the main process gets what it shows."""
        parts = self._of_all_processes(self._log_probs(self._own))
        if not self.trainer.accelerator.is_main_process:
            return None
        now: list[np.ndarray] = [np.empty(0)] * len(self._lengths)
        for share, part in zip(self._shares, parts, strict=True):
            ends = np.cumsum(self._lengths[share])[:-1]
            for place, values in zip(share, np.split(part, ends), strict=True):
                now[place] = values
        ratios = np.concatenate(now).astype(np.float64) - self._log_probs_before
        layout = self._layout
        weights = weigh_tokens(ratios, layout)
        return Look(
            drifts={
                name: estimate_drift(activations, layout, weights, seed=self.sampling.seed)
                for name, activations in self._activations.items()
            },
            answers=len(layout.lengths),
            prompts=layout.n_prompts,
            effective=effective_answers(ratios, layout),
            covered=covered_share(ratios, layout),
            divergence=-float(ratios.sum()) / len(layout.lengths),
        )

    def _ask_again(self) -> dict[str, Drift] | None:
        """Drifts from today's answers to the prompts of the start, as many to each, in all processes at once; known in the main process.

        Today's model reads both: that of the start is no longer there. None where a process cannot, which must not end the training:
        the optimizer's states may have taken the memory that there was at the start.
        """
        problem, read = "", []
        try:
            asked = (self._own, self._own_numbers), self._answers_again()
            read = [
                (numbers, [len(answer) for _, answer in rows], self._active(rows)) for rows, numbers in asked
            ]
        except (AuditError, torch.OutOfMemoryError) as error:
            problem = str(error)
        problems = [each for each in self._of_all_processes(problem) if each]
        if problems:
            if self.trainer.accelerator.is_main_process:
                logger.warning(
                    "The answers could not be sampled again (%s): the last generation_drift is by the weights of those of the start, and "
                    "`record.table('generation_looks')` says whether to trust it.",
                    problems[0].partition("\n")[0],
                )
            return None
        before, now = (self._of_main_process(*each) for each in read)
        return {
            name: measure_drift(
                before[name],
                now[name],
                known=self._activations[name].features,
                seed=self.sampling.seed,
            )
            for name in before
        }

    def _answers_again(self) -> tuple[list[Answered], list[int]]:
        """Today's answers to this process's prompts, and the prompts' numbers, with the random numbers of the start, so that the answers
        differ where the models do."""
        asked: dict[Ids, list[int]] = {}
        for (prompt, _), number in zip(self._own, self._own_numbers, strict=True):
            asked.setdefault(prompt, []).append(number)
        most = max((len(numbers) for numbers in asked.values()), default=1)
        answers = sample_ids(
            policy_of(self.trainer),
            tokenizer_of(self.trainer),
            list(asked),
            dataclasses.replace(self._own_sampling, answers=most),
            batch_size=_SAMPLED_TOGETHER,
        )
        rows, numbers = [], []
        for (prompt, several), sampled in zip(asked.items(), answers, strict=True):
            rows += [(prompt, tuple(answer)) for answer in sampled[: len(several)]]
            numbers += several
        return rows, numbers

    def _of_main_process(
        self, numbers: Sequence[int], lengths: Sequence[int], active: Mapping[str, list[Active]]
    ) -> dict[str, tuple[AnswerActivations, AnswerLayout]]:
        """What was read in the answers of all processes, dictionary by dictionary, in the main process; empty in the others."""
        all_numbers, all_lengths, *all_active = self._gathered(numbers, lengths, *active.values())
        if not self.trainer.accelerator.is_main_process:
            return {}
        layout = AnswerLayout(np.array(all_numbers), np.array(all_lengths))
        return {
            name: (AnswerActivations.from_tokens(*join(each)), layout)
            for name, each in zip(active, all_active, strict=True)
        }

    def _active(self, rows: Sequence[Answered]) -> dict[str, list[Active]]:
        return {
            dictionary.name: answer_activations(
                point, dictionary, rows, attention_sinks=self._attention_sinks
            )
            for dictionary, point in self._readers
        }

    @property
    def _own_sampling(self) -> Sampling:
        """The same batches of other prompts are sampled in other processes, and must not draw the same numbers."""
        accelerator = self.trainer.accelerator
        seed = self.sampling.seed * accelerator.num_processes + accelerator.process_index
        return dataclasses.replace(self.sampling, seed=seed)

    def _sample(self, prompts: Any, step: int) -> tuple[list[Answered], list[int]]:
        """Answers and the numbers of their prompts; the main process also keeps what else a look needs."""
        accelerator = self.trainer.accelerator
        tokenizer = tokenizer_of(self.trainer)
        process, processes = accelerator.process_index, accelerator.num_processes
        asked: list[Ids] = prompts_for(self.trainer, prompts, self.sampling)
        if len(asked) < processes:
            raise AuditError(
                f"There are {len(asked)} prompts to answer and {processes} processes; give each at least one."
            )
        share = asked[process::processes]
        sampling = self._own_sampling
        answers: Sequence[Sequence[Sequence[int]]] = sample_ids(
            policy_of(self.trainer), tokenizer, share, sampling, batch_size=_SAMPLED_TOGETHER
        )
        if prompts is None:
            answers = draw_within(answers, TOKENS_A_LOOK / processes, sampling.seed)
        answered = [(prompt, several) for prompt, several in zip(share, answers, strict=True) if len(several)]
        numbers = [
            process + processes * place for place, (_, several) in enumerate(answered) for _ in several
        ]
        rows = [(prompt, tuple(answer)) for prompt, several in answered for answer in several]
        active = self._active(rows)
        ends = np.cumsum([len(answer) for _, answer in rows])[:-1]
        log_probs = np.split(self._log_probs(rows), ends)
        all_numbers, all_rows, all_log_probs, *all_active = self._gathered(
            numbers, rows, log_probs, *active.values()
        )
        if accelerator.is_main_process:
            sampled = SampledAnswers(
                step=step,
                rows=all_rows,
                prompts=all_numbers,
                log_probs=np.concatenate(all_log_probs),
                active={name: join(each) for name, each in zip(active, all_active, strict=True)},
            )
            self._keep(sampled)
            if self._append is not None:
                for table, columns in sampled.tables():
                    self._append(table, columns)
        return all_rows, all_numbers

    def _keep(self, sampled: SampledAnswers) -> None:
        self._layout, self._log_probs_before = sampled.layout, sampled.log_probs
        self._activations = sampled.activations()

    def _log_probs(self, rows: Sequence[Answered]) -> np.ndarray:
        return answer_log_probs(policy_of(self.trainer), rows, self.sampling.temperature)

    def _gathered(self, numbers: Sequence[int], *columns: Sequence[Any]) -> list[list[Any]]:
        """What all processes have of their answers, in the order of the prompts' numbers: these, and each column."""
        parts = self._of_all_processes(list(zip(numbers, *columns, strict=True)))
        merged = sorted((each for part in parts for each in part), key=lambda each: each[0])
        return [list(column) for column in zip(*merged, strict=True)]

    def _of_all_processes(self, part: Any) -> list[Any]:
        return [part] if self.trainer.accelerator.num_processes == 1 else gather_object([part])

    def _from_main_process(self, value: Any) -> Any:
        return value if self.trainer.accelerator.num_processes == 1 else broadcast_object_list([value])[0]
