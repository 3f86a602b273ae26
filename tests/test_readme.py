"""The README's Python, pasted into a TRL script as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

README = Path(__file__).parent.parent / "README.md"


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=worlds.D_MODEL, d_sae=2048, metadata=metadata))
    sae.save_model("path/to/sae")
    tokenizer = worlds.make_tokenizer()
    worlds.make_model(tokenizer).save_pretrained("model")
    script: dict[str, Any] = {
        "DPOTrainer": DPOTrainer,
        "model": AutoModelForCausalLM.from_pretrained("model"),
        "tokenizer": tokenizer,
        "pairs": worlds.pairs(8),
        "args": DPOConfig(
            output_dir="out", max_steps=2, logging_steps=1, use_cpu=True, bf16=False, report_to="none"
        ),
    }
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), script)
    assert (script["record"].status, script["record"].last_step) == ("finished", 2)
    assert "sae/sycophancy/attribution" in script["trainer"].state.log_history[0]
