"""The prediction on the kept rows, against an audit of these rows at the same prompts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.filters import FLAGS
from helpers.worlds import pairs

from trl_sae_audit import Audit, LookaheadConfig, audit_preferences, filter_preferences
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.filtering.check import describe_check
from trl_sae_audit.models.sampling import Sampling

PROMPTS = [{"prompt": f"w{n} w{n + 1}"} for n in range(6)]
AHEAD = LookaheadConfig(PROMPTS, sampling=Sampling(answers=2, max_new_tokens=6, seed=3), groups=3)
BUDGET = {"score": "attribution", "weights": "flags", "budget": 6}


@pytest.fixture(scope="module")
def data():
    return pairs(24)


@pytest.fixture(scope="module")
def audit(model, tokenizer, dictionary, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("audit") / "audit"
    return audit_preferences(
        model, tokenizer, data, dictionary, output_dir=directory, lookahead=AHEAD, progress=False
    )


@pytest.mark.parametrize("strategy", ["drop", "flip", "resample"])
def test_it_is_what_an_audit_of_the_kept_rows_predicts(model, tokenizer, dictionary, audit, data, strategy):
    result = filter_preferences(data, audit, FLAGS, strategy, **BUDGET)
    again = audit_preferences(model, tokenizer, result.kept, dictionary, lookahead=AHEAD, progress=False)
    expected = again.features().sort_values("feature", ignore_index=True)["effect_size"]
    found = result.check.features
    np.testing.assert_allclose(found["after"], expected, rtol=2e-3, atol=1e-4 * expected.abs().max())
    before = audit.features().sort_values("feature", ignore_index=True)
    for end in ("", "_low", "_high"):
        np.testing.assert_array_equal(found[f"before{end}"], before[f"effect_size{end}"])
    assert (found["after_low"] <= found["after"]).equals(found["after"].notna())
    assert result.check.pairs == len(result.kept)
    assert result.summary["check"]["flags"][0]["after"] == found["after"][11]
    assert describe_check(result.summary["check"])[0].startswith("Predicted again on")
    words = before.set_index("feature")["words"]
    assert found.set_index("feature")["words"].equals(words)
    rise = {"before": 0.0012, "after": 0.034}
    told = result.summary["check"] | {
        "risen": [{"feature": 7, "words": "w7 " * 20, **rise}, {"feature": 8, **rise}]
    }
    assert "7 “w7 w7" in describe_check(told | {"risen_count": 2})[-1]
    assert ": 2 not flagged: " in describe_check(told | {"risen_count": 2})[-1]
    assert "…” (+0.0012 to +0.034), 8 (+0.0012 to" in describe_check(told | {"risen_count": 9})[-1]


def test_weights_count_as_copies(audit, data):
    result = filter_preferences(
        data, audit, FLAGS, "weight", score="attribution", weights="flags", threshold=0.8
    )
    assert result.check.pairs == pytest.approx(sum(result.kept["weight"][:]), abs=1)


def test_it_can_be_left_out_and_needs_the_model(audit, data):
    assert filter_preferences(data, audit, FLAGS, check=False, **BUDGET).check is None
    result = filter_preferences(data, Audit.load(audit.directory), FLAGS, **BUDGET)
    assert result.check is None
    assert "check" not in result.summary


def test_too_few_pairs_are_said_to_be_too_few(audit, data):
    result = filter_preferences(
        data, audit, FLAGS, "drop", score="attribution", weights="flags", threshold=0.0
    )
    only = result.plan.kept[:1]
    found, pairs = audit.predict_on(row for row in iterate_rows(data) if row.index in only)
    assert pairs == 1
    assert np.isnan(found["effect_size_low"]).all()
    nothing = {**result.summary["check"], "flags": [{"label": "x", "feature": 1, "after_low": float("nan")}]}
    assert "too few to tell" in describe_check(nothing)[0]
    assert audit.predict_on([]) == ({}, 0)
