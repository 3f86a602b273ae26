"""An audit of a tiny model, in which what a feature is about is known, and a run of the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.audits import audited
from helpers.worlds import make_sae_dictionary, pairs

from trl_sae_audit import Audit


@pytest.fixture(scope="package")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import worlds

    tokenizer = worlds.make_tokenizer()
    where = tmp_path_factory.mktemp("labels") / "audit"
    dictionary = make_sae_dictionary()
    dictionary.neuronpedia_id = "tiny/1-res"
    audited(worlds.make_model(tokenizer), tokenizer, pairs(160), dictionary, output_dir=where)
    return where


@pytest.fixture(scope="package")
def features(made: Path) -> list[int]:
    """Some with enough contexts to be scored."""
    from trl_sae_audit.labels.exercises import leading_features, make_exercises

    audit = Audit.load(made)
    exercises = make_exercises(audit, leading_features(audit, 30))
    return [each.feature for each in exercises if len(each.held_out) >= 5][:4]


@pytest.fixture
def audit(made: Path, tmp_path: Path) -> Audit:
    """A copy, so that labels of one test are not another's."""
    return Audit.load(Audit.load(made).save(tmp_path / "audit"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_SAE_AUDIT_CACHE", str(tmp_path / "cache"))
