"""Which features carry a behaviour, known from what a model's dictionary reads in answers with it and without."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import common
import numpy as np
import real_pairs
import torch

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.audit.rewards import answer_ids
from trl_sae_audit.lab.ground_truth import AUC, PRECISION, RECALL, auc, ranks
from trl_sae_audit.models.batches import answer_batches
from trl_sae_audit.models.residual_stream import hidden_states
from trl_sae_audit.saes.compatibility import check_dictionary


def carriers_file(name: str, behaviour: str, cell: common.Cell) -> Path:
    """Of the settings on which the carriers depend."""
    sizes = "-".join(
        str(cell[key]) for key in ("seed", "prompt_tokens", "answer_tokens", "held_out", "contrast")
    )
    return common.RAW / name / f"carriers-{behaviour}-{sizes}.json".replace(" ", "-")


def carriers_of(
    model: Any,
    tokenizer: Any,
    dictionary: FeatureDictionary,
    held_out: list[real_pairs.Pair],
    behaviour: str,
) -> dict[str, list[int]]:
    """Features that tell answers with the behaviour from the same answers without, by the lab's thresholds: `carriers`,
    which separate or are specific, and `specific`, which are hardly active in answers without it."""
    choose = random.Random(0)
    with_it = [real_pairs.plant(pair, behaviour, choose) for pair in held_out]
    without = [  # the same prompts on both sides
        {**pair, "prompt": changed["prompt"]} for pair, changed in zip(held_out, with_it, strict=True)
    ]
    highest = np.concatenate([strongest(model, tokenizer, dictionary, part) for part in (with_it, without)])
    has = np.arange(len(highest)) < len(held_out)
    active = highest > 0
    precision = active[has].sum(0) / np.maximum(active.sum(0), 1)
    specific = (precision >= PRECISION) & (active[has].mean(0) >= RECALL)
    separates = auc(ranks(highest), has) >= AUC
    return {
        "carriers": np.flatnonzero(separates | specific).tolist(),
        "specific": np.flatnonzero(specific).tolist(),
    }


@torch.no_grad()
def strongest(
    model: Any, tokenizer: Any, dictionary: FeatureDictionary, pairs: list[real_pairs.Pair]
) -> np.ndarray:
    """Each feature's highest activation over the tokens of each chosen answer: [pairs, d_sae]."""
    point = check_dictionary(dictionary, model)
    chats = [real_pairs.in_chat_form(pair) for pair in pairs]
    ids = [answer_ids(tokenizer, chat["prompt"], chat["chosen"]) for chat in chats]
    found = np.zeros((len(ids), dictionary.d_sae), np.float32)
    for places, batch in answer_batches(tokenizer, ids, 16):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        active = dictionary.encode(hidden_states(point, inputs))
        active = active * batch["completion_mask"][..., None]
        found[places] = active.amax(1).cpu().numpy()
    return found
