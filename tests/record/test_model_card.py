"""A model card's section: its numbers are those of the files it was made from, and what others wrote stays text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.trainers import dpo
from helpers.worlds import make_dictionary, make_model, make_tokenizer, pairs, save_sae
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    Flag,
    FlagSet,
    RunRecord,
    audit_preferences,
    filter_preferences,
    load_dictionary,
)
from trl_sae_audit.verification.comparison import save_verifications, verify
from trl_sae_audit.verification.measured import measured_change

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("card")
    trainer = dpo(directory)
    watch = {"likes | pipes": 3}
    save_sae(directory / "sae")
    sae = load_dictionary(directory / "sae")
    trainer.add_callback(FeatureAttributionCallback(sae, directory / "run", watch=watch))
    trainer.train()
    return directory


def test_the_card_has_the_runs_numbers(trained: Path) -> None:
    record = RunRecord.load(trained / "run")
    card = record.model_card(n=2)
    assert card.startswith("## What training taught\n\nDPOTrainer, 3 optimizer steps")
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ")][2:]
    table = record.features().set_index("feature")
    assert len(rows) == 4
    for row in rows:
        feature = int(row[0].removeprefix("| "))
        assert float(row[2]) == pytest.approx(table["selection"][feature], rel=5e-3)
        margin = float(row[3].removesuffix(" |"))
        assert margin == pytest.approx(1.96 * table["selection_standard_error"][feature], rel=0.06)
    order = table["selection_z"].dropna()
    assert int(rows[0][0].removeprefix("| ")) == order.idxmax()
    assert int(rows[2][0].removeprefix("| ")) == order.idxmin()


def test_what_others_wrote_stays_text(trained: Path) -> None:
    card = RunRecord.load(trained / "run").model_card(n=64)
    assert "likes \\| pipes" in card


def test_the_card_tells_of_data_filter_and_verdict(
    trained: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    data, dictionary = pairs(24), make_dictionary()
    audit = audit_preferences(
        model, tokenizer, data, dictionary, output_dir=trained / "audit", lookahead=None, progress=False
    )
    table = audit.features().set_index("feature")["disparity"]
    flag = Flag("tiny", int(table.idxmax()), "sycophancy")
    result = filter_preferences(data, audit, FlagSet([flag]), budget=0.25, check=False)
    result.save(trained / "filtered")
    after = make_model(make_tokenizer(), seed=5)
    change = measured_change(model, after, tokenizer, dictionary, data)
    scores = np.random.default_rng(0).normal(size=dictionary.d_sae)
    found = verify({"selection": scores}, change)
    save_verifications([found], trained / "verified", {})
    card = RunRecord.load(trained / "run").model_card(
        audit=trained / "audit", filtered=trained / "filtered", verified=trained / "verified"
    )
    assert "24 examples were audited" in card
    assert f"of 24 rows {result.summary['kept']} were kept ({result.summary['dropped']} dropped)" in card
    assert "“sycophancy”" in card
    assert f"selection {found.statistics['selection']['r2'].estimate:.2f}" in card


def test_a_directory_of_another_kind_is_refused(trained: Path) -> None:
    with pytest.raises(AuditError, match="not an audit"):
        RunRecord.load(trained / "run").model_card(audit=trained / "run")


def test_a_record_can_be_printed(trained: Path) -> None:
    record = RunRecord.load(trained / "run")
    lines = str(record).splitlines()
    assert lines[0].startswith("DPOTrainer of ")
    assert "finished, 3 optimizer steps" in lines[0]
    rows = [line.split() for line in lines if line.split()[:1] and line.split()[0].isdigit()]
    first = record.features().head(10)
    assert [int(row[0]) for row in rows] == first["feature"].tolist()
    assert "selection" in lines[3]
