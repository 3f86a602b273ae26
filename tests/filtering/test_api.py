"""Which rows are dropped, flipped or weighted, against plain computations."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers.filters import FLAGS
from helpers.worlds import pairs

from trl_sae_audit import AuditError, Flag, FlagSet, audit_preferences, filter_preferences
from trl_sae_audit.audit.result import Audit
from trl_sae_audit.filtering.balance import kept_shares
from trl_sae_audit.filtering.scores import example_scores
from trl_sae_audit.statistics import explain_preferences

BY_ATTRIBUTION = {"score": "attribution", "weights": "flags"}


def ids(rows):
    return [row["id"] for row in rows]


def expected_scores(audit):
    contributions = audit.contributions([11, 40])
    units = contributions / np.sqrt((contributions**2).mean(0))
    return units[:, 0] - 0.5 * units[:, 1]


def test_a_budget_drops_the_highest_scores_and_keeps_order_and_columns(audit, data):
    result = filter_preferences(data, audit, FLAGS, "drop", budget=6, **BY_ATTRIBUTION)
    score = expected_scores(audit)
    worst = set(np.argsort(-score)[:6])
    assert ids(result.dropped) == [f"pair {i}" for i in range(30) if i in worst]
    assert ids(result.kept) == [f"pair {i}" for i in range(30) if i not in worst]
    assert result.kept.features == data.features
    assert result.dropped["audit_row"][:] == sorted(worst)
    np.testing.assert_allclose(result.dropped["audit_score"][:], score[sorted(worst)], rtol=1e-5)
    assert "sycophancy, verbosity" in result.dropped["audit_reason"][0]
    assert len(filter_preferences(data, audit, FLAGS, budget=0.2, **BY_ATTRIBUTION).dropped) == 6
    assert (
        len(filter_preferences(data, audit, FLAGS, budget=29, **BY_ATTRIBUTION).dropped) == (score > 0).sum()
    )


def test_threshold_and_quantile(audit, data):
    score = expected_scores(audit)
    result = filter_preferences(data, audit, FLAGS, threshold=1.0, **BY_ATTRIBUTION)
    assert ids(result.dropped) == [f"pair {i}" for i in np.flatnonzero(score > 1.0)]
    result = filter_preferences(data, audit, FLAGS, quantile=0.8, **BY_ATTRIBUTION)
    assert ids(result.dropped) == [f"pair {i}" for i in np.flatnonzero(score > np.quantile(score, 0.8))]
    assert (
        len(filter_preferences(data, audit, FLAGS, threshold=-5.0, **BY_ATTRIBUTION).dropped)
        == (score > 0).sum()
    )


def test_flip_swaps_the_answers_of_the_selected_only(audit, data):
    result = filter_preferences(data, audit, FLAGS, "flip", budget=4, **BY_ATTRIBUTION)
    flipped = set(np.flatnonzero(result.plan.action == "flip"))
    assert len(flipped) == 4
    assert len(result.dropped) == 0
    for index, (row, old) in enumerate(zip(result.kept, data, strict=True)):
        names = ("rejected", "chosen") if index in flipped else ("chosen", "rejected")
        assert (row["chosen"], row["rejected"]) == (old[names[0]], old[names[1]])
        assert (row["id"], row["prompt"]) == (old["id"], old["prompt"])
    assert result.kept.features == data.features


def test_weights_bring_the_selected_down_to_the_others(audit, data):
    result = filter_preferences(data, audit, FLAGS, "weight", threshold=0.8, **BY_ATTRIBUTION)
    score, weight = expected_scores(audit), np.array(result.kept["weight"][:])
    np.testing.assert_allclose(weight, np.where(score > 0.8, 0.8 / score, 1.0), rtol=1e-5)
    assert len(result.dropped) == 0
    with pytest.raises(AuditError, match="column 'id' already"):
        filter_preferences(data, audit, FLAGS, "weight", threshold=0.8, weight_column="id", **BY_ATTRIBUTION)


def test_resampling_repeats_rows_in_proportion_to_their_weights(audit, data):
    weight = np.where(expected_scores(audit) > 0.5, 0.5 / expected_scores(audit), 1.0)
    result = filter_preferences(data, audit, FLAGS, "resample", threshold=0.5, **BY_ATTRIBUTION)
    assert len(result.kept) == 30
    copies = np.bincount(result.plan.kept, minlength=30)
    order = np.argsort(-expected_scores(audit), kind="stable")
    off = np.cumsum(copies[order]) - np.cumsum(30 * weight[order] / weight.sum())
    assert np.abs(off).max() <= 0.5 + 1e-6
    assert ids(result.kept) == [f"pair {i}" for i in np.repeat(np.arange(30), copies)]
    assert ids(result.dropped) == [f"pair {i}" for i in np.flatnonzero(copies == 0)]
    assert result.summary["repeated"] == (copies > 1).sum() > 0


def test_the_control_is_as_large_and_not_the_same(audit, data):
    result = filter_preferences(data, audit, FLAGS, budget=6, control=True, seed=3, **BY_ATTRIBUTION)
    assert len(result.control) == len(result.kept)
    assert ids(result.control) != ids(result.kept)
    again = filter_preferences(data, audit, FLAGS, budget=6, control=True, seed=3, **BY_ATTRIBUTION)
    assert ids(again.control) == ids(result.control)
    for flag in result.summary["flags"]:
        assert {"attribution_before", "attribution_after", "attribution_control"} <= set(flag)


def test_the_summary_predicts_the_audit_of_what_is_kept(model, tokenizer, dictionary, audit, data):
    for strategy in ("drop", "flip"):
        result = filter_preferences(data, audit, FLAGS, strategy, budget=5, **BY_ATTRIBUTION)
        second = audit_preferences(model, tokenizer, result.kept, dictionary, lookahead=None, progress=False)
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
    expected = sum(weight * example_scores(audit, flags, name, "flags") for name, weight in mix.items())
    np.testing.assert_allclose(example_scores(audit, flags, mix, "flags"), expected)
    gaps = audit.activation_gaps([11])[:, 0]
    np.testing.assert_allclose(
        example_scores(audit, flags, "activation", "flags"), gaps / np.sqrt((gaps**2).mean()), rtol=1e-5
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
            example_scores(audit, list(FLAGS), name, "flags"),
            units[:, 0] - 0.5 * units[:, 1],
            rtol=1e-4,
            atol=1e-6,
        )
    total = audit.features().set_index("feature")["activation_attribution"]
    np.testing.assert_allclose(
        audit.activation_contributions([11, 40]).sum(0), total.loc[[11, 40]], rtol=1e-4, atol=1e-7
    )


def test_a_balanced_budget_leaves_a_mean_score_of_zero(audit, data):
    score = expected_scores(audit) if expected_scores(audit).sum() > 0 else -expected_scores(audit)
    flags = FLAGS if expected_scores(audit).sum() > 0 else FlagSet([opposite(flag) for flag in FLAGS])
    shares = kept_shares(score)
    for strategy, expected in (("drop", 1 - shares), ("flip", (1 - shares) / 2)):
        plan = filter_preferences(data, audit, flags, strategy, **BY_ATTRIBUTION).plan
        acted = plan.action == strategy
        assert acted.sum() == pytest.approx(expected.sum(), abs=0.6)
        assert not acted[score <= 0].any()
        assert abs((plan.factor * score).sum()) <= score.max()
    weight = np.array(filter_preferences(data, audit, flags, "weight", **BY_ATTRIBUTION).kept["weight"][:])
    np.testing.assert_allclose(weight, shares, rtol=1e-5)
    against = filter_preferences(
        data, audit, FlagSet([opposite(flag) for flag in flags]), budget="balance", **BY_ATTRIBUTION
    )
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
    result = filter_preferences(data, audit, FLAGS, control=True)
    assert {name: result.plan.settings[name] for name in ("score", "weights", "budget")} == {
        "score": "max_activation",
        "weights": "fit",
        "budget": "balance",
    }
    score = result.summary["score"]
    assert score["before"] == pytest.approx((gaps @ weights).mean(), rel=1e-6)
    assert abs(score["after"]) <= (gaps @ weights).max() / len(result.kept)
    assert set(score) == {"before", "after", "control"}
    kept = np.delete(gaps @ weights, np.flatnonzero(result.plan.action == "drop"))
    assert kept.sum() == pytest.approx(score["after"] * len(kept))


def test_the_summary_has_each_flag_s_disparity_in_what_is_kept(audit, data):
    result = filter_preferences(data, audit, FLAGS, "drop", budget=6, **BY_ATTRIBUTION)
    table = audit.features().set_index("feature")
    rows = audit.examples([11, 40]).assign(active=lambda rows: rows["max_activation"] != 0)
    kept = rows[rows["row"].isin(result.plan.kept)]
    for flag in result.summary["flags"]:
        assert flag["disparity_before"] == pytest.approx(table["disparity"][flag["feature"]], abs=1e-6)
        share = kept[kept["feature"] == flag["feature"]].groupby("side")["active"].mean()
        assert flag["disparity_after"] == pytest.approx(share["chosen"] - share["rejected"], abs=1e-6)
        assert flag["disparity_after_margin"] >= 0


def test_a_flag_that_the_data_push_the_other_way_is_refused(audit, data, monkeypatch):
    table = audit.features().set_index("feature").loc[[11]].reset_index()
    pushed = "up" if table["selection"][0] > 0 else "down"
    monkeypatch.setattr(audit, "beyond_chance", lambda: table)
    contrary = Flag("tiny", 11, "mine", direction="down" if pushed == "up" else "up")
    with pytest.raises(AuditError, match=r"'mine' .*set its direction to .*; otherwise remove the flag"):
        filter_preferences(data, audit, FlagSet([contrary]))
    filter_preferences(data, audit, FlagSet([dataclasses.replace(contrary, direction=pushed)]))
    filter_preferences(data, audit, FlagSet([dataclasses.replace(contrary, direction="both")]))


def test_nothing_left_to_keep_is_refused(audit, data, monkeypatch):
    monkeypatch.setattr(
        audit, "activation_gaps", lambda features, pooling="mean": np.ones((30, len(features)))
    )
    with pytest.raises(AuditError, match="nothing would be kept"):
        filter_preferences(data, audit, FlagSet([Flag("tiny", 11)]))


def test_every_kind_of_source_is_filtered_alike(tmp_path, audit, data):
    data.save_to_disk(tmp_path / "disk")
    data.to_parquet(tmp_path / "data.parquet")
    data.to_json(tmp_path / "data.jsonl")
    expected = filter_preferences(data, audit, FLAGS, budget=6, **BY_ATTRIBUTION)
    for source in (
        list(data),
        data.to_iterable_dataset(),
        tmp_path / "disk",
        tmp_path / "data.parquet",
        str(tmp_path / "data.jsonl"),
    ):
        for strategy in ("drop", "flip", "weight", "resample"):
            expected = filter_preferences(data, audit, FLAGS, strategy, budget=6, **BY_ATTRIBUTION)
            result = filter_preferences(source, audit, FLAGS, strategy, budget=6, **BY_ATTRIBUTION)
            assert list(result.kept) == list(expected.kept)
            assert list(result.dropped) == list(expected.dropped)


def test_implicit_prompts_and_conversations_are_filtered(model, tokenizer, dictionary):
    rows = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        for row in pairs(8)
    ]
    data = Dataset.from_list(rows)
    audit = audit_preferences(model, tokenizer, data, dictionary, lookahead=None, progress=False)
    result = filter_preferences(data, audit, FlagSet([Flag("tiny", 5)]), "flip", budget=2)
    flipped = np.flatnonzero(result.plan.action == "flip")
    assert len(flipped) == 2
    assert result.kept[int(flipped[0])]["chosen"] == rows[flipped[0]]["rejected"]


def test_a_malformed_row_stops_or_is_set_aside_with_nothing_lost(tmp_path, model, tokenizer, dictionary):
    lines = [json.dumps(row) for row in pairs(10)]
    lines[4] = '{"prompt": "w1", "chosen"'
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    audit = audit_preferences(
        model, tokenizer, path, dictionary, lookahead=None, progress=False, on_bad_row="set_aside"
    )
    flags = FlagSet([Flag("tiny", 11)])
    with pytest.raises(AuditError, match=r"Row 4 .*not valid JSON"):
        filter_preferences(path, audit, flags, budget=2, **BY_ATTRIBUTION)
    result = filter_preferences(
        path, audit, flags, budget=2, control=True, on_bad_row="set_aside", **BY_ATTRIBUTION
    )
    assert len(result.kept) + len(result.dropped) == 10
    assert len(result.control) == len(result.kept) == 7
    aside = next(row for row in result.dropped if row["audit_row"] == 4)
    assert aside["text"] == lines[4]
    assert "not valid JSON" in aside["audit_reason"]
    assert aside["audit_score"] is None


def test_an_audit_of_another_dataset_is_refused(audit, data):
    with pytest.raises(AuditError, match="differs from row 0"):
        filter_preferences(pairs(30, seed=9), audit, FLAGS, budget=2, **BY_ATTRIBUTION)
    with pytest.raises(AuditError, match="with 30 rows where this one has 29"):
        filter_preferences(data.select(range(29)), audit, FLAGS, budget=2)
    with pytest.raises(AuditError, match="differs from row 30"):
        filter_preferences([*data, data[0]], audit, FLAGS, budget=2, **BY_ATTRIBUTION)
    changed = [dict(row) for row in data]
    changed[17]["chosen"] += " w1"
    with pytest.raises(AuditError, match="differs from row 17"):
        filter_preferences(changed, audit, FLAGS, budget=2, **BY_ATTRIBUTION)


def test_a_flag_of_another_dictionary_is_refused(audit, data):
    with pytest.raises(AuditError, match="they are of 'other'"):
        filter_preferences(data, audit, FlagSet([Flag("other", 1)]), budget=2)
    with pytest.raises(AuditError, match="written for another dictionary"):
        filter_preferences(data, audit, FlagSet([Flag("tiny", 1, identity="0" * 64)]), budget=2)
    with pytest.raises(AuditError, match="there are no flags"):
        filter_preferences(data, audit, FlagSet(), budget=2, **BY_ATTRIBUTION)


@pytest.mark.parametrize(
    ("options", "words"),
    [
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
    one = filter_preferences(data, again, FLAGS, budget=6, **BY_ATTRIBUTION)
    assert list(one.kept) == list(filter_preferences(data, audit, FLAGS, budget=6, **BY_ATTRIBUTION).kept)
