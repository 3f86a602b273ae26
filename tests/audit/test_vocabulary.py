"""The vocabulary of an audit's features against the unembedding, computed by hand in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.audits import audited
from helpers.worlds import make_sae_dictionary, pairs

from trl_sae_audit import Audit
from trl_sae_audit.audit import vocabulary
from trl_sae_audit.audit.vocabulary import VOCABULARY, leading

pytestmark = pytest.mark.newest


def test_every_feature_in_front_has_the_tokens_of_its_direction(model, tokenizer, tmp_path):
    dictionary = make_sae_dictionary()
    audit = audited(model, tokenizer, pairs(12), dictionary, output_dir=tmp_path / "audit")
    audit = Audit.load(audit.directory)
    features = [int(feature) for feature in audit.features()["feature"]]
    found = audit.vocabulary(features)
    assert set(found["feature"]) == set(features)  # fewer than 150
    norm, head = model.model.norm.weight.detach().double(), model.lm_head.weight.detach().double()
    for feature in features[:20]:
        direction = dictionary.rows([feature])[0].double()
        hidden = direction / direction.square().mean().sqrt() * norm
        logits = (head @ hidden).numpy()
        order = np.argsort(-logits)
        for kind, best in (("promoted", order[:10]), ("suppressed", order[::-1][:10])):
            own = found[(found["feature"] == feature) & (found["kind"] == kind)]
            assert own["token"].tolist() == [tokenizer.decode([int(token)]) for token in best]


def test_those_in_front_of_each_score_are_kept_once(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(vocabulary, "FRONT", 5)
    dictionary = make_sae_dictionary()
    audit = audited(model, tokenizer, pairs(12), dictionary, output_dir=tmp_path / "audit")
    table = audit.features()
    expected = {
        int(each)
        for name in ("selection", "attribution")
        for each in table.reindex(table[name].abs().nlargest(5).index)["feature"]
    }
    assert set(leading(table, 5)) == expected
    assert set(audit.vocabulary(range(dictionary.d_sae))["feature"]) == expected
    written = (audit.directory / VOCABULARY).stat().st_mtime_ns
    again = audited(model, tokenizer, pairs(12), dictionary, output_dir=tmp_path / "audit")
    assert (again.directory / VOCABULARY).stat().st_mtime_ns == written


def test_many_directions_are_taken_in_parts(model, tokenizer, monkeypatch):
    directions = torch.nn.functional.normalize(
        torch.randn(7, 32, generator=torch.Generator().manual_seed(0)), dim=1
    )
    whole = vocabulary.vocabulary_of(model, tokenizer, model.model, directions, 4)
    monkeypatch.setattr(vocabulary, "_AT_ONCE", 3)
    assert vocabulary.vocabulary_of(model, tokenizer, model.model, directions, 4) == whole
