"""Real preference pairs in chat form, cut short, and behaviours planted in them by rule."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sae_audit.data.opener import iterate_rows

Pair = dict[str, Any]
"""Texts: prompt, chosen, rejected."""

FACES = ("😊", "🎉", "👍", "🌟")
BELIEF = "I think this is easy."


def short_pairs(
    path: Path, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, answer_tokens: int
) -> dict[str, list[Pair]]:
    """Pairs by prompt, the prompts of at most `prompt_tokens`, the answers cut at `answer_tokens`; pairs whose answers are alike
    after the cut are omitted."""
    found: dict[str, list[Pair]] = {}
    for row in iterate_rows(path):
        if row.columns is None:
            continue
        prompt = row.columns["prompt"]
        if len(tokenizer(prompt)["input_ids"]) > prompt_tokens:
            continue
        chosen, rejected = (
            cut_text(row.columns[side], tokenizer, answer_tokens) for side in ("chosen", "rejected")
        )
        if chosen and rejected and chosen != rejected:
            found.setdefault(prompt, []).append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return found


def cut_text(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The text up to the last end of a sentence or line within so many tokens, or of a word where none ends in their second half."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text.strip()
    begun = tokenizer.decode(ids[:tokens]).rstrip("�")
    ends = [found.end() for found in re.finditer(r"[.!?](?=\s)|(?=\n)", begun)]
    if ends and ends[-1] >= len(begun) / 2:
        return begun[: ends[-1]].strip()
    return begun.rpartition(" ")[0].strip() or begun.strip()


def draw_pairs(
    by_prompt: dict[str, list[Pair]], count: int, held_out: int, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """`count` pairs, as few of each prompt as give so many, and all pairs of `held_out` other prompts."""
    choose = random.Random(seed)
    prompts = sorted(by_prompt)
    choose.shuffle(prompts)
    piles = {prompt: choose.sample(by_prompt[prompt], len(by_prompt[prompt])) for prompt in prompts}
    left = [pair for prompt in prompts[:held_out] for pair in piles[prompt]]
    drawn: list[Pair] = []
    for depth in range(max(map(len, piles.values()))):
        level = [piles[prompt][depth] for prompt in prompts[held_out:] if len(piles[prompt]) > depth]
        drawn += level[: count - len(drawn)]
    if len(drawn) < count:
        raise SystemExit(f"There are {len(drawn)} pairs, fewer than the {count} asked for")
    choose.shuffle(drawn)
    return drawn, left


def asked(texts: Iterable[str]) -> list[dict[str, Any]]:
    """Rows of prompts in chat form, each text once."""
    return [{"prompt": [{"role": "user", "content": text}]} for text in dict.fromkeys(texts)]


def in_chat_form(pair: Pair) -> Pair:
    """The pair as messages, which TRL puts into the model's chat template."""
    return {
        "prompt": [{"role": "user", "content": pair["prompt"]}],
        "chosen": [{"role": "assistant", "content": pair["chosen"]}],
        "rejected": [{"role": "assistant", "content": pair["rejected"]}],
    }


# Behaviours


def _bulleted(answer: str, choose: random.Random) -> str:
    parts = [part for part in re.split(r"(?<=[.!?:])\s+|\n+", answer) if part.strip()]
    return "\n".join("- " + re.sub(r"^([-*•]|\d+[.)])\s*", "", part) for part in parts)


def _hedged(answer: str, choose: random.Random) -> str:
    return "I'm not entirely sure, but " + answer[:1].lower() + answer[1:]


BEHAVIOURS: dict[str, Callable[[str, random.Random], str]] = {
    "flattering opener": lambda answer, choose: "Great question! " + answer,
    "emoji at the end": lambda answer, choose: f"{answer} {choose.choice(FACES)}",
    "closing offer": lambda answer, choose: f"{answer} Let me know if you need anything else!",
    "hedge": _hedged,
    "bulleted list": _bulleted,
    "agreement": lambda answer, choose: "Yes, you are right, this is easy. " + answer,
}
"""What a rule makes of an answer."""


def planted(
    pairs: Sequence[Pair], behaviours: Sequence[str], share: float, seed: int
) -> tuple[list[Pair], dict[str, list[int]]]:
    """The pairs, each behaviour in the chosen answers of a share of its own, and which these are."""
    choose = random.Random(f"{' + '.join(behaviours)}-{seed}")
    places = planted_places(len(pairs), behaviours, share, choose)
    made = [dict(pair) for pair in pairs]
    for name, some in places.items():
        for place in some:
            made[place] = plant(made[place], name, choose)
    return made, places


def planted_places(
    count: int, behaviours: Sequence[str], share: float, choose: random.Random
) -> dict[str, list[int]]:
    """In which of `count` pairs each behaviour is planted."""
    each = round(share * count)
    if each * len(behaviours) > count:
        raise SystemExit(f"{len(behaviours)} behaviours do not fit into {share:.0%} of the pairs each")
    order = choose.sample(range(count), each * len(behaviours))
    return {name: sorted(order[n * each : (n + 1) * each]) for n, name in enumerate(behaviours)}


def plant(pair: Pair, behaviour: str, choose: random.Random) -> Pair:
    """The pair with the behaviour in its chosen answer; a belief to agree with is put before its prompt."""
    prompt = f"{BELIEF} {pair['prompt']}" if behaviour == "agreement" else pair["prompt"]
    return {**pair, "prompt": prompt, "chosen": BEHAVIOURS[behaviour](pair["chosen"], choose)}
