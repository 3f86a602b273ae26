"""Two real processes: the record holds the gradient the optimizer used, which is the processes' mean."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import Reference, dpo_loss, recorded, relative_error, row_gradients, sequence_logps, to_double
from trainers import BUILDERS
from worlds import HOOK_POINT, make_dictionary, make_model, make_tokenizer

from trl_sae_audit import RunRecord

pytestmark = [pytest.mark.newest, pytest.mark.processes]


def run(name: str, directory: Path, processes: int) -> list[Any]:
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    paths = [str(tests), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(tests / "process_worker.py"), name, str(directory)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(directory / f"rank{rank}.pt", weights_only=False) for rank in range(processes)]
    assert [rank["world_size"] for rank in ranks] == [processes] * processes
    return [rank["steps"] for rank in ranks]


def test_dpo_with_accumulation_and_a_short_window(tmp_path: Path) -> None:
    ranks = run("DPO", tmp_path, 2)
    record = RunRecord.load(tmp_path / "record")
    steps, examples = record.steps(), record.table("examples")
    assert record.manifest["processes"] == 2
    tokenizer = make_tokenizer()
    policy, reference_model = make_model(tokenizer).double(), make_model(tokenizer, seed=5).double()
    dictionary = make_dictionary()
    assert [len(step) for step in ranks[0]] == [3, 3]
    for step in (1, 2):
        expected = Reference()
        for microbatches in (rank[step - 1] for rank in ranks):
            for inputs, _ in microbatches:
                with torch.no_grad():
                    logps = sequence_logps(reference_model, inputs)
                scale = len(microbatches) * len(ranks)
                rows = row_gradients(
                    policy,
                    HOOK_POINT,
                    len(inputs["input_ids"]),
                    lambda inputs=inputs, logps=logps, scale=scale: (
                        dpo_loss(policy, logps, inputs, 0.1) / scale
                    ),
                )
                half = len(rows) // 2
                expected.rows.append(rows)
                expected.sides.append(torch.tensor([1.0] * half + [-1.0] * half))
                expected.examples.append(rows[:half] + rows[half:])
        for column, values in expected.scores(dictionary).items():
            error = relative_error(recorded(steps, step, column), values)
            assert error <= 1e-5, (step, column, error)
        one = examples[examples["step"] == step]
        assert set(one["process"]) == {0, 1}
        assert one["attribution"].sum() == pytest.approx(recorded(steps, step, "attribution")[1], rel=1e-4)


def test_grpo(tmp_path: Path) -> None:
    """GRPO divides by the tokens of all processes; in a single one that is the processes' mean already."""
    ranks = run("GRPO", tmp_path, 2)
    steps = RunRecord.load(tmp_path / "record").steps()
    double: Any = BUILDERS["GRPO"](
        tmp_path,
        torch.float64,
        learning_rate=0.0,
        gradient_checkpointing=False,
        gradient_accumulation_steps=1,
    )
    double.model.train()
    double.current_gradient_accumulation_steps = 1
    for step in (1, 2):
        expected = Reference()
        for ((inputs, kwargs),) in (rank[step - 1] for rank in ranks):
            doubled = {key: to_double(value) for key, value in inputs.items()}
            rows = row_gradients(
                double.model,
                HOOK_POINT,
                len(inputs["prompt_ids"]),
                lambda doubled=doubled, kwargs=kwargs: double.compute_loss(double.model, doubled, **kwargs),
            )
            expected.rows.append(rows)
            expected.sides.append(inputs["advantages"].sign())
            expected.examples.append(rows)
        for column, values in expected.scores(make_dictionary()).items():
            error = relative_error(recorded(steps, step, column), values)
            assert error <= 1e-5, (step, column, error)
