"""Real processes: what they record together is what one process records, and the gradient the optimizer used.

    pytest tests/e2e/test_processes.py

`dpo`, `grpo` and so on are the cases of process_worker.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.processes import TESTS, assert_same_record, kept, start
from helpers.reference import (
    Reference,
    dpo_loss,
    recorded,
    relative_error,
    row_gradients,
    sequence_logps,
    to_double,
)
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import RunRecord, Sampling
from trl_sae_audit.callbacks.generations import GenerationDrift
from trl_sae_audit.callbacks.sampled_answers import SampledAnswers
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.sampling import sample_ids
from trl_sae_audit.verification.measured import read_answers

pytestmark = pytest.mark.processes


class TestTheNewestTrainers:
    pytestmark = pytest.mark.newest

    @pytest.fixture(scope="class")
    @staticmethod
    def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
        directory = tmp_path_factory.mktemp("trained")
        start(
            *(str(TESTS / "helpers" / "process_worker.py"), str(directory)),
            "dpo,dpo_worded,grpo,kto,sft_short,scorer:1",
            "dpo,dpo_logged,dpo_without,dpo_generating,dpo_generating_far,dpo_loaded,dpo_worded,grpo,grpo_one_sided,kto,sft_short:2",
            "dpo,grpo,kto,scorer:4",
            "dpo,dpo_without,dpo_generating,grpo:2:fsdp2",
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

    def test_contexts_are_gathered_from_both_processes(self, trained: Path) -> None:
        """Of the same micro-batches the strongest places are the same, and at the same steps."""
        one, two = (trained / where / "dpo_worded" for where in ("ddp1", "ddp2"))
        assert_same_record(two, one)
        places = ["feature", "step", "source", "prompt", "before", "at", "after"]
        expected, found = (
            RunRecord.load(each / "record").contexts(range(D_SAE)).sort_values(places, ignore_index=True)
            for each in (one, two)
        )
        assert expected["feature"].nunique() > 20
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4)
        words, others = (RunRecord.load(each / "record").features() for each in (one, two))
        words, others = (table.set_index("feature")["words"].sort_index() for table in (words, others))
        assert words.equals(others)

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

    def test_answers_are_shared_and_the_drift_is_that_of_one_process(
        self, trained: Path, tmp_path: Path
    ) -> None:
        ranks, alone = (kept(trained / "ddp2" / case) for case in ("dpo_generating", "dpo_without"))
        assert all(map(torch.equal, ranks[0]["weights"], alone[0]["weights"]))
        record = RunRecord.load(trained / "ddp2" / "dpo_generating" / "record")
        answers = record.table("generations")
        assert answers["prompt"].unique().tolist() == list(range(len(set(pairs(24)["prompt"]))))
        assert answers["answer"].nunique() == 3 * answers["prompt"].nunique()
        from helpers.trainers import dpo

        trainer = dpo(tmp_path)
        for parameter, trained_to in zip(trainer.model.parameters(), ranks[0]["weights"], strict=True):
            parameter.data = trained_to
        point = resolve_hook_point(trainer.model, HOOK_POINT)
        sampled = SampledAnswers.from_record(record)
        look = GenerationDrift(trainer, [make_dictionary()], [point], Sampling(), kept=sampled).measure()
        assert look is not None
        drift = look.drifts["tiny"].change
        assert np.abs(drift).max() > 1e-3
        assert relative_error(record.drift().loc[4].to_numpy(), drift) < 1e-4

    def test_far_from_the_start_each_process_samples_its_answers_again(self, trained: Path) -> None:
        ranks = kept(trained / "ddp2" / "dpo_generating_far")
        record = RunRecord.load(trained / "ddp2" / "dpo_generating_far" / "record")
        assert record.table("generation_looks")["sampled_again"].tolist()[-1]
        tokenizer = make_tokenizer()
        model = make_model(tokenizer)
        for parameter, trained_to in zip(model.parameters(), ranks[0]["weights"], strict=True):
            parameter.data = trained_to
        start = SampledAnswers.from_record(record)
        assert start is not None
        asked = list(dict.fromkeys(prompt for prompt, _ in start.rows))
        now = []
        for process in range(2):
            share = asked[process::2]
            found = sample_ids(model, tokenizer, share, Sampling(3, 6, seed=process))
            now += [
                ("", list(prompt), answer)
                for prompt, several in zip(share, found, strict=True)
                for answer in several
            ]
        old = [("", list(prompt), list(answer)) for prompt, answer in start.rows]
        before, after = (read_answers(model, tokenizer, make_dictionary(), rows) for rows in (old, now))
        drift = record.drift().loc[4].dropna()
        assert drift.abs().max() > 0.01
        np.testing.assert_allclose(drift, (after.mean() - before.mean())[drift.index], atol=1e-5)

    def test_a_sharded_model_cannot_generate_and_says_so(self, trained: Path) -> None:
        for rank in kept(trained / "fsdp22" / "dpo_generating"):
            assert "take generations= out" in rank["refusal"]

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
        assert (counts["positive_rows"] + counts["negative_rows"] <= 8).all()
        steps = record.steps()
        assert (
            relative_error(
                (steps["positive"] + steps["negative"]).to_numpy(), steps["attribution"].to_numpy()
            )
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
    start(
        *torchrun, str(TESTS / "helpers" / "process_worker.py"), str(directory), "dpo_windows", "grpo_sampled"
    )
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
    from helpers.trainers import BUILDERS

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
    start(str(TESTS / "helpers" / "process_worker.py"), str(tmp_path), "ppo:1", "ppo:2", "ppo:4")
    for processes in (2, 4):
        ranks = kept(tmp_path / f"ddp{processes}" / "ppo")
        assert [rank["world_size"] for rank in ranks] == [processes] * processes
        assert_same_record(tmp_path / f"ddp{processes}" / "ppo", tmp_path / "ddp1" / "ppo")
