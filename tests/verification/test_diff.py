"""Two checkpoints: the interval against a jackknife, and a change that is known, through models and through the command."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from helpers.worlds import make_sae_dictionary, nudged, prompts, save_model, save_sae

from trl_sae_audit import AuditError, diff_models
from trl_sae_audit.cli.main import main
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.diff import change_table
from trl_sae_audit.verification.measured import AnswerActivations

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version
SAMPLING = Sampling(answers=3, max_new_tokens=8)


def activations(seed: int, shift: float = 0.0, n: int = 60, d_sae: int = 300) -> AnswerActivations:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 30, n).astype(float)
    sums = tokens[:, None] * (1 + rng.standard_normal((n, d_sae)) * 0.3 + shift)
    names = tuple(map(str, range(n)))
    return AnswerActivations(sums.astype(np.float32), tokens, names, np.ones(d_sae, bool))


def test_the_interval_is_that_of_a_jackknife():
    before, after = activations(0), activations(1, 0.05)
    table = change_table(before, after, {7: "seven"}).set_index("feature").sort_index()
    n = len(before.tokens)
    left_out = 1 - np.eye(n)
    replicates = after.mean(left_out) - before.mean(left_out)
    error = np.sqrt((n - 1) / n * np.square(replicates - replicates.mean(0)).sum(0))
    np.testing.assert_allclose(table["change"], after.mean() - before.mean(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose((table["high"] - table["low"]) / 2, 2.001 * error, rtol=0.05)
    assert table["words"][7] == "seven"


def test_nothing_is_found_where_nothing_changed_and_order_is_by_effect():
    null = change_table(activations(0), activations(1), {})
    assert (null["p_value"] < 0.05).mean() == pytest.approx(0.05, abs=0.05)
    assert (null["q_value"] < 0.05).sum() <= 3
    moved = change_table(activations(0), activations(1, 0.3), {})
    assert (moved["q_value"] < 0.05).mean() > 0.9
    beyond = moved[moved["q_value"] < 0.05]
    assert beyond.index.tolist() == list(range(len(beyond)))
    assert (beyond["effect_size"].abs().diff().dropna() <= 0).all()


def test_a_model_that_says_a_word_more_often_writes_it_and_reads_as_before(model, tokenizer):
    after = nudged(model, tokenizer, "w17")
    found = diff_models(model, after, tokenizer, make_sae_dictionary(), prompts(24), sampling=SAMPLING)
    risen = found.beyond_chance()
    assert len(risen)
    assert "w17" in risen.loc[risen["change"].idxmax(), "words"]
    assert (found.reads["change"] == 0).all()
    assert not len(found.beyond_chance("reads"))
    assert set(found.contexts["source"]) == {"before", "after"}
    same = diff_models(model, model, tokenizer, make_sae_dictionary(), prompts(24), sampling=SAMPLING)
    assert (same.writes["change"] == 0).all()
    with pytest.raises(AuditError, match="one prompt only"):
        diff_models(model, model, tokenizer, make_sae_dictionary(), prompts(1), sampling=SAMPLING)


def test_the_command(model, tokenizer, tmp_path, capsys):
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.lm_head.weight[tokenizer.convert_tokens_to_ids("w17")] *= 30
    save_model(model, tokenizer, tmp_path / "before")
    save_model(after, tokenizer, tmp_path / "after")
    save_sae(tmp_path / "sae")
    prompts(30).to_json(tmp_path / "prompts.jsonl")
    command = [
        *("diff", str(tmp_path / "before"), str(tmp_path / "after"), "--dictionary", str(tmp_path / "sae")),
        *("--dataset", str(tmp_path / "prompts.jsonl"), "--samples", "2", "--max_new_tokens", "6"),
    ]
    assert main([*command, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["prompts"] == 30 and document["answers"] == 60  # noqa: PT018
    assert len(document["writes"]["top"]) == 10
    assert not any(row["label"] for row in document["writes"]["top"])
    named = document["writes"]["top"][0]["feature"]
    (tmp_path / "labels.csv").write_text(f"feature,label\n{named},flattery\n")
    command += ["--labels", str(tmp_path / "labels.csv")]
    assert document["samples"]
    assert set(document["samples"][0]) == {"prompt", "change", "before", "after"}
    assert main([*command, "--output", str(tmp_path / "diff.csv")]) == 0
    text = capsys.readouterr().out
    assert "What they write" in text
    assert " flattery: " in text
    shown = text.partition("Where the answers differ most")[2]
    assert shown.count("prompt") >= 3
    assert "«" in shown
    assert max(map(len, text.splitlines())) <= 80
    assert (
        (tmp_path / "diff-reads.csv")
        .read_text()
        .startswith("feature,label,label_accuracy,label_accuracy_low,words,before,after,change")
    )
    assert (tmp_path / "diff-samples.csv").read_text().startswith("prompt,change,before,after\n")
