"""Lookahead as users meet it: through `audit_preferences`, kept with the audit, usable by the filter."""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import pytest
import torch
from helpers.worlds import make_model, pairs
from trl import DPOConfig

from trl_sae_audit import (
    Audit,
    AuditError,
    Flag,
    FlagSet,
    LookaheadConfig,
    audit_preferences,
    filter_preferences,
)
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.models.sampling import Sampling

FLAGS = FlagSet([Flag("tiny", 3, "a"), Flag("tiny", 40, "b")])


@pytest.fixture(scope="module")
def look_ahead(model, tokenizer, dictionary):
    """Audits with a lookahead."""
    return partial(audit_with_lookahead, model, tokenizer, dictionary)


def audit_with_lookahead(model, tokenizer, dictionary, data, output_dir=None, **options):
    config = {"probe": pairs(5, seed=7), "optimizer": UpdateRule("adamw", 1e-5), "sampling": None}
    config |= {name: options.pop(name) for name in ("probe", "optimizer", "sampling") if name in options}
    options = {"lookahead": LookaheadConfig(**config)} | options
    return audit_preferences(
        model,
        tokenizer,
        data,
        dictionary,
        output_dir=output_dir,
        progress=False,
        part_size=5,
        batch_size=3,
        **options,
    )


def test_predicted_change_is_a_column_and_influence_adds_up_to_it(look_ahead):
    audit = look_ahead(pairs(11))
    change = audit.features().set_index("feature")["predicted_change"]
    table = audit.influence(FLAGS)
    assert len(table) == 22
    assert set(table["label"]) == {"a", "b"}
    for feature, total in table.groupby("feature")["influence"].sum().items():
        assert total == pytest.approx(change[feature], rel=1e-3)


def test_a_step_of_plain_gradient_descent_goes_where_predicted(look_ahead, tokenizer, dictionary):
    """The prediction for lr is the measured change divided by k for a step of size lr · k, k small."""
    data = pairs(8)
    audit = look_ahead(data, optimizer=UpdateRule("sgd", 1e-3, max_grad_norm=None))
    table = audit.features().set_index("feature").sort_index()
    step = audit._lookahead.ahead.step()
    moved = make_model(tokenizer)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            value += step[name]
    after = audit_preferences(
        moved,
        tokenizer,
        data,
        dictionary,
        lookahead=LookaheadConfig(pairs(5, seed=7), optimizer=UpdateRule("sgd", 0.0), sampling=None),
        progress=False,
    )
    measured = (
        after.features().set_index("feature").sort_index()["probe_activation"] - table["probe_activation"]
    )
    assert np.corrcoef(measured, table["predicted_change"])[0, 1] > 0.99


def test_it_is_kept_with_the_audit(tmp_path, look_ahead):
    audit = look_ahead(pairs(7), tmp_path / "audit")
    change = audit.features().set_index("feature")["predicted_change"]
    first = audit.influence(FLAGS[:1])
    again = Audit.load(tmp_path / "audit")
    assert again.features().equals(audit.features())
    assert again.influence(FLAGS[:1]).equals(first)
    with pytest.raises(AuditError, match="feature 40 was not computed"):
        again.influence(FLAGS)
    resumed = look_ahead(pairs(7), tmp_path / "audit")
    assert resumed.influence(FLAGS)["influence"].notna().all()
    other = look_ahead(pairs(7), tmp_path / "audit", optimizer=UpdateRule("adamw", 3e-5))
    ratio = other.features().set_index("feature")["predicted_change"] / change
    np.testing.assert_allclose(ratio, ratio.iloc[0], rtol=1e-3)
    plain = look_ahead(pairs(7), lookahead=None)
    with pytest.raises(AuditError, match="no influence; pass lookahead="):
        plain.influence(FLAGS)


def test_the_filter_can_use_influence(look_ahead):
    data = pairs(12)
    audit = look_ahead(data)
    result = filter_preferences(data, audit, FLAGS[:1], score="influence", budget=3)
    influence = audit.influence(FLAGS[:1])["influence"].to_numpy()
    assert set(result.dropped["audit_row"][:]) == set(np.argsort(-influence)[:3])
    assert (
        len(
            filter_preferences(data, audit, FLAGS, score={"influence": 1, "attribution": 1}, budget=3).dropped
        )
        == 3
    )


def test_the_default_step_is_the_trainers_usual_one(tmp_path, look_ahead):
    args = DPOConfig(
        str(tmp_path),
        learning_rate=2e-4,
        weight_decay=0.3,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        bf16=False,
        report_to="none",
        use_cpu=True,
    )
    audit = look_ahead(pairs(4), args=args, optimizer=None)
    rule = audit._lookahead.ahead.rule
    assert (rule.kind, rule.learning_rate, rule.weight_decay, rule.max_grad_norm) == ("adamw", 2e-4, 0.3, 1.0)
    assert rule.batch_size == 6
    args = DPOConfig(str(tmp_path), optim="adafactor", bf16=False, report_to="none", use_cpu=True)
    with pytest.raises(AuditError, match="adafactor"):
        look_ahead(pairs(4), args=args, optimizer=None)


def test_change_in_generations(look_ahead, model, tokenizer, dictionary, tmp_path):
    audit = look_ahead(pairs(6), tmp_path / "audit", sampling=Sampling(3, max_new_tokens=5))
    change = audit.features().set_index("feature")["predicted_change_in_generations"]
    assert change.abs().max() > 0
    assert Audit.load(tmp_path / "audit").features().equals(audit.features())
    other = look_ahead(pairs(6), tmp_path / "audit", sampling=Sampling(3, max_new_tokens=5, seed=1))
    assert not other.features().set_index("feature")["predicted_change_in_generations"].equals(change)
    without = look_ahead(pairs(6), tmp_path / "audit")
    assert "predicted_change_in_generations" not in without.features()
    with pytest.raises(AuditError, match="sampled at temperature 1"):
        look_ahead(pairs(6), sampling=Sampling(3, temperature=0.5))
    rows = [{"chosen": "w1 w2 w3", "rejected": "w4 w5"}]
    with pytest.raises(AuditError, match="no prompt to sample answers at"):
        look_ahead(pairs(6), sampling=Sampling(3), probe=rows)
    with pytest.raises(AuditError, match="is for a lookahead"):
        audit_preferences(model, tokenizer, pairs(6), dictionary, sampling=Sampling(3), lookahead=None)


def test_by_default_prompts_are_held_out(model, tokenizer, dictionary):
    """A quarter of the prompts, whole: none of their pairs is in the step, all are audited."""
    data = [{**row, "prompt": f"w{n // 2} w1 "} for n, row in enumerate(pairs(24))]
    audit = audit_preferences(model, tokenizer, data, dictionary, progress=False)
    about = audit.lookahead
    assert (about["rows"], about["pairs"], about["prompts"], about["held_out"]) == (24, 18, 3, True)
    assert len(audit) == 24
    split = audit._lookahead.split
    asked = {tokenizer.decode(prompt).split()[-2] for prompt in split.prompts}
    trained = {data[example.row]["prompt"].split()[0] for example in split.examples}
    assert len(asked) == 3
    assert not asked & trained
    table = audit.features()
    assert table["effect_size"].abs().is_monotonic_decreasing
    assert (table["effect_size_low"] < table["effect_size"]).all()
    assert "predicted_change" not in table  # there is no given text to look at
    smaller = LookaheadConfig(prompts=2, pairs=12, sampling=Sampling(2, 4))
    about = audit_preferences(model, tokenizer, data, dictionary, lookahead=smaller, progress=False).lookahead
    assert (about["rows"], about["of_rows"], about["prompts"]) == (12, 24, 2)


def test_a_probe_of_prompts_alone(model, tokenizer, dictionary):
    config = LookaheadConfig([{"prompt": "w1 w2 "}, {"prompt": "w3 "}], sampling=Sampling(2, 4))
    audit = audit_preferences(model, tokenizer, pairs(6), dictionary, lookahead=config, progress=False)
    assert (audit.lookahead["prompts"], audit.lookahead["pairs"]) == (2, 6)
    assert audit.features()["effect_size"].notna().any()


def test_influence_in_generations_adds_up_over_the_rows_of_the_step(model, tokenizer, dictionary):
    data = pairs(16)
    audit = audit_preferences(model, tokenizer, data, dictionary, progress=False)
    change = audit.features().set_index("feature")["predicted_change_in_generations"]
    influence = audit.influence(FLAGS[:1]).set_index("row")["influence"]
    assert len(influence) == 16
    step = [example.row for example in audit._lookahead.split.examples]
    assert influence[step].sum() == pytest.approx(change[3], rel=1e-3)


def test_how_the_data_is_cut_does_not_matter(model, tokenizer, dictionary):
    one, other = (
        audit_preferences(
            model, tokenizer, pairs(21), dictionary, batch_size=size, part_size=part, progress=False
        )
        .features()
        .set_index("feature")
        .sort_index()
        for size, part in ((21, 512), (2, 5))
    )
    for column in ("effect_size", "effect_size_low", "predicted_change_in_generations"):
        scale = one[column].abs().max()
        np.testing.assert_allclose(one[column] / scale, other[column] / scale, atol=1e-4, err_msg=column)


def test_what_cannot_be_looked_ahead_to_is_said_and_the_audit_goes_on(tokenizer, dictionary, caplog):
    """By default; a lookahead that was asked for is an error, before anything is computed."""
    frozen = make_model(tokenizer).requires_grad_(False)
    with caplog.at_level(logging.WARNING):
        audit = audit_preferences(frozen, tokenizer, pairs(4), dictionary, progress=False)
    assert "no lookahead to generations. No parameter of the model requires a gradient" in caplog.text
    assert audit.lookahead is None
    assert "effect_size" not in audit.features()
    with pytest.raises(AuditError, match="No parameter"):
        audit_preferences(
            frozen, tokenizer, "nowhere.jsonl", dictionary, lookahead=LookaheadConfig(prompts=3)
        )
    with pytest.raises(AuditError, match="looks at given text; pass probe="):
        LookaheadConfig(sampling=None)


def test_a_bad_probe_is_named(look_ahead):
    with pytest.raises(AuditError, match="probe has an empty 'chosen'"):
        look_ahead(pairs(3), probe=[{"prompt": "w1", "chosen": "", "rejected": "w2"}])
    with pytest.raises(AuditError, match="probe has no example"):
        look_ahead(pairs(3), probe=[])
