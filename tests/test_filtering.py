"""Filtering: nothing is lost, nothing is half written, the same input gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from worlds import make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import AuditError, Flag, FlagSet, audit_preferences, filter_preferences
from trl_sae_audit.audit_result import Audit
from trl_sae_audit.filter_scores import example_scores
from trl_sae_audit.preference_fit import explain_preferences

FLAGS = FlagSet(
    [Flag("tiny", 11, "sycophancy", "a test", 1.0), Flag("tiny", 40, "verbosity", "", 0.5, "down")]
)


@pytest.fixture(scope="module")
def data():
    return pairs(30).add_column("id", [f"pair {i}" for i in range(30)])


@pytest.fixture(scope="module")
def world():
    tokenizer = make_tokenizer()
    return make_model(tokenizer), tokenizer, make_dictionary()


@pytest.fixture(scope="module")
def audit(world, data, tmp_path_factory):
    model, tokenizer, dictionary = world
    directory = tmp_path_factory.mktemp("audit") / "audit"
    return audit_preferences(
        model, tokenizer, data, dictionary, output_dir=directory, progress=False, part_size=8
    )


def ids(rows):
    return [row["id"] for row in rows]


def expected_scores(audit):
    contributions = audit.contributions([11, 40])
    units = contributions / np.sqrt((contributions**2).mean(0))
    return units[:, 0] - 0.5 * units[:, 1]


def test_a_budget_drops_the_highest_scores_and_keeps_order_and_columns(audit, data):
    result = filter_preferences(data, audit, FLAGS, "drop", budget=6)
    score = expected_scores(audit)
    worst = set(np.argsort(-score)[:6])
    assert ids(result.dropped) == [f"pair {i}" for i in range(30) if i in worst]
    assert ids(result.kept) == [f"pair {i}" for i in range(30) if i not in worst]
    assert result.kept.features == data.features
    assert result.dropped["audit_row"][:] == sorted(worst)
    np.testing.assert_allclose(result.dropped["audit_score"][:], score[sorted(worst)], rtol=1e-5)
    assert "sycophancy, verbosity" in result.dropped["audit_reason"][0]
    assert len(filter_preferences(data, audit, FLAGS, budget=0.2).dropped) == 6
    assert len(filter_preferences(data, audit, FLAGS, budget=29).dropped) == (score > 0).sum()


def test_threshold_and_quantile(audit, data):
    score = expected_scores(audit)
    result = filter_preferences(data, audit, FLAGS, threshold=1.0)
    assert ids(result.dropped) == [f"pair {i}" for i in np.flatnonzero(score > 1.0)]
    result = filter_preferences(data, audit, FLAGS, quantile=0.8)
    assert ids(result.dropped) == [f"pair {i}" for i in np.flatnonzero(score > np.quantile(score, 0.8))]
    assert len(filter_preferences(data, audit, FLAGS, threshold=-5.0).dropped) == (score > 0).sum()


def test_flip_swaps_the_answers_of_the_selected_only(audit, data):
    result = filter_preferences(data, audit, FLAGS, "flip", budget=4)
    flipped = set(np.flatnonzero(result.plan.action == "flip"))
    assert len(flipped) == 4
    assert len(result.dropped) == 0
    for index, (row, old) in enumerate(zip(result.kept, data, strict=True)):
        names = ("rejected", "chosen") if index in flipped else ("chosen", "rejected")
        assert (row["chosen"], row["rejected"]) == (old[names[0]], old[names[1]])
        assert (row["id"], row["prompt"]) == (old["id"], old["prompt"])
    assert result.kept.features == data.features


def test_weights_bring_the_selected_down_to_the_others(audit, data):
    result = filter_preferences(data, audit, FLAGS, "weight", threshold=0.8)
    score, weight = expected_scores(audit), np.array(result.kept["weight"][:])
    np.testing.assert_allclose(weight, np.where(score > 0.8, 0.8 / score, 1.0), rtol=1e-5)
    assert len(result.dropped) == 0
    with pytest.raises(AuditError, match="column 'id' already"):
        filter_preferences(data, audit, FLAGS, "weight", threshold=0.8, weight_column="id")


def test_resampling_keeps_each_with_its_weight_as_probability(audit, data):
    weight = np.where(expected_scores(audit) > 0.5, 0.5 / expected_scores(audit), 1.0)
    kept = np.zeros(30)
    for seed in range(300):
        result = filter_preferences(data, audit, FLAGS, "resample", threshold=0.5, seed=seed)
        assert len(result.kept) + len(result.dropped) == 30
        kept[result.plan.kept] += 1
    np.testing.assert_allclose(kept / 300, weight, atol=0.12)


def test_the_control_is_as_large_and_not_the_same(audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6, control=True, seed=3)
    assert len(result.control) == len(result.kept)
    assert ids(result.control) != ids(result.kept)
    again = filter_preferences(data, audit, FLAGS, budget=6, control=True, seed=3)
    assert ids(again.control) == ids(result.control)
    for flag in result.summary["flags"]:
        assert {"attribution_before", "attribution_after", "attribution_control"} <= set(flag)


def test_the_summary_predicts_the_audit_of_what_is_kept(world, audit, data):
    model, tokenizer, dictionary = world
    for strategy in ("drop", "flip"):
        result = filter_preferences(data, audit, FLAGS, strategy, budget=5)
        second = audit_preferences(model, tokenizer, result.kept, dictionary, progress=False)
        table = second.features().set_index("feature")
        for flag in result.summary["flags"]:
            assert flag["attribution_after"] == pytest.approx(
                table["attribution"][flag["feature"]], rel=1e-3, abs=1e-6
            )
    up = result.summary["flags"][0]
    assert up["attribution_after"] < up["attribution_before"]


def test_a_mix_of_scores(audit, data):
    mix = {"attribution": 0.7, "activation": 0.3}
    flags = [Flag("tiny", 11)]
    expected = sum(weight * example_scores(audit, flags, name) for name, weight in mix.items())
    np.testing.assert_allclose(example_scores(audit, flags, mix), expected)
    gaps = audit.activation_gaps([11])[:, 0]
    np.testing.assert_allclose(
        example_scores(audit, flags, "activation"), gaps / np.sqrt((gaps**2).mean()), rtol=1e-5
    )
    with pytest.raises(AuditError, match="no influence"):
        filter_preferences(data, audit, FLAGS, score="influence", budget=1)


def test_gradient_where_the_feature_is_active_and_the_largest_activation(audit, data):
    table = audit.examples([11, 40]).assign(gap=lambda rows: rows["max_activation"])
    table.loc[table["side"] == "rejected", "gap"] *= -1
    sums = table.groupby(["feature", "row"])[["activation_attribution", "gap"]].sum()
    for name, column in (("activation_attribution", "activation_attribution"), ("max_activation", "gap")):
        values = np.stack([sums.loc[feature, column].to_numpy() for feature in (11, 40)], 1)
        units = values / np.sqrt((values**2).mean(0))
        np.testing.assert_allclose(
            example_scores(audit, list(FLAGS), name), units[:, 0] - 0.5 * units[:, 1], rtol=1e-4, atol=1e-6
        )
    total = audit.features().set_index("feature")["activation_attribution"]
    np.testing.assert_allclose(
        audit.activation_contributions([11, 40]).sum(0), total.loc[[11, 40]], rtol=1e-4, atol=1e-7
    )


def test_a_balanced_budget_drops_the_fewest_that_leave_nothing(audit, data):
    score = expected_scores(audit) if expected_scores(audit).sum() > 0 else -expected_scores(audit)
    flags = FLAGS if expected_scores(audit).sum() > 0 else FlagSet([opposite(flag) for flag in FLAGS])
    descending = np.sort(score)[::-1]
    for strategy, times in (("drop", 1), ("flip", 2)):
        plan = filter_preferences(data, audit, flags, strategy, budget="balance").plan
        acted = np.flatnonzero(plan.action == strategy)
        assert set(acted) == set(np.argsort(-score)[: len(acted)])
        assert score.sum() - times * descending[: len(acted)].sum() <= 1e-9
        assert score.sum() - times * descending[: len(acted) - 1].sum() > 0
    weight = np.array(filter_preferences(data, audit, flags, "weight", budget="balance").kept["weight"][:])
    assert (weight * score).sum() == pytest.approx(0, abs=1e-4 * float(np.abs(score).sum()))
    assert 0 < (weight < 1).sum() < 30
    assert (weight[score < 0] == 1).all()
    against = filter_preferences(data, audit, FlagSet([opposite(flag) for flag in flags]), budget="balance")
    assert len(against.dropped) == 0, "data that are against the flags are left as they are"


def opposite(flag):
    return dataclasses.replace(flag, direction={"up": "down", "down": "up"}[flag.direction])


def test_fitted_weights_are_those_that_explain_the_preferences(audit, data):
    gaps = audit.activation_gaps([11, 40], "max").astype(np.float64) * [1, -1]
    weights = explain_preferences(torch.from_numpy(gaps)).numpy()
    assert weights.any()
    np.testing.assert_allclose(
        example_scores(audit, list(FLAGS), "max_activation", "fit"), gaps @ weights, rtol=1e-6
    )
    result = filter_preferences(
        data, audit, FLAGS, score="max_activation", weights="fit", budget="balance", control=True
    )
    score = result.summary["score"]
    assert score["before"] == pytest.approx((gaps @ weights).mean(), rel=1e-6)
    assert score["after"] <= 1e-9
    assert set(score) == {"before", "after", "control"}
    kept = np.delete(gaps @ weights, np.flatnonzero(result.plan.action == "drop"))
    assert kept.sum() <= 1e-9 < (gaps @ weights).sum()


def test_every_kind_of_source_is_filtered_alike(tmp_path, audit, data):
    data.save_to_disk(tmp_path / "disk")
    data.to_parquet(tmp_path / "data.parquet")
    data.to_json(tmp_path / "data.jsonl")
    expected = filter_preferences(data, audit, FLAGS, budget=6)
    for source in (
        list(data),
        data.to_iterable_dataset(),
        tmp_path / "disk",
        tmp_path / "data.parquet",
        str(tmp_path / "data.jsonl"),
    ):
        for strategy in ("drop", "flip", "weight"):
            expected = filter_preferences(data, audit, FLAGS, strategy, budget=6)
            result = filter_preferences(source, audit, FLAGS, strategy, budget=6)
            assert list(result.kept) == list(expected.kept)
            assert list(result.dropped) == list(expected.dropped)


def test_implicit_prompts_and_conversations_are_filtered(world):
    model, tokenizer, dictionary = world
    rows = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in pairs(8)
    ]
    data = Dataset.from_list(rows)
    audit = audit_preferences(model, tokenizer, data, dictionary, progress=False)
    result = filter_preferences(data, audit, FlagSet([Flag("tiny", 5)]), "flip", budget=2)
    flipped = np.flatnonzero(result.plan.action == "flip")
    assert len(flipped) == 2
    assert result.kept[int(flipped[0])]["chosen"] == rows[flipped[0]]["rejected"]


# Files


def files_of(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
def test_running_twice_gives_the_same_bytes(tmp_path, audit, data, kind):
    for name in ("one", "two"):
        fresh = Dataset.from_list(list(data))
        result = filter_preferences(fresh, audit, FLAGS, budget=6, control=True)
        result.save(tmp_path / name, format=kind)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert {path.name for path in (tmp_path / "one").iterdir()} >= {
        "README.md",
        "filter.json",
        "decisions.parquet",
    }


def test_lines_that_stay_are_the_input_lines(tmp_path, audit, data):
    lines = [json.dumps(dict(row), sort_keys=True) + " " for row in data]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    result = filter_preferences(tmp_path / "data.jsonl", audit, FLAGS, budget=6)
    out = result.save(tmp_path / "out")
    kept = (out / "kept.jsonl").read_text().splitlines()
    assert kept == [line for index, line in enumerate(lines) if index in result.plan.kept]
    assert len((out / "dropped.jsonl").read_text().splitlines()) == 6


def test_the_card_replays_it(tmp_path, audit, data):
    out = filter_preferences(data, audit, FLAGS, budget=0.2, seed=5).save(tmp_path / "out")
    card = (out / "README.md").read_text()
    assert "--strategy drop --score attribution --weights flags --budget 0.2 --seed 5" in card
    assert "24 are kept and 6 dropped" in card
    assert load_from_disk(out / "kept").num_rows == 24
    recorded = json.loads((out / "filter.json").read_text())["settings"]["flags"]
    assert FlagSet([Flag(**flag) for flag in recorded]) == FLAGS


def test_what_lies_there_is_not_overwritten_unasked(tmp_path, audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6)
    result.save(tmp_path / "out")
    with pytest.raises(AuditError, match="exists already"):
        result.save(tmp_path / "out")
    filter_preferences(data, audit, FLAGS, budget=3).save(tmp_path / "out", overwrite=True)
    assert load_from_disk(tmp_path / "out" / "dropped").num_rows == 3
    (tmp_path / "mine").mkdir()
    with pytest.raises(AuditError, match="not written by a filter"):
        result.save(tmp_path / "mine", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6)
    result.save(tmp_path / "out", format="jsonl")
    before = files_of(tmp_path / "out")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    other = filter_preferences(data, audit, FLAGS, budget=9)
    with pytest.raises(AuditError, match="No space left on device"):
        other.save(tmp_path / "out", format="jsonl", overwrite=True)
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_when_the_new_cannot_take_its_place_the_old_returns(tmp_path, monkeypatch, audit, data):
    filter_preferences(data, audit, FLAGS, budget=6).save(tmp_path / "out", format="jsonl")
    before = files_of(tmp_path / "out")
    replace = Path.replace

    def failing(self, target):
        if self.name.endswith(".tmp") and Path(target).name == "out":
            raise OSError(5, "Input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(AuditError, match="Input/output error"):
        filter_preferences(data, audit, FLAGS, budget=9).save(
            tmp_path / "out", format="jsonl", overwrite=True
        )
    assert files_of(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_leaves_either_nothing_or_all(tmp_path, audit, data):
    data.to_json(tmp_path / "data.jsonl")
    FLAGS.save(tmp_path / "flags.yaml")
    program = textwrap.dedent(
        """
        import os, signal, sys
        from trl_sae_audit import FlagSet, filter_preferences
        from trl_sae_audit.audit_result import Audit
        from trl_sae_audit import filter_writers
        data, audit, flags, out, when = sys.argv[1:]
        result = filter_preferences(data, Audit.load(audit), FlagSet.load(flags), budget=6)
        write, calls = filter_writers.JsonLines.write, []
        def dying(self, path, rows):
            calls.append(path)
            if len(calls) == int(when):
                os.kill(os.getpid(), signal.SIGKILL)
            return write(self, path, rows)
        filter_writers.JsonLines.write = dying
        result.save(out)
        """
    )
    before = (tmp_path / "data.jsonl").read_bytes()
    for when in ("1", "2"):
        command = [
            sys.executable,
            "-c",
            program,
            tmp_path / "data.jsonl",
            audit.directory,
            tmp_path / "flags.yaml",
        ]
        done = subprocess.run([*map(str, command), str(tmp_path / "out"), when], check=False)
        assert done.returncode == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "data.jsonl").read_bytes() == before
    result = filter_preferences(tmp_path / "data.jsonl", audit, FLAGS, budget=6)
    out = result.save(tmp_path / "out")
    kept, dropped = ((out / f"{name}.jsonl").read_text().splitlines() for name in ("kept", "dropped"))
    assert len(kept) + len(dropped) == 30


def test_a_malformed_row_stops_or_is_set_aside_with_nothing_lost(tmp_path, world):
    model, tokenizer, dictionary = world
    lines = [json.dumps(row) for row in pairs(10)]
    lines[4] = '{"prompt": "w1", "chosen"'
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    audit = audit_preferences(model, tokenizer, path, dictionary, progress=False, on_bad_row="set_aside")
    flags = FlagSet([Flag("tiny", 11)])
    with pytest.raises(AuditError, match=r"Row 4 .*not valid JSON"):
        filter_preferences(path, audit, flags, budget=2)
    result = filter_preferences(path, audit, flags, budget=2, control=True, on_bad_row="set_aside")
    assert len(result.kept) + len(result.dropped) == 10
    assert len(result.control) == len(result.kept) == 7
    aside = next(row for row in result.dropped if row["audit_row"] == 4)
    assert aside["text"] == lines[4]
    assert "not valid JSON" in aside["audit_reason"]
    assert aside["audit_score"] is None


# Refusals


def test_an_audit_of_another_dataset_is_refused(audit, data):
    with pytest.raises(AuditError, match="differs from row 0"):
        filter_preferences(pairs(30, seed=9), audit, FLAGS, budget=2)
    with pytest.raises(AuditError, match="with 30 rows where this one has 29"):
        filter_preferences(data.select(range(29)), audit, FLAGS, budget=2)
    with pytest.raises(AuditError, match="differs from row 30"):
        filter_preferences([*data, data[0]], audit, FLAGS, budget=2)
    changed = [dict(row) for row in data]
    changed[17]["chosen"] += " w1"
    with pytest.raises(AuditError, match="differs from row 17"):
        filter_preferences(changed, audit, FLAGS, budget=2)


def test_a_flag_of_another_dictionary_is_refused(audit, data):
    with pytest.raises(AuditError, match="they are of 'other'"):
        filter_preferences(data, audit, FlagSet([Flag("other", 1)]), budget=2)
    with pytest.raises(AuditError, match="written for another dictionary"):
        filter_preferences(data, audit, FlagSet([Flag("tiny", 1, identity="0" * 64)]), budget=2)
    with pytest.raises(AuditError, match="there are no flags"):
        filter_preferences(data, audit, FlagSet(), budget=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "exactly one of"),
        ({"budget": 2, "threshold": 1.0}, "budget and threshold given"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 2.5}, "budget is 2.5"),
        ({"budget": -1}, "budget is -1"),
        ({"quantile": 1.0}, "quantile is 1.0"),
        ({"threshold": float("nan")}, "not a number"),
        ({"budget": 2, "strategy": "burn"}, "strategy is 'burn'"),
        ({"budget": 2, "score": "vibes"}, "score is 'vibes'"),
        ({"budget": 2, "score": {}}, "empty mix"),
        ({"budget": 2, "weights": "mine"}, "weights is 'mine'"),
        ({"budget": "some"}, "or 'balance'"),
    ],
)
def test_options_that_make_no_sense(audit, data, options, words):
    with pytest.raises(AuditError, match=words):
        filter_preferences(data, audit, FLAGS, **options)


def test_the_audit_can_be_read_back_and_used(audit, data):
    again = Audit.load(audit.directory)
    one = filter_preferences(data, again, FLAGS, budget=6)
    assert list(one.kept) == list(filter_preferences(data, audit, FLAGS, budget=6).kept)
