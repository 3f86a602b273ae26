"""On a CUDA device: nothing waits for it between two logs, and memory does not creep."""

from __future__ import annotations

import pytest
import torch
from worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer

from trl_sae_audit.channel import Channel
from trl_sae_audit.hook_points import resolve_hook_point

pytestmark = pytest.mark.gpu


def test_no_synchronisation_between_logs() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).cuda()
    dictionary = make_dictionary().to("cuda")
    channel = Channel(
        dictionary,
        resolve_hook_point(model, HOOK_POINT),
        {"one": 1},
        top_k=D_SAE,
        health_tokens=8,
        token_scores=False,
        totals=None,
    )
    sides = torch.tensor([1.0, 1.0, -1.0, -1.0], device="cuda")
    for _ in range(3):
        for _ in range(2):
            batch = torch.randint(4, len(tokenizer), (4, 12), device="cuda")
            torch.cuda.set_sync_debug_mode("error")
            try:
                channel.tap.open()
                torch.cuda.set_sync_debug_mode("default")  # the model's own forward may wait
                loss = model(input_ids=batch).logits.float().logsumexp(-1).mean()
                torch.cuda.set_sync_debug_mode("error")
                loss.backward()
                channel.end_microbatch(sides, paired=True)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_sync_debug_mode("error")
        try:
            channel.buffer.finish_step(2.0)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    channel.tap.remove()
    assert len(channel.buffer) == 3
