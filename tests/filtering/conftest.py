"""Pairs, and an audit of them to filter by."""

from __future__ import annotations

import pytest
from helpers.worlds import pairs

from trl_sae_audit import audit_preferences


@pytest.fixture(scope="module")
def data():
    return pairs(30).add_column("id", [f"pair {i}" for i in range(30)])


@pytest.fixture(scope="module")
def audit(model, tokenizer, dictionary, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("audit") / "audit"
    return audit_preferences(
        model, tokenizer, data, dictionary, output_dir=directory, lookahead=None, progress=False, part_size=8
    )
