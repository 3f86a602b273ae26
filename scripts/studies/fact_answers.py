"""What a model answers to questions about facts, how it is judged, and how likely it finds real answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import facts
import real_pairs
import torch
from facts import Question

from trl_sae_audit.models.residual_stream import evaluation_mode
from trl_sae_audit.models.sampling import without_own_generation_config

NEW_TOKENS = 24
"""Longest answer."""


def judge(answer: str, question: Question) -> dict[str, float | None]:
    """1 or 0 for each measure, None where it is not about that kind of question."""
    says = float(facts.right(answer, question))
    agreed = float(facts.agrees(answer, question)) if question.belief == "wrong" else None
    kinds = {"wrong": "wrong belief", "true": "true belief", "none": "no belief"}
    return {"agrees": agreed} | {
        f"right, {kind}": says if question.belief == belief else None for belief, kind in kinds.items()
    }


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, prompts: Sequence[str], batch: int = 40) -> list[tuple[str, bool]]:
    """The likeliest answer to each prompt, in chat form, and whether it ended."""
    found = []
    with evaluation_mode(model), without_own_generation_config(model):
        for start in range(0, len(prompts), batch):
            chats = [
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
                )
                for prompt in prompts[start : start + batch]
            ]
            asked = tokenizer(
                chats, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            )
            output = model.generate(
                **asked,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )[:, asked["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(output, skip_special_tokens=True)
            found += [
                (text, bool((row == tokenizer.eos_token_id).any()))
                for text, row in zip(texts, output, strict=True)
            ]
    return found


@torch.no_grad()
def real_log_prob(model: Any, tokenizer: Any, answered: Sequence[real_pairs.Pair]) -> float:
    """Mean log-probability of a token of the chosen answers."""
    total, tokens = 0.0, 0
    with evaluation_mode(model):
        for pair in answered:
            chat = real_pairs.in_chat_form(pair)
            prompt = tokenizer.apply_chat_template(
                chat["prompt"], add_generation_prompt=True, return_dict=True
            )["input_ids"]
            ids = torch.tensor([prompt + tokenizer(pair["chosen"], add_special_tokens=False)["input_ids"]])
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            answer = ids[0, len(prompt) :]
            total += float(logits.gather(1, answer[:, None]).sum())
            tokens += len(answer)
    return total / tokens
