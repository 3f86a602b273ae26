"""The shield under LoRA and torch.compile: the gradient below it, and the weights it leads to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.worlds import HOOK_POINT, make_dictionary, make_model, make_tokenizer, pairs
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import FeatureShieldCallback, Flag, FlagSet
from trl_sae_audit.models.hook_points import resolve_hook_point

pytestmark = pytest.mark.newest

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length"), Flag("tiny", 7, "lists")])


class Capturing(TrainerCallback):
    """Keeps the gradients at the hook point, as they are after hooks put there earlier."""

    def __init__(self) -> None:
        self.gradients: list[Tensor] = []

    def on_train_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        def on_forward(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.gradients.append(gradient.clone()))

        resolve_hook_point(model, HOOK_POINT).module.register_forward_hook(on_forward)


def dpo(directory: Path, *callbacks: TrainerCallback, lora: bool = False, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    model: Any = make_model(tokenizer)
    if lora:
        torch.manual_seed(3)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(model, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model,
            make_model(tokenizer, seed=5),
            args=DPOConfig(
                output_dir=str(directory),
                per_device_train_batch_size=4,
                max_steps=3,
                max_length=64,
                learning_rate=1e-3,
                report_to="none",
                save_strategy="no",
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                seed=7,
                **overrides,
            ),
            train_dataset=pairs(12),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
    trainer.train()
    return trainer


def shield() -> FeatureShieldCallback:
    return FeatureShieldCallback(make_dictionary(), FLAGS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_under_lora_what_arrives_below_is_the_projection(checkpointing: bool, tmp_path: Path) -> None:
    before, after = Capturing(), Capturing()
    trainer = dpo(tmp_path, before, shield(), after, lora=True, gradient_checkpointing=checkpointing)
    assert len(before.gradients) == len(after.gradients) == 3
    rows = make_dictionary().directions[[3, 50, 7]].double()
    basis, _ = torch.linalg.qr(rows.T)
    for plain, shielded in zip(before.gradients, after.gradients, strict=True):
        expected = plain.double() - plain.double() @ basis @ basis.T
        assert (shielded.double() - expected).norm() <= 1e-6 * plain.double().norm()
        assert (shielded.double() @ rows.T).norm() <= 1e-6 * shielded.double().norm()
        assert (plain.double() @ rows.T).norm() > 0.05 * plain.double().norm()
    moved = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert moved
    assert all("lora" in name for name in moved)


def test_a_compiled_run_is_shielded_like_an_eager_one(tmp_path: Path) -> None:
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    runs = {
        "eager": dpo(tmp_path / "eager", shield(), lora=True),
        "compiled": dpo(tmp_path / "compiled", shield(), lora=True, **compiled),
        "unshielded": dpo(tmp_path / "unshielded", lora=True),
    }
    weights = {name: dict(run.model.named_parameters()) for name, run in runs.items()}
    changed = 0.0
    for name, value in weights["eager"].items():
        torch.testing.assert_close(weights["compiled"][name], value, rtol=0, atol=1e-5, msg=name)
        changed = max(changed, float((weights["unshielded"][name] - value).detach().abs().max()))
    assert changed > 1e-4
