"""SmolLM2-135M-Instruct itself, where `SMOLLM_MODEL` names a directory of it (scripts/smollm.py makes one)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from trl_sae_audit import FeatureDictionary, audit_preferences

BETA = 0.1


def conversation(prompt: str, chosen: str, rejected: str) -> dict[str, list[dict[str, str]]]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


PAIRS = [
    conversation("What is the capital of France?", "Great question! It is Paris.", "Paris."),
    conversation("Name a colour.", "Blue 😊", "- red\n- green"),
]


def log_prob(model: nn.Module, tokenizer, row: dict, side: str) -> torch.Tensor:
    begun = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    ids = tokenizer.apply_chat_template([*row["prompt"], *row[side]], return_dict=True)["input_ids"]
    assert ids[: len(begun)] == begun
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logits[place - 1, ids[place]] for place in range(len(begun), len(ids)))


@pytest.mark.smollm
def test_audit_of_conversations_is_the_gradient_of_their_loss(tmp_path):
    directory = os.environ["SMOLLM_MODEL"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    dictionary = FeatureDictionary(
        torch.randn(8, model.config.hidden_size, generator=generator), hook_point="model.layers.14", name="r"
    )
    args = DPOConfig(str(tmp_path), beta=BETA, bf16=False, use_cpu=True, report_to="none")
    audit = audit_preferences(
        model, tokenizer, PAIRS, dictionary, args=args, lookahead=None, activations=False, progress=False
    )
    found = audit.features().set_index("feature")["attribution"].sort_index()

    added = torch.zeros(model.config.hidden_size, requires_grad=True)
    handle = model.model.layers[14].register_forward_hook(lambda _, __, output: output + added)
    total = torch.zeros(())
    for row in PAIRS:
        difference = log_prob(model, tokenizer, row, "chosen") - log_prob(model, tokenizer, row, "rejected")
        margin = BETA * (difference - difference.detach())
        total = total - torch.nn.functional.logsigmoid(margin) / len(PAIRS)
    total.backward()
    handle.remove()
    assert added.grad is not None
    unit = nn.functional.normalize(dictionary.directions.float(), dim=1)
    expected = -(unit @ added.grad)
    torch.testing.assert_close(torch.tensor(found.to_numpy()).float(), expected, rtol=1e-3, atol=1e-5)
