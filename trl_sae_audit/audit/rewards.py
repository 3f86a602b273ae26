"""Audits of rewards: the policy gradient of a reward on answers, and a reward model itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig

from ..data.opener import Row
from ..data.preferences import as_text, is_conversation
from ..errors import AuditError
from ..models.batches import pad_answers
from ..models.tokenizers import Processing, padding_id
from .objectives import PreferenceLoss, TokenizedExample


class PolicyGradientLoss:
    """`L_i = -A_i · log π(answer_i | prompt_i)`, the first step of GRPO, RLOO or PPO up to a constant factor.

    Args:
        tokenizer: of the policy.
        max_length: tokens at which prompt and answer are cut; None for no cut.
        mean_over_tokens: divide by the answer's tokens, as GRPO's loss types "grpo" and "sapo" do.
        about: what else the manifest says of the rewards.
    """

    name = "policy_gradient"
    sides = ("reinforced", "suppressed")
    rows_per_example = 1

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int | None = None,
        *,
        mean_over_tokens: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.max_length = max_length
        self._mean_over_tokens = mean_over_tokens
        self._about = dict(about or {})
        self._tokenizer = tokenizer
        self._pad = padding_id(tokenizer)

    def tokenize(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[TokenizedExample]:
        examples = []
        for number, columns in rows:
            prompt, answer = answer_ids(self._tokenizer, columns["prompt"], columns["completion"])
            answer = columns.get("completion_ids") or answer
            if self.max_length is not None and len(prompt) >= self.max_length:
                continue
            features = {"prompt": prompt, "answer": answer, "advantage": float(columns["advantage"])}
            examples.append(TokenizedExample(number, features, len(prompt) + len(answer)))
        return examples

    def collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        answered = [(example.features["prompt"], example.features["answer"]) for example in examples]
        if self.max_length is not None:
            answered = [(prompt, answer[: self.max_length - len(prompt)]) for prompt, answer in answered]
        advantages = torch.tensor(
            [example.features["advantage"] for example in examples], dtype=torch.float32
        )
        return pad_answers(answered, self._pad) | {"advantages": advantages}

    def weights(self, batch: Mapping[str, Tensor], log_probs: Tensor, reference: Tensor) -> Tensor:
        asked = batch["advantages"].to(log_probs)
        if self._mean_over_tokens:
            asked = asked / batch["completion_mask"].sum(1).to(log_probs)
        return -asked[:, None].expand_as(log_probs)

    def row_sides(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["advantages"].sign().to(torch.int8)

    def prompt_of(self, example: TokenizedExample) -> tuple[int, ...]:
        return tuple(example.features["prompt"])

    def describe(self) -> dict[str, Any]:
        return {"objective": self.name, "max_length": self.max_length} | self._about


class RewardLoss(PreferenceLoss):
    """Less the mean reward of a pair's answers; tokenized as TRL tokenizes pairs.

    Raises:
        AuditError: a model that gives not one number.
    """

    name = "reward"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        model: nn.Module,
        max_length: int | None,
        processing: Processing | None = None,
    ) -> None:
        config = next(part for part in model.modules() if isinstance(part, PreTrainedModel)).config
        if config.num_labels != 1:
            raise AuditError(
                f"The reward model has {config.num_labels} outputs where a reward is one number; load it with num_labels=1."
            )
        args = DPOConfig("unused", max_length=max_length, bf16=False, report_to="none")
        super().__init__(tokenizer, args, processing)

    @property
    def padding(self) -> int:
        """What batches are padded with."""
        return self.trainer.data_collator.pad_token_id

    def describe(self) -> dict[str, Any]:
        return {"objective": self.name, "max_length": self.max_length}


class AnswerCheck:
    """Says what is wrong with a row of prompt, completion and advantage.

    Args:
        problems: what is known to be wrong with some rows, by number.
    """

    def __init__(self, problems: Mapping[int, str] | None = None) -> None:
        self._problems = problems or {}

    def __call__(self, row: Row) -> str | None:
        if row.index in self._problems:
            return self._problems[row.index]
        if row.columns is None:
            return row.problem
        for name in ("prompt", "completion"):
            value = row.columns.get(name)
            if not isinstance(value, str) and not is_conversation(value):
                return f"has no {name!r} that is text or a list of messages"
        if not row.columns.get("completion_ids") and not as_text(row.columns["completion"]).strip():
            return "has an empty 'completion'"
        if not math.isfinite(row.columns["advantage"]):
            return "has an advantage that is not finite"
        return None


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: Any, answer: Any) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as a trainer that samples shows it to the policy, and of an answer to it, with its end."""
    if is_conversation(prompt):
        begun = list(
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        )
    else:
        begun = list(tokenizer(prompt)["input_ids"])
    text = answer if isinstance(answer, str) else answer[-1].get("content") or ""
    ended = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    end = tokenizer.eos_token_id
    return begun, ended if end is None or ended[-1:] == [end] else [*ended, end]
