"""For every trainer, the recorded scores equal a float64 autograd reference of the loss it really used."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import (
    Reference,
    StepRecorder,
    divided_by_accelerate,
    record_online_dpo,
    recorded,
    relative_error,
    row_gradients,
    to_double,
)
from helpers.trainers import BUILDERS, LESS_COMMON, build
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary
from transformers import Trainer

from trl_sae_audit import FeatureAttributionCallback, RunRecord

SCALED_BY_THE_LOSS = ("SFT", "GRPO", "GMPO")
"""Trainers whose compute_loss already divides by the number of micro-batches or tokens of the step."""


PAIRED = ("DPO", "Reward", "CPO", "ORPO")


@pytest.mark.parametrize("name", [name for name in [*BUILDERS, *LESS_COMMON] if name != "OnlineDPO"])
def test_scores_equal_float64_autograd(name: str, tmp_path: Path) -> None:
    make = BUILDERS.get(name, partial(build, name))
    trainer = make(tmp_path, learning_rate=0.0)
    recorder = StepRecorder()
    recorder.watch(trainer)
    dictionary = make_dictionary()
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record", top_k=D_SAE))
    trainer.train()

    steps = RunRecord.load(tmp_path / "record").steps()
    double = make(tmp_path, torch.float64, learning_rate=0.0, gradient_checkpointing=False)
    double.model.train()
    assert len(recorder.steps) == 3
    for step, microbatches in enumerate(recorder.steps, start=1):
        assert len(microbatches) == 2
        expected = _reference(name, double, microbatches)
        _compare(
            steps, step, expected.scores(dictionary), with_sides=name != "SFT", all_have_one=name != "TPO"
        )


def _compare(
    steps: Any, step: int, scores: dict[str, Any], *, with_sides: bool, all_have_one: bool = True
) -> None:
    for column, values in scores.items():
        if column in ("positive", "negative") and not with_sides:
            assert not recorded(steps, step, column).any()
            continue
        error = relative_error(recorded(steps, step, column), values)
        assert error <= 1e-5, (step, column, error)
    if with_sides:
        assert abs(scores["positive"]).max() > 0
        assert abs(scores["negative"]).max() > 0
    if with_sides and all_have_one:
        parts = scores["positive"] + scores["negative"]
        assert relative_error(parts, scores["attribution"]) <= 1e-5


def _reference(name: str, trainer: Trainer, microbatches: list[Any]) -> Reference:
    reference = Reference()
    scale = divided_by_accelerate(trainer)
    if name not in SCALED_BY_THE_LOSS:
        scale *= len(microbatches)
    trainer.current_gradient_accumulation_steps = len(microbatches)
    for inputs, kwargs in microbatches:
        doubled = {key: to_double(value) for key, value in inputs.items()}
        rows = row_gradients(
            trainer.model,
            HOOK_POINT,
            _rows(doubled),
            lambda doubled=doubled, kwargs=kwargs: (
                trainer.compute_loss(trainer.model, doubled, **kwargs) / scale
            ),
        )
        reference.rows.append(rows)
        sides = _sides(name, inputs, len(rows))
        if sides is not None:
            reference.sides.append(sides)
        half = len(rows) // 2
        reference.examples.append(rows[:half] + rows[half:] if name in PAIRED else rows)
    return reference


def _rows(inputs: dict[str, Any]) -> int:
    if "chosen_input_ids" in inputs:
        return 2 * len(inputs["chosen_input_ids"])
    known = ("input_ids", "completion_input_ids", "prompt_ids")
    return len(next(inputs[key] for key in known if key in inputs))


def _sides(name: str, inputs: dict[str, Any], rows: int) -> torch.Tensor | None:
    if name in PAIRED:
        return torch.tensor([1.0] * (rows // 2) + [-1.0] * (rows // 2))
    if name.startswith("TPO"):
        sides = [1.0, -1.0, 0.0] if name == "TPO" else [1.0, -1.0]
        return torch.tensor(sides).repeat_interleave(rows // len(sides))
    if name == "KTO":
        return torch.tensor([1.0 if label else -1.0 for label in inputs["label"]])
    if name in ("GRPO", "RLOO", "GMPO"):
        return inputs["advantages"].sign()
    return None


def test_online_dpo(tmp_path: Path) -> None:
    trainer: Any = BUILDERS["OnlineDPO"](tmp_path, learning_rate=0.0)
    forwards, rewards, _ = record_online_dpo(trainer)
    dictionary = make_dictionary()
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record", top_k=D_SAE))
    trainer.train()
    boundaries = [(start, start + 2) for start in (0, 2, 4)]

    double: Any = BUILDERS["OnlineDPO"](
        tmp_path, torch.float64, learning_rate=0.0, gradient_checkpointing=False
    )
    double.model.train()
    steps = RunRecord.load(tmp_path / "record").steps()
    for step, (start, end) in enumerate(boundaries, start=1):
        reference = Reference()
        for batch, reward in zip(forwards[start:end], rewards[start:end], strict=True):
            n = len(reward) // 2
            first_better = reward[:n] >= reward[n:]
            sides = torch.cat([first_better, ~first_better]).double() * 2 - 1

            def loss(batch: Any = batch, sides: torch.Tensor = sides, n: int = n) -> torch.Tensor:
                """Not divided by the number of micro-batches: OnlineDPO does not do so itself."""
                mask = batch[3]
                with torch.no_grad():
                    reference_logps = (double._forward(double.ref_model, *batch) * mask).sum(1)
                ratios = (double._forward(double.model, *batch) * mask).sum(1) - reference_logps
                margin = (ratios * sides)[:n] + (ratios * sides)[n:]
                return -F.logsigmoid(0.5 * margin).mean() / divided_by_accelerate(double)

            rows = row_gradients(double.model, HOOK_POINT, 2 * n, loss)
            reference.rows.append(rows)
            reference.sides.append(sides)
            reference.examples.append(rows[:n] + rows[n:])
        _compare(steps, step, reference.scores(dictionary), with_sides=True)
