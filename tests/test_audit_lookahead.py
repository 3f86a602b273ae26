"""Lookahead as users meet it: through `audit_preferences`, kept with the audit, usable by the filter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from trl import DPOConfig
from worlds import make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import Audit, AuditError, Flag, FlagSet, audit_preferences, filter_preferences
from trl_sae_audit.sampling import Sampling
from trl_sae_audit.update_rule import UpdateRule

FLAGS = FlagSet([Flag("tiny", 3, "a"), Flag("tiny", 40, "b")])


@pytest.fixture(scope="module")
def world():
    tokenizer = make_tokenizer()
    return make_model(tokenizer), tokenizer, make_dictionary()


def looked_ahead(world, data, output_dir=None, **options):
    model, tokenizer, dictionary = world
    options = {"lookahead": pairs(5, seed=7), "optimizer": UpdateRule("adamw", 1e-5)} | options
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


def test_predicted_change_is_a_column_and_influence_adds_up_to_it(world):
    audit = looked_ahead(world, pairs(11))
    change = audit.features().set_index("feature")["predicted_change"]
    table = audit.influence(FLAGS)
    assert len(table) == 22
    assert set(table["label"]) == {"a", "b"}
    for feature, total in table.groupby("feature")["influence"].sum().items():
        assert total == pytest.approx(change[feature], rel=1e-3)


def test_a_step_of_plain_gradient_descent_goes_where_predicted(world):
    """The prediction for lr is the realised change divided by k for a step of size lr · k, k small."""
    _, tokenizer, dictionary = world
    data = pairs(8)
    audit = looked_ahead(world, data, optimizer=UpdateRule("sgd", 1e-3, max_grad_norm=None))
    table = audit.features().set_index("feature").sort_index()
    step = audit._lookahead.step()
    moved = make_model(tokenizer)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            value += step[name]
    after = audit_preferences(
        moved,
        tokenizer,
        data,
        dictionary,
        lookahead=pairs(5, seed=7),
        optimizer=UpdateRule("sgd", 0.0),
        progress=False,
    )
    realised = (
        after.features().set_index("feature").sort_index()["probe_activation"] - table["probe_activation"]
    )
    assert np.corrcoef(realised, table["predicted_change"])[0, 1] > 0.99


def test_it_is_kept_with_the_audit(tmp_path, world):
    audit = looked_ahead(world, pairs(7), tmp_path / "audit")
    change = audit.features().set_index("feature")["predicted_change"]
    first = audit.influence(FLAGS[:1])
    again = Audit.load(tmp_path / "audit")
    assert again.features().equals(audit.features())
    assert again.influence(FLAGS[:1]).equals(first)
    with pytest.raises(AuditError, match="feature 40 was not computed"):
        again.influence(FLAGS)
    resumed = looked_ahead(world, pairs(7), tmp_path / "audit")
    assert resumed.influence(FLAGS)["influence"].notna().all()
    other = looked_ahead(world, pairs(7), tmp_path / "audit", optimizer=UpdateRule("adamw", 3e-5))
    ratio = other.features().set_index("feature")["predicted_change"] / change
    np.testing.assert_allclose(ratio, ratio.iloc[0], rtol=1e-3)
    plain = looked_ahead(world, pairs(7), lookahead=None)
    with pytest.raises(AuditError, match="no influence; pass lookahead="):
        plain.influence(FLAGS)


def test_the_filter_can_use_influence(world):
    data = pairs(12)
    audit = looked_ahead(world, data)
    result = filter_preferences(data, audit, FLAGS[:1], score="influence", budget=3)
    influence = audit.influence(FLAGS[:1])["influence"].to_numpy()
    assert set(result.dropped["audit_row"][:]) == set(np.argsort(-influence)[:3])
    assert (
        len(
            filter_preferences(data, audit, FLAGS, score={"influence": 1, "attribution": 1}, budget=3).dropped
        )
        == 3
    )


def test_the_default_step_is_the_trainers_usual_one(tmp_path, world):
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
    audit = looked_ahead(world, pairs(4), args=args, optimizer=None)
    rule = audit._lookahead.rule
    assert (rule.kind, rule.learning_rate, rule.weight_decay, rule.max_grad_norm) == ("adamw", 2e-4, 0.3, 1.0)
    assert rule.batch_size == 6
    args = DPOConfig(str(tmp_path), optim="adafactor", bf16=False, report_to="none", use_cpu=True)
    with pytest.raises(AuditError, match="adafactor"):
        looked_ahead(world, pairs(4), args=args, optimizer=None)


def test_what_the_model_would_write(world, tmp_path):
    audit = looked_ahead(world, pairs(6), tmp_path / "audit", sampling=Sampling(3, max_new_tokens=5))
    change = audit.features().set_index("feature")["predicted_sampled_change"]
    assert change.abs().max() > 0
    assert Audit.load(tmp_path / "audit").features().equals(audit.features())
    other = looked_ahead(world, pairs(6), tmp_path / "audit", sampling=Sampling(3, max_new_tokens=5, seed=1))
    assert not other.features().set_index("feature")["predicted_sampled_change"].equals(change)
    without = looked_ahead(world, pairs(6), tmp_path / "audit")
    assert "predicted_sampled_change" not in without.features()
    with pytest.raises(AuditError, match="sampled at temperature 1"):
        looked_ahead(world, pairs(6), sampling=Sampling(3, temperature=0.5))
    rows = [{"chosen": "w1 w2 w3", "rejected": "w1 w2 w4"}]
    with pytest.raises(AuditError, match="has no 'prompt' to sample"):
        looked_ahead(world, pairs(6), sampling=Sampling(3), lookahead=rows)
    with pytest.raises(AuditError, match="is for a lookahead"):
        looked_ahead(world, pairs(6), sampling=Sampling(3), lookahead=None)


def test_a_bad_probe_is_named(world):
    with pytest.raises(AuditError, match="probe has an empty 'chosen'"):
        looked_ahead(world, pairs(3), lookahead=[{"prompt": "w1", "chosen": "", "rejected": "w2"}])
    with pytest.raises(AuditError, match="probe has no example"):
        looked_ahead(world, pairs(3), lookahead=[])
