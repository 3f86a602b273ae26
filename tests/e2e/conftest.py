"""What the tests of the studies on a real model share: a directory that they write into, and a tiny model."""

from __future__ import annotations

import json

import pytest
from helpers.studies import STUDIES, letters
from helpers.worlds import make_model, save_model, save_sae


@pytest.fixture
def studies(monkeypatch, tmp_path):
    """The studies' modules, writing into a directory of their own."""
    monkeypatch.syspath_prepend(str(STUDIES))
    import common

    monkeypatch.setattr(common, "RAW", tmp_path / "raw")
    monkeypatch.setattr(common, "RESULTS", tmp_path / "docs")
    return tmp_path


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny model that reads letters, an untrained SAE of it, and pairs over ten instructions that all prefer the same word."""
    root = tmp_path_factory.mktemp("gemma-studies")
    tokenizer = letters()
    model = make_model(tokenizer)
    model.config.max_position_embeddings = 512
    save_model(model, tokenizer, root / "model")
    save_sae(root / "sae")
    rows = [
        {"prompt": f"say {number % 10}: ", "chosen": f"{number} aye, aye", "rejected": f"{number} nope"}
        for number in range(40)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root
