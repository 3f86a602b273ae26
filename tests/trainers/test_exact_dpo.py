"""The recorded scores equal a float64 autograd reference, however the DPO step is computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.reference import (
    Reference,
    StepRecorder,
    divided_by_accelerate,
    dpo_loss,
    recorded,
    relative_error,
    row_gradients,
    sequence_logps,
)
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer, pairs
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import AuditError, FeatureAttributionCallback, RunRecord

BETA = 0.5
HIDES_COMPILED_LAYERS = Version(transformers.__version__) < Version("5.4")


@dataclass
class Case:
    arguments: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] | None = None
    padded: bool = True
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    tolerance: float = 1e-5


CASES = {
    "plain": Case(),
    "accumulation with a last short window": Case({"gradient_accumulation_steps": 3}),
    "no checkpointing": Case({"gradient_checkpointing": False}),
    "reentrant checkpointing": Case({"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "non-reentrant checkpointing": Case({"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    "LoRA": Case(lora={}),
    "LoRA above the hook only": Case(lora={"layers_to_transform": [2]}),
    "LoRA above the hook, no checkpointing": Case(
        {"gradient_checkpointing": False}, lora={"layers_to_transform": [2]}
    ),
    "LoRA, reentrant": Case({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, lora={}),
    "unpadded": Case(padded=False),
    "precomputed reference": Case({"precompute_ref_log_probs": True}),
    "bf16 weights": Case(dtype=torch.bfloat16, tolerance=0.06),
    "gradient scaler": Case({"gradient_accumulation_steps": 3}, scale=1024.0),
    "compiled": Case({"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "compiled, no checkpointing": Case(
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": False}
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_scores_equal_float64_autograd(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    tokenizer = make_tokenizer()
    model, reference_model = _models(tokenizer, case)
    dictionary = make_dictionary()
    callback = FeatureAttributionCallback(
        dictionary, tmp_path / "record", watch={"one": 1, "two": 2}, top_k=D_SAE, examples=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = DPOTrainer(
            model,
            reference_model,
            args=_arguments(tmp_path, **case.arguments),
            train_dataset=pairs(10, padded=case.padded),
            processing_class=tokenizer,
        )
    if case.scale is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=case.scale)
    recorder = StepRecorder()
    recorder.watch(trainer)
    trainer.add_callback(callback)
    if "torch_compile" in case.arguments and HIDES_COMPILED_LAYERS:
        with pytest.raises(AuditError, match="an old transformers hides the layers of a compiled model"):
            trainer.train()
        return
    trainer.train()

    record = RunRecord.load(tmp_path / "record")
    steps, examples = record.steps(), record.table("examples")
    policy, reference_model = (model.double() for model in _models(tokenizer, case))
    assert len(recorder.steps) == (2 if "gradient_accumulation_steps" in case.arguments else 5)
    for step, microbatches in enumerate(recorder.steps, start=1):
        expected = _reference(policy, reference_model, microbatches, divided_by_accelerate(trainer))
        for column, values in expected.scores(dictionary).items():
            error = relative_error(recorded(steps, step, column), values)
            assert error <= case.tolerance, (step, column, error)
        one = examples[(examples["step"] == step) & (examples["feature"] == 1)]["attribution"].to_numpy()
        contributions = (-torch.cat(expected.examples) @ dictionary.directions.double().T).numpy()
        # Of the examples' scores in any feature: a single feature's may nearly cancel, and then is mostly rounding.
        assert np.abs(one - contributions[:, 1]).max() <= case.tolerance * np.abs(contributions).max()
        parts = recorded(steps, step, "chosen") + recorded(steps, step, "rejected")
        assert relative_error(parts, recorded(steps, step, "attribution")) <= 1e-5
        assert recorded(steps, step, "attribution")[1] == pytest.approx(one.sum(), rel=1e-4)


def _models(tokenizer: Any, case: Case) -> tuple[Any, Any]:
    """Policy and reference model, the same at every call; the learning rate is 0, so they stay so."""
    model = make_model(tokenizer)
    if case.lora is not None:
        torch.manual_seed(3)
        model = get_peft_model(
            model,
            LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, **case.lora),
        )
    return model.to(case.dtype), make_model(tokenizer, seed=5).to(case.dtype)


def test_the_cut_into_microbatches_does_not_matter(tmp_path: Path) -> None:
    attribution = {}
    for size, accumulation in ((6, 1), (2, 3), (1, 6)):
        callback = FeatureAttributionCallback(make_dictionary(), tmp_path / f"record{size}", top_k=D_SAE)
        tokenizer = make_tokenizer()
        trainer = DPOTrainer(
            make_model(tokenizer),
            make_model(tokenizer, seed=5),
            args=_arguments(
                tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
            ),
            train_dataset=pairs(6),
            processing_class=tokenizer,
            callbacks=[callback],
        )
        trainer.train()
        steps = RunRecord.load(tmp_path / f"record{size}").steps()
        attribution[size] = {
            name: recorded(steps, 1, name) * divided_by_accelerate(trainer)
            for name in ("attribution", "standard_error")
        }
    for size in (2, 1):
        for name, values in attribution[size].items():
            assert relative_error(values, attribution[6][name]) <= 1e-5


def _arguments(tmp_path: Path, **overrides: Any) -> DPOConfig:
    return DPOConfig(
        **{
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 2,
            "num_train_epochs": 1,
            "learning_rate": 0.0,
            "beta": BETA,
            "logging_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "max_length": 64,
            "disable_tqdm": True,
            **overrides,
        }
    )


def _reference(policy: Any, reference_model: Any, microbatches: list[Any], divisor: int) -> Reference:
    reference, divisor = Reference(), divisor * len(microbatches)
    for inputs, _ in microbatches:
        with torch.no_grad():
            logps = sequence_logps(reference_model, inputs)
        rows = row_gradients(
            policy,
            HOOK_POINT,
            len(inputs["input_ids"]),
            lambda inputs=inputs, logps=logps: dpo_loss(policy, logps, inputs, BETA) / divisor,
        )
        half = len(rows) // 2
        reference.rows.append(rows)
        reference.sides.append(torch.tensor([1.0] * half + [-1.0] * half))
        reference.examples.append(rows[:half] + rows[half:])
    return reference
