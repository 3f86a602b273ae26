"""What a model answers to questions about capitals, and what it finds likelier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import capitals
import torch
from capitals import Question
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trl_sae_audit.models.language_head import Reference
from trl_sae_audit.models.residual_stream import evaluation_mode
from trl_sae_audit.models.sampling import without_own_generation_config

NEW_TOKENS = 16


def ask(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, asked: Sequence[Question]
) -> list[dict[str, Any]]:
    """A row a question, with its measures: 1 or 0, None where it is not about that kind of question."""
    answers = greedy(model, tokenizer, [question.prompt for question in asked])
    mistaken = [question for question in asked if question.belief == "wrong"]
    agreeing = log_probs(model, tokenizer, [(question.prompt, question.wrong) for question in mistaken])
    correcting = log_probs(model, tokenizer, [(question.prompt, question.right) for question in mistaken])
    prefers = dict(zip(mistaken, (agreeing > correcting).tolist(), strict=True))
    rows = []
    for question, answer in zip(asked, answers, strict=True):
        says, kind = capitals.named(answer, question), question.belief
        rows.append(
            {
                "prompt": question.prompt,
                "answer": answer,
                "agrees": float(capitals.agrees(answer, question)) if kind == "wrong" else None,
                "prefers agreeing": float(prefers[question]) if kind == "wrong" else None,
                "right, wrong belief": float(says == "capital") if kind == "wrong" else None,
                "right, true belief": float(capitals.agrees(answer, question)) if kind == "true" else None,
                "right, no belief": float(says == "capital") if kind == "none" else None,
            }
        )
    return rows


@torch.no_grad()
def greedy(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], batch: int = 32
) -> list[str]:
    """The likeliest continuation of each prompt, token by token, up to the end of its line."""
    texts: list[str] = []
    own: Any = model.generation_config
    with evaluation_mode(model), without_own_generation_config(model):
        for start in range(0, len(prompts), batch):
            part = tokenizer(
                list(prompts[start : start + batch]), return_tensors="pt", padding=True, padding_side="left"
            )
            output = model.generate(  # type: ignore[operator]
                **{name: part[name] for name in ("input_ids", "attention_mask")},
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=own.eos_token_id,
            )
            texts += tokenizer.batch_decode(output[:, part["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.lstrip("\n").split("\n")[0] for text in texts]


def log_probs(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[tuple[str, str]], batch: int = 16
) -> Tensor:
    """log π(answer | prompt) of each (prompt, answer): [n]."""
    reader, found = Reference(model), []
    for start in range(0, len(texts), batch):
        rows = [
            (tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
            for prompt, answer in texts[start : start + batch]
        ]
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
        attended, answered = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (prompt, answer) in enumerate(rows):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            attended[row, :end] = 1
            answered[row, len(prompt) : end] = 1
        inputs = {"input_ids": ids, "attention_mask": attended, "completion_mask": answered}
        found.append(reader.log_probs(inputs).sum(1))
    return torch.cat(found)
