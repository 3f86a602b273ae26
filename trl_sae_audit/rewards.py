"""Audits of rewards: the policy gradient of a reward on answers, and a reward model itself."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from .errors import AuditError
from .objectives import PreferenceLoss, TokenizedExample
from .preferences import Row, Source, as_text, is_conversation, iterate_rows
from .residual_stream import evaluation_mode
from .sampling import Sampling, sample_ids


class RewardFunction(Protocol):
    """A reward as TRL's GRPO and RLOO trainers call it: one number for each completion."""

    def __call__(
        self, prompts: list[Any], completions: list[Any], **columns: list[Any]
    ) -> Sequence[float | None]: ...


Reward: TypeAlias = RewardFunction | PreTrainedModel


class PolicyGradientLoss:
    """`L_i = -A_i · log π(answer_i | prompt_i)`, the first step of GRPO without length normalisation, RLOO or PPO.

    Args:
        tokenizer: of the policy.
        max_length: tokens at which prompt and answer are cut; None for no cut.
    """

    name = "policy_gradient"
    sides = ("reinforced", "suppressed")
    rows_per_example = 1

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> None:
        self.max_length = max_length
        self._tokenizer = tokenizer
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def tokenize(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[TokenizedExample]:
        examples = []
        for number, columns in rows:
            prompt, answer = answer_ids(self._tokenizer, columns["prompt"], columns["completion"])
            if self.max_length is not None and len(prompt) >= self.max_length:
                continue
            features = {"prompt": prompt, "answer": answer, "advantage": float(columns["advantage"])}
            examples.append(TokenizedExample(number, features, len(prompt) + len(answer)))
        return examples

    def collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        sequences = [
            (example.features["prompt"] + example.features["answer"])[: self.max_length]
            for example in examples
        ]
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad)
        attended = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
            attended[row, : len(sequence)] = 1
        answered = attended.clone()
        for row, example in enumerate(examples):
            answered[row, : len(example.features["prompt"])] = 0
        advantages = torch.tensor([example.features["advantage"] for example in examples])
        return {
            "input_ids": ids,
            "attention_mask": attended,
            "completion_mask": answered,
            "advantages": advantages,
        }

    def weights(self, batch: Mapping[str, Tensor], log_probs: Tensor, reference: Tensor) -> Tensor:
        return -batch["advantages"].to(log_probs)[:, None].expand_as(log_probs)

    def row_sides(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["advantages"].sign().to(torch.int8)

    def describe(self) -> dict[str, Any]:
        return {"objective": self.name, "max_length": self.max_length}


class RewardLoss(PreferenceLoss):
    """Less the mean reward of a pair's answers; tokenized as TRL tokenizes pairs.

    Raises:
        AuditError: a model that gives not one number, or cannot find an answer's last token.
    """

    name = "reward"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module, max_length: int | None) -> None:
        config = next(part for part in model.modules() if isinstance(part, PreTrainedModel)).config
        if config.num_labels != 1:
            raise AuditError(
                f"The reward model has {config.num_labels} outputs where a reward is one number; load it with num_labels=1."
            )
        if config.get_text_config().pad_token_id is None:
            raise AuditError(
                "The reward model's config has no pad_token_id, so it cannot find an answer's last token in a batch; set "
                "model.config.pad_token_id = tokenizer.pad_token_id."
            )
        super().__init__(tokenizer, DPOConfig("unused", max_length=max_length, bf16=False, report_to="none"))

    def describe(self) -> dict[str, Any]:
        return {"objective": self.name, "max_length": self.max_length}


class AnswerCheck:
    """Says what is wrong with a row of prompt, completion and advantage."""

    def __call__(self, row: Row) -> str | None:
        if row.columns is None:
            return row.problem
        for name in ("prompt", "completion"):
            value = row.columns.get(name)
            if not isinstance(value, str) and not is_conversation(value):
                return f"has no {name!r} that is text or a list of messages"
        if not as_text(row.columns["completion"]).strip():
            return "has an empty 'completion'"
        if not math.isfinite(row.columns["advantage"]):
            return "has a reward that is not finite"
        return None


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as a trainer that samples shows it to the policy, and of an answer to it."""
    if is_conversation(prompt):
        begun = list(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    else:
        begun = list(tokenizer(prompt)["input_ids"])
    text = answer if isinstance(answer, str) else answer[-1].get("content") or ""
    ended = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return begun, [*ended, tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else ended


def rewarded_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    reward: Reward,
    sampling: Sampling | None,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Rows of prompt, completion, reward and advantage, in memory.

    The advantage is the reward less the mean over the prompt's answers; where every prompt has one answer only, less
    the mean of all. Answers are sampled, `sampling.answers` a prompt, where the dataset has no "completion".

    Raises:
        AuditError: no prompts; a reward that gives not one number an answer.
    """
    rows = [row.columns for row in iterate_rows(dataset) if row.columns is not None]
    if not rows or "prompt" not in rows[0]:
        raise AuditError(
            "The dataset has no column 'prompt'; a policy gradient is taken on answers to prompts: rename its columns."
        )
    if "completion" not in rows[0]:
        rows = _sampled(model, tokenizer, rows, sampling or Sampling(), batch_size)
    rewards = _rewards(reward, tokenizer, rows, batch_size)
    groups: dict[str, list[float]] = defaultdict(list)
    for row, value in zip(rows, rewards, strict=True):
        if math.isfinite(value):
            groups[as_text(row["prompt"])].append(value)
    alone = all(len(values) == 1 for values in groups.values())
    known = [value for values in groups.values() for value in values]
    overall = sum(known) / len(known) if known else 0.0
    means = {prompt: overall if alone else sum(values) / len(values) for prompt, values in groups.items()}
    return [
        {**row, "reward": value, "advantage": value - means.get(as_text(row["prompt"]), 0.0)}
        for row, value in zip(rows, rewards, strict=True)
    ]


def _rewards(
    reward: Reward, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], batch_size: int
) -> list[float]:
    if isinstance(reward, PreTrainedModel):
        return _model_rewards(reward, tokenizer, rows, batch_size)
    others = {
        name: [row.get(name) for row in rows] for name in rows[0] if name not in ("prompt", "completion")
    }
    found = reward(
        prompts=[row["prompt"] for row in rows], completions=[row["completion"] for row in rows], **others
    )
    if len(found) != len(rows):
        raise AuditError(
            f"The reward gave {len(found)} numbers for {len(rows)} answers; return one for each."
        )
    return [math.nan if value is None else float(value) for value in found]


@torch.no_grad()
def _model_rewards(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> list[float]:
    loss = PolicyGradientLoss(tokenizer)
    examples = loss.tokenize([(number, {**row, "advantage": 0.0}) for number, row in enumerate(rows)])
    values: list[float] = []
    with evaluation_mode(model):
        for start in range(0, len(examples), batch_size):
            batch = loss.collate(examples[start : start + batch_size])
            inputs = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            values += model(**inputs).logits[:, 0].float().tolist()
    return values


def _sampled(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    sampling: Sampling,
    batch_size: int,
) -> list[dict[str, Any]]:
    """Each row once for each sampled answer."""
    prompts = [answer_ids(tokenizer, row["prompt"], "")[0] for row in rows]
    sampled = sample_ids(model, tokenizer, prompts, sampling, batch_size=batch_size)
    return [
        {**row, "completion": tokenizer.decode(answer, skip_special_tokens=True)}
        for row, answers in zip(rows, sampled, strict=True)
        for answer in answers
    ]
