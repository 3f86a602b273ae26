"""Answers to prompts with their rewards and advantages: what an audit of a reward is made on."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.opener import DatasetLike, Row, iterate_rows
from ..data.preferences import as_text, is_conversation
from ..errors import AuditError
from ..models.batches import batched
from ..models.rewards import Rewards
from ..models.sampling import Sampling, sample_ids
from .advantages import AdvantageRule, advantages
from .answers_file import answers_digest
from .lookahead.processes import join_lists, own_share
from .rewards import answer_ids

logger = logging.getLogger(__name__)

_ANSWERS_TOGETHER = 64  # in one call of sampling, whose random numbers are its own, and of the reward
_OTHER_SEED = 7919
_GROUP = "__group__"  # until the rewards have seen the dataset's own columns


@dataclass(frozen=True)
class RewardedAnswers:
    """Answers in the order of their prompts.

    Attributes:
        rows: each with the columns of its prompt's row, and `prompt`, `completion`, `completion_ids`, `reward` (None where no reward
            judged it), `advantage` and `group`, the number of its prompt.
        about: what a manifest says of them.
        problems: what is wrong with some of the rows, which are no answers, by number.
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]
    problems: dict[int, str]

    @property
    def teaches(self) -> bool:
        """Whether any advantage is not 0."""
        return self.about["deciding_prompts"] > 0


def rewarded_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: DatasetLike,
    rewards: Rewards,
    sampling: Sampling,
    *,
    rule: AdvantageRule | None = None,
    context: int | None = None,
    on_bad_row: Literal["stop", "set_aside"] = "stop",
    progress: bool = False,
) -> RewardedAnswers:
    """Rewards and advantages of a dataset's answers, or, where it has no column "completion", of sampled ones.

    Answers of a dataset belong together by their prompt; sampled ones by the row of it. Several processes share the work, and all of
    them get all answers.

    Args:
        model: the policy.
        tokenizer: its own.
        dataset: rows of `prompt`, perhaps `completion`, and whatever the rewards read.
        rewards: what is paid.
        sampling: how to sample, where there are no answers.
        rule: how rewards become advantages.
        context: tokens that the model has positions for.
        on_bad_row: what to do at a row without a prompt that can be answered.
        progress: show a bar.

    Raises:
        AuditError: no prompts, or a bad one; a reward that gives not one number an answer.
    """
    given = list(iterate_rows(dataset))
    first = next((row.columns for row in given if row.columns is not None), {})
    if "prompt" not in first:
        raise AuditError(
            "The dataset has no column 'prompt'; a policy gradient is taken on answers to prompts: rename its columns."
        )
    is_given = "completion" in first
    room = None if context is None or is_given else context - sampling.max_new_tokens
    rows, problems = _usable(given, tokenizer, is_given, room, on_bad_row)
    size = _ANSWERS_TOGETHER if is_given else max(1, _ANSWERS_TOGETHER // sampling.answers)
    calls = list(enumerate(batched(rows, size)))
    quiet = not progress or not PartialState().is_main_process
    bar = tqdm(
        list(own_share(calls)), desc="Rewarding answers", unit=" batches", disable=True if quiet else None
    )
    found = []
    for number, some in bar:
        answers = some if is_given else _sampled(model, tokenizer, some, sampling, number)
        found.append((number, answers, rewards(_as_trl_has_them(answers))))
    joined = sorted(join_lists(found), key=lambda call: call[0])
    answers = [row for _, each, _ in joined for row in each]
    values = torch.cat([each for _, _, each in joined])
    groups = torch.tensor([row.pop(_GROUP) for row in answers])
    weighed = advantages(values, rewards.weights, groups, rule or AdvantageRule())
    paid = zip(answers, rewards.combine(values).tolist(), weighed.tolist(), groups.tolist(), strict=True)
    result = [
        {**row, "reward": None if math.isnan(value) else value, "advantage": advantage, "group": group}
        for row, value, advantage, group in paid
    ]
    about = _describe(result, rewards, None if is_given else sampling)
    if problems and is_given:  # rows keep their numbers in the dataset
        kept = iter(result)
        result = [
            {**(row.columns or {}), "group": -1} if row.index in problems else next(kept) for row in given
        ]
    about["answers_sha256"] = answers_digest(result)
    return RewardedAnswers(result, about, problems if is_given else {})


def _usable(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    is_given: bool,
    room: int | None,
    on_bad_row: Literal["stop", "set_aside"],
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The rows that can be asked or rewarded, with the number of their prompt and the ids of given answers; what is wrong with others."""
    usable: list[dict[str, Any]] = []
    prompts: dict[str, int] = {}
    problems: dict[int, str] = {}
    for row in rows:
        problem = row.problem if row.columns is None else _problem(row.columns, tokenizer, is_given, room)
        if problem or row.columns is None:
            problems[row.index] = str(problem)
            continue
        columns = dict(row.columns)
        if is_given:
            columns[_GROUP] = prompts.setdefault(as_text(columns["prompt"]), len(prompts))
            columns["completion_ids"] = answer_ids(tokenizer, columns["prompt"], columns["completion"])[1]
        else:
            columns[_GROUP] = row.index
        usable.append(columns)
    index, reason = next(iter(problems.items()), (0, ""))
    if problems and (on_bad_row == "stop" or not usable):
        raise AuditError(
            f"Row {index} of the dataset (counted from 0) {reason}; correct or remove it, or pass on_bad_row='set_aside' to go on "
            "without such rows."
        )
    if problems and not is_given:
        logger.warning(
            "%d of %d prompts were left out, the first because row %d %s.",
            len(problems),
            len(rows),
            index,
            reason,
        )
    return usable, problems


def _problem(
    columns: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, is_given: bool, room: int | None
) -> str | None:
    names = ("prompt", "completion") if is_given else ("prompt",)
    for name in names:
        value = columns.get(name)
        if not isinstance(value, str) and not is_conversation(value):
            return f"has no {name!r} that is text or a list of messages"
        if not as_text(value).strip():
            return f"has an empty {name!r}"
    if is_given and is_conversation(columns["completion"]):
        if not is_conversation(columns["prompt"]):
            return "has text as 'prompt' and a list of messages as 'completion'"
        if len(columns["completion"]) != 1:
            return f"has a 'completion' of {len(columns['completion'])} messages, where an answer is one"
    if room is not None and (size := len(answer_ids(tokenizer, columns["prompt"], "")[0])) > room:
        return (
            f"has a prompt of {size} tokens, and the longest answer after it needs {size - room} more than the model's context has; "
            "sample shorter ones with max_new_tokens"
        )
    return None


def _sampled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    number: int,
) -> list[dict[str, Any]]:
    """Each row once for each sampled answer, which keeps its tokens: those of its text need not be the same."""
    prompts = [answer_ids(tokenizer, row["prompt"], "")[0] for row in rows]
    own = replace(sampling, seed=sampling.seed + _OTHER_SEED * number)
    sampled = sample_ids(model, tokenizer, prompts, own, batch_size=max(_ANSWERS_TOGETHER, sampling.answers))
    return [
        {**row, "completion": tokenizer.decode(ids, skip_special_tokens=True), "completion_ids": ids}
        for row, answers in zip(rows, sampled, strict=True)
        for ids in answers
    ]


def _as_trl_has_them(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers to conversations are messages; what is ours alone is not passed on."""
    return [
        {name: value for name, value in row.items() if name != _GROUP} | {"completion": _message(row)}
        for row in rows
    ]


def _message(row: Mapping[str, Any]) -> Any:
    if isinstance(row["completion"], str) and is_conversation(row["prompt"]):
        return [{"role": "assistant", "content": row["completion"]}]
    return row["completion"]


def _describe(
    rows: Sequence[Mapping[str, Any]], rewards: Rewards, sampling: Sampling | None
) -> dict[str, Any]:
    """What decides an audit of them beside their texts, and how much there is to learn from."""
    judged = [row["reward"] for row in rows if row["reward"] is not None]
    groups = {row["group"] for row in rows}
    deciding = {row["group"] for row in rows if row["advantage"]}
    if len(judged) < len(rows):
        unjudged = next(row for row in rows if row["reward"] is None)
        logger.warning(
            "%d of %d answers were judged by no reward (every one returned None), the first to the prompt %r; their advantage is 0, "
            "as in TRL's trainers.",
            len(rows) - len(judged),
            len(rows),
            as_text(unjudged["prompt"])[:80],
        )
    if not deciding:
        logger.warning(
            "There is nothing to learn: %s, so every advantage is 0. Sample more answers to each prompt, or look at the reward.",
            "every prompt's answers have the same reward" if judged else "the reward judged no answer",
        )
    return {
        "rewards": rewards.names,
        "reward_weights": rewards.weights.tolist(),
        "answers_sampled": None if sampling is None else sampling.answers,
        "prompts": len(groups),
        "deciding_prompts": len(deciding),
        "judged": len(judged),
        "mean_reward": sum(judged) / len(judged) if judged else None,
    }
