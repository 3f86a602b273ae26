"""Answers side by side: which prompts and which answers by brute force, their marks by another forward pass, and the files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.html_page import Page
from helpers.report_sources import make_dictionary as make_report_dictionary
from helpers.report_sources import make_record
from helpers.worlds import make_sae_dictionary, nudged, prompts

from trl_sae_audit import AuditError, diff_models
from trl_sae_audit.cli.diff import watched_of
from trl_sae_audit.cli.examples import sample_rows
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.record.rollouts import ACTIVATIONS, AFTER, BEFORE
from trl_sae_audit.report import write_report
from trl_sae_audit.report.rollouts import pair_rollouts
from trl_sae_audit.verification.comparison import save_verifications, verify
from trl_sae_audit.verification.measured import AnswerActivations, MeasuredChange, sample_answers
from trl_sae_audit.verification.samples import Samples, choose_features

pytestmark = pytest.mark.newest
SAMPLING = Sampling(answers=3, max_new_tokens=8)


@pytest.fixture(scope="module")
def compared(model, tokenizer):
    after = nudged(model, tokenizer, "w17")
    return after, diff_models(model, after, tokenizer, make_sae_dictionary(), prompts(24), sampling=SAMPLING)


def encode(model, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Activations at the answer's tokens, through the whole model and a row at a time: [tokens, d_sae]."""
    with torch.no_grad():
        states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[2]
        return make_sae_dictionary().encode(states[0, len(prompt) :]).double().numpy()


def test_prompts_answers_and_marks_by_brute_force(model, tokenizer, compared):
    after, found = compared
    writes = found.writes
    risen = writes[(writes["q_value"] < 0.05) & (writes["change"] > 0)]
    features = sorted(risen["feature"], key=lambda f: -risen.set_index("feature")["effect_size"][f])[:6]
    assert list(found.samples.features) == features
    answers = {
        when: sample_answers(each, tokenizer, prompts(24), sampling=SAMPLING)
        for when, each in ((BEFORE, model), (AFTER, after))
    }
    read = {
        when: [encode(model, prompt, answer)[:, features] for _, prompt, answer in rows]
        for when, rows in answers.items()
    }
    texts = list(dict.fromkeys(text for text, _, _ in answers[BEFORE]))
    places = {text: [n for n, row in enumerate(answers[BEFORE]) if row[0] == text] for text in texts}
    mean = {
        when: np.array([np.concatenate([read[when][n] for n in places[text]]).mean(0) for text in texts])
        for when in read
    }
    largest = np.maximum(mean[BEFORE].max(0), mean[AFTER].max(0))
    change = ((mean[AFTER] - mean[BEFORE]) / largest).sum(1)
    chosen = [texts[n] for n in sorted(range(len(texts)), key=lambda n: -abs(change[n]))[:16]]
    assert [each.prompt for each in found.samples.rollouts] == [text for text in chosen for _ in range(2)]
    assert [each.when for each in found.samples.rollouts] == [BEFORE, AFTER] * 16
    for text, *pair in zip(chosen, found.samples.rollouts[::2], found.samples.rollouts[1::2], strict=True):
        differs = [((read[AFTER][n].mean(0) - read[BEFORE][n].mean(0)) / largest).sum() for n in places[text]]
        number = places[text][int(np.argmax(np.abs(differs)))]
        for each in pair:
            assert "".join(each.pieces) == tokenizer.decode(answers[each.when][number][2])
            counts, which, values = each.active["tiny"]
            got = np.zeros((len(each.pieces), 96))
            got[np.repeat(np.arange(len(counts)), counts), which] = values
            np.testing.assert_allclose(got[:, features], read[each.when][number], atol=2e-5)
            assert set(which.tolist()) <= set(features)


def test_rows_are_by_their_change_and_words_are_marked(compared):
    _, found = compared
    rows = sample_rows(found.samples)
    changes = [abs(row["change"]) for row in rows]
    assert changes == sorted(changes, reverse=True)
    assert "w17" in rows[0]["after"].partition("«")[2].partition("»")[0]
    assert rows[0]["change"] > 0
    reader = pair_rollouts("tiny", list(found.samples.features), found.samples.rollouts)
    top = max(max(v[2], default=0) for each in found.samples.rollouts for v in each.active.values())
    assert top > 0
    assert reader is not None
    assert max(piece.level for pair in reader.pairs for piece in pair.after.pieces) == 1.0


def test_flagged_ones_come_first_and_fallen_ones_if_none_rose():
    table = pd.DataFrame({"feature": range(9), "effect_size": [1, 2, -9, 3, 4, 5, 6, 7, 8], "q_value": 0.01})
    table.loc[8, "q_value"] = 0.5
    assert choose_features(table, 0.05, [2, 7]) == [2, 7, 6, 5, 4, 3]
    assert choose_features(table.iloc[[2, 8]], 0.05) == [2]
    assert choose_features(table.iloc[[8]], 0.05) == []


def test_what_a_run_watched_is_flagged(tmp_path: Path, model, tokenizer, compared):
    record = make_record(tmp_path / "run", make_report_dictionary())
    manifest = json.loads((record / "manifest.json").read_text())
    watched = list(manifest["config"]["watch"]["tiny"].values())
    assert watched
    assert watched_of(str(record), manifest["dictionaries"][0]["identity"]) == watched
    assert watched_of(str(record), "another") == watched_of(str(tmp_path), "another") == []
    sampling = Sampling(answers=1, max_new_tokens=4)
    found = diff_models(model, compared[0], tokenizer, make_sae_dictionary(), prompts(4), sampling=sampling, flagged=[5])  # fmt: skip
    assert found.samples.features[0] == 5


def test_files_and_page(tmp_path: Path, compared):
    record = make_record(tmp_path / "run", make_report_dictionary())
    kept = compared[1].samples
    sums = np.random.default_rng(0).standard_normal((2, 9, 20)).astype(np.float32)
    names = tuple(map(str, range(9)))
    change = MeasuredChange("in generations", *(AnswerActivations(each, np.full(9, 4), names, np.full(20, True)) for each in sums))  # fmt: skip
    verification = verify({"score": np.arange(20)}, change, draws=5)
    identity = json.loads((record / "manifest.json").read_text())["dictionaries"][0]["identity"]
    samples = Samples(kept.dictionary, identity, kept.features, kept.rollouts)
    directory = save_verifications([verification], tmp_path / "verify", {}, samples)
    page = Page(write_report(record, tmp_path / "page.html", verified=directory))
    text = " ".join(page.text.split())
    assert "sampled from the model before training and from the one after it" in text
    assert sum(tag == "article" for tag, _ in page.tags) == 16
    assert ("a", {"class": "open", "href": f"#feature-0-{kept.features[0]}"}) in page.tags
    other = Samples(kept.dictionary, "another", kept.features, kept.rollouts)
    directory = save_verifications([verification], tmp_path / "other", {}, other)
    page = Page(write_report(record, tmp_path / "page.html", verified=directory))
    assert f"feature {kept.features[0]}" in " ".join(page.text.split())
    (directory / f"{ACTIVATIONS}.parquet").write_bytes(b"PAR1")
    with pytest.raises(AuditError, match=ACTIVATIONS):
        write_report(record, tmp_path / "page.html", verified=directory)
