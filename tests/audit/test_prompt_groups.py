"""Answers put together by their prompts."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.rewards import answered, by_length
from helpers.worlds import make_model, make_sae_dictionary, make_tokenizer

from trl_sae_audit import Audit, audit_preferences
from trl_sae_audit.audit.prompt_groups import by_prompt


@pytest.fixture(scope="module")
def audit() -> Audit:
    """Four prompts with 3, 3, 2 and 3 answers, mixed, in parts of two rows."""
    rows = [row for row in answered(False, answers=3) if row["completion_ids"]]
    del rows[7]
    order = np.random.default_rng(0).permutation(len(rows))
    tokenizer = make_tokenizer()
    return audit_preferences(
        make_model(tokenizer),
        tokenizer,
        [{name: rows[place][name] for name in ("prompt", "completion")} for place in order],
        make_sae_dictionary(),
        "policy_gradient",
        reward=by_length,
        lookahead=None,
        part_size=2,
        progress=False,
    )


def test_every_answer_is_in_its_prompts_example(audit: Audit) -> None:
    parts = list(audit._store.parts())
    groups = audit.answers()["group"].to_numpy()
    merged = by_prompt(iter(parts), groups)
    arrays = merged.arrays
    assert arrays.gradient.shape[:2] == (4, 3)
    assert sorted((arrays.length > 0).sum(1)) == [2, 3, 3, 3]
    single = {
        name: np.concatenate([getattr(part.arrays, name)[:, 0] for part in parts])
        for name in ("gradient", "length", "weight", "residual")
    }
    for unit in range(4):
        rows = np.flatnonzero(groups == groups[merged.row[unit]])
        assert rows[0] == merged.row[unit]
        np.testing.assert_allclose(
            arrays.gradient[unit].sum(0), single["gradient"][rows].sum(0) * 4 / 11, rtol=1e-4, atol=1e-6
        )
        assert list(arrays.length[unit, : len(rows)]) == list(single["length"][rows])
        np.testing.assert_allclose(
            arrays.weight[unit, : len(rows)], single["weight"][rows] * 4 / 11, rtol=1e-5
        )
    active = [np.diff(part.arrays.indptr) for part in parts]
    assert arrays.indptr[-1] == np.concatenate(active).sum()
    first = parts[0].arrays
    place = np.flatnonzero(merged.row == np.flatnonzero(groups == groups[0])[0])[0] * 3
    found = slice(*arrays.indptr[place : place + 2])
    assert list(arrays.feature[found]) == list(first.feature[: first.indptr[1]])
    assert list(arrays.mean[found]) == list(first.mean[: first.indptr[1]])


def test_the_order_and_the_parts_of_the_rows_decide_nothing(audit: Audit) -> None:
    whole = audit.features().sort_values("feature", ignore_index=True)
    rows = audit.answers().sort_values("group", kind="stable")[["prompt", "completion"]].to_dict("records")
    tokenizer = make_tokenizer()
    other = audit_preferences(
        make_model(tokenizer),
        tokenizer,
        rows,
        make_sae_dictionary(),
        "policy_gradient",
        reward=by_length,
        lookahead=None,
        progress=False,
    )
    table = other.features().sort_values("feature", ignore_index=True)
    for name in (
        "attribution",
        "standard_error",
        "p_value",
        "selection",
        "selection_standard_error",
        "disparity",
    ):
        np.testing.assert_allclose(whole[name], table[name], rtol=1e-3, atol=1e-6, err_msg=name)
