"""Real processes: what they record together is what one process records, and the gradient the optimizer used.

    pytest tests/test_processes.py

`dpo`, `grpo` and so on are the cases of process_worker.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from reference import Reference, dpo_loss, recorded, relative_error, row_gradients, sequence_logps, to_double
from worlds import HOOK_POINT, make_dictionary, make_model, make_tokenizer

from trl_sae_audit import RunRecord

pytestmark = pytest.mark.processes

TESTS = Path(__file__).parent
SCORES = ["attribution", "cosine", "share", "standard_error", "chosen", "rejected"]
TOKEN_SCORES = ["token_share", "activation_attribution"]


def start(*command: str) -> None:
    """Run process_worker.py, alone or by a launcher."""
    paths = [str(TESTS), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def kept(directory: Path) -> list[dict[str, Any]]:
    """What each process left of one case."""
    ranks = sorted(directory.glob("rank*.pt"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [torch.load(path, weights_only=False) for path in ranks]


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference relative to the largest expected value, if any is not 0: SFT has no sides."""
    return relative_error(found, expected) if expected.any() else float(np.abs(found).max())


def assert_same_record(found: Path, expected: Path, tolerance: float = 1e-5) -> None:
    """Both records say the same of every step, feature and example."""
    one, other = RunRecord.load(expected / "record"), RunRecord.load(found / "record")
    keys = ["dictionary", "step", "feature"]
    steps, others = (record.steps().sort_values(keys, ignore_index=True) for record in (one, other))
    pd.testing.assert_frame_equal(steps[keys], others[keys])
    scores = [name for name in (*SCORES, *TOKEN_SCORES) if name in steps]
    for (dictionary, step), rows in steps.groupby(["dictionary", "step"]):
        for score in scores:
            error = difference(others.loc[rows.index, score].to_numpy(), rows[score].to_numpy())
            assert error <= tolerance, (dictionary, step, score, error)
    counts = ["step", "global_step", "examples", "chosen_rows", "rejected_rows"]
    gradients = [record.table("gradient").sort_values(["dictionary", "step"]) for record in (one, other)]
    assert gradients[0][counts].to_numpy().tolist() == gradients[1][counts].to_numpy().tolist()
    keys = ["dictionary", "feature"]
    totals = [record.features().sort_values(keys, ignore_index=True) for record in (one, other)]
    for _, rows in totals[0].groupby("dictionary"):
        for column in ("attribution", "standard_error", "share", "chosen", "rejected"):
            error = difference(totals[1].loc[rows.index, column].to_numpy(), rows[column].to_numpy())
            assert error <= tolerance, (column, error)
    examples, more = (
        record.table("examples").sort_values(["step", "label", "attribution"]) for record in (one, other)
    )
    assert examples[["step", "label"]].to_numpy().tolist() == more[["step", "label"]].to_numpy().tolist()
    assert relative_error(more["attribution"].to_numpy(), examples["attribution"].to_numpy()) <= tolerance
    if "drift" in one.tables and "zero3" not in found.parent.name:
        drift, drifted = (record.table("drift")["drift"].to_numpy() for record in (one, other))
        assert np.abs(drift).max() > 0
        assert relative_error(drifted, drift) <= tolerance


class TestTheNewestTrainers:
    pytestmark = pytest.mark.newest

    @pytest.fixture(scope="class")
    @staticmethod
    def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("trained")
        start(
            *(str(TESTS / "process_worker.py"), str(directory)),
            "dpo,grpo,kto,sft_short,scorer:1",
            "dpo,dpo_logged,dpo_without,dpo_loaded,grpo,grpo_one_sided,kto,sft_short:2",
            "dpo,grpo,kto,scorer:4",
            "dpo,dpo_without,grpo:2:fsdp2",
        )
        return directory

    @pytest.mark.parametrize("case", ["dpo", "grpo", "kto"])
    @pytest.mark.parametrize("processes", [2, 4])
    def test_processes_record_what_one_does(self, trained: Path, case: str, processes: int) -> None:
        ranks = kept(trained / f"ddp{processes}" / case)
        assert [rank["world_size"] for rank in ranks] == [processes] * processes
        assert [rank["writes"] for rank in ranks] == [True, *[False] * (processes - 1)]
        assert_same_record(trained / f"ddp{processes}" / case, trained / "ddp1" / case)

    def test_a_last_batch_that_is_short_in_one_process(self, trained: Path) -> None:
        assert_same_record(trained / "ddp2" / "sft_short", trained / "ddp1" / "sft_short")
        counts = (
            RunRecord.load(trained / "ddp2" / "sft_short" / "record")
            .table("examples")
            .groupby(["step", "process"])
        )
        assert counts["example"].nunique().tolist() == [4, 4, 4, 4, 4, 2]

    @pytest.mark.parametrize("case", ["dpo", "grpo"])
    def test_fsdp2_records_what_one_process_does(self, trained: Path, case: str) -> None:
        ranks = kept(trained / "fsdp22" / case)
        assert [rank["engine"] for rank in ranks] == ["FSDP", "FSDP"]
        assert all("spread over the processes" in rank["refusal"] for rank in ranks)
        assert_same_record(trained / "fsdp22" / case, trained / "ddp1" / case)

    def test_a_model_sharded_while_it_was_loaded(self, trained: Path) -> None:
        """FSDP2 by transformers, which accelerate does not know of."""
        ranks = kept(trained / "ddp2" / "dpo_loaded")
        assert [rank["engine"] for rank in ranks] == ["MULTI_CPU", "MULTI_CPU"]
        assert all("spread over the processes" in rank["refusal"] for rank in ranks)
        assert_same_record(trained / "ddp2" / "dpo_loaded", trained / "ddp1" / "dpo")

    @pytest.mark.parametrize("where", ["ddp2", "fsdp22"])
    def test_the_weights_are_those_without_the_callback(self, trained: Path, where: str) -> None:
        for audited, alone in zip(
            kept(trained / where / "dpo"), kept(trained / where / "dpo_without"), strict=True
        ):
            assert all(map(torch.equal, audited["weights"], alone["weights"]))

    def test_one_sum_of_one_shape_a_step(self, trained: Path) -> None:
        """With a log a step there is one projection a step; its sum holds all dictionaries' scores, token scores too."""
        for rank in kept(trained / "ddp2" / "dpo_logged"):
            names, shapes = zip(*rank["collectives"], strict=True)
            assert names == ("all_reduce",) * 4
            assert len(set(shapes)) == 1
        for rank in kept(trained / "ddp2" / "dpo"):
            sums = [shape for name, shape in rank["collectives"] if name == "all_reduce"]
            assert [shape[0] for shape in sums] == [2, 2], "a log every other step, two steps in one sum"

    def test_a_scorer_calibrated_by_four_processes_is_that_of_one(self, trained: Path) -> None:
        (one,), four = kept(trained / "ddp1" / "scorer"), kept(trained / "ddp4" / "scorer")
        for rank in four:
            assert rank["size"] == one["size"] == 4
            torch.testing.assert_close(rank["mean"], one["mean"], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(rank["deviation"], one["deviation"], rtol=1e-5, atol=1e-6)
            assert torch.equal(rank["mean"], four[0]["mean"])

    def test_a_process_without_rows_of_a_side(self, trained: Path) -> None:
        """Process 1 has neither reinforced nor suppressed rows; in KTO's runs above each process has one label only."""
        record = RunRecord.load(trained / "ddp2" / "grpo_one_sided" / "record")
        counts = record.table("gradient")
        assert (counts["examples"] == 16).all()
        assert (counts["chosen_rows"] + counts["rejected_rows"] <= 8).all()
        steps = record.steps()
        assert (
            relative_error((steps["chosen"] + steps["rejected"]).to_numpy(), steps["attribution"].to_numpy())
            < 1e-5
        )
        labels = RunRecord.load(trained / "ddp2" / "kto" / "record").table("examples")
        assert {tuple(sides) for _, sides in labels.groupby("process")["side"].unique().items()} == {
            (1,),
            (-1,),
        }


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("launched")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    start(*torchrun, str(TESTS / "process_worker.py"), str(directory), "dpo_windows", "grpo_sampled")
    return directory


@pytest.mark.newest
def test_dpo_with_a_short_window(launched: Path) -> None:
    """By torchrun, against the gradient of the mean of the processes' losses in float64."""
    ranks = [rank["steps"] for rank in kept(launched / "dpo_windows")]
    record = RunRecord.load(launched / "dpo_windows" / "record")
    steps, examples = record.steps(), record.table("examples")
    assert record.manifest["processes"] == 2
    tokenizer = make_tokenizer()
    policy, reference_model = make_model(tokenizer).double(), make_model(tokenizer, seed=5).double()
    dictionary = make_dictionary()
    assert [[len(step) for step in rank] for rank in ranks] == [[3, 2], [3, 2]]
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
        one = examples.query("step == @step and label == 'one'")
        assert set(one["process"]) == {0, 1}
        assert one["attribution"].sum() == pytest.approx(recorded(steps, step, "attribution")[1], rel=1e-4)


@pytest.mark.newest
def test_grpo_where_each_process_samples(launched: Path) -> None:
    """GRPO divides by the tokens of all processes; in a single one that is the processes' mean already."""
    from trainers import BUILDERS

    ranks = [rank["steps"] for rank in kept(launched / "grpo_sampled")]
    steps = RunRecord.load(launched / "grpo_sampled" / "record").steps()
    double: Any = BUILDERS["GRPO"](
        launched,
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


@pytest.mark.ppo
def test_ppo_records_in_two_and_four_processes_what_it_does_in_one(tmp_path: Path) -> None:
    start(str(TESTS / "process_worker.py"), str(tmp_path), "ppo:1", "ppo:2", "ppo:4")
    for processes in (2, 4):
        ranks = kept(tmp_path / f"ddp{processes}" / "ppo")
        assert [rank["world_size"] for rank in ranks] == [processes] * processes
        assert_same_record(tmp_path / f"ddp{processes}" / "ppo", tmp_path / "ddp1" / "ppo")
