"""Evidence for a feature: the audit's contexts, vocabulary comes through the model's own head."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from helpers.worlds import pairs

from trl_sae_audit import AuditError, FeatureDictionary, audit_preferences
from trl_sae_audit.audit.evidence import gather_evidence, neuronpedia_link, read_labels
from trl_sae_audit.audit.evidence_files import Evidence
from trl_sae_audit.audit.vocabulary import vocabulary_of

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


DATA = pairs(12)


def test_evidence_is_the_audits_contexts(model, tokenizer, dictionary):
    audit = audit_preferences(model, tokenizer, DATA, dictionary, lookahead=None, progress=False)
    evidence, _ = gather_evidence(audit, (3, 40), model, tokenizer, dictionary, labels={3: "flattery"})
    assert evidence.label == "flattery"
    contexts = audit.contexts([3])
    assert [context.at for context in evidence.contexts] == contexts["at"].tolist()
    assert [context.kind for context in evidence.contexts] == ["strongest"] * 8 + ["drawn"] * 4
    assert evidence.words == audit.features().set_index("feature")["words"][3]
    text = evidence.to_markdown()
    assert "## Feature 3: flattery" in text
    assert f"- {contexts['source'][0]}, row {contexts['row'][0]}" in text
    assert f"**{contexts['at'][0]}**" in text
    json.dumps(evidence.to_dict())


def test_the_vocabulary_is_what_the_unembedding_says(model, tokenizer):
    word = tokenizer.convert_tokens_to_ids("w17")
    with torch.no_grad():
        gain = model.model.norm.weight
        direction = model.lm_head.weight[word] * gain
        direction = direction / direction.norm()
    up, down = vocabulary_of(model, tokenizer, model.model, direction[None], 3)
    assert up[0][0] == "w17"
    opposite, _ = vocabulary_of(model, tokenizer, model.model, -direction[None], 3)
    assert opposite == down


def test_links_and_labels(tmp_path):
    assert neuronpedia_link("gemma-3-270m/12-res", 7) == "https://www.neuronpedia.org/gemma-3-270m/12-res/7"
    assert neuronpedia_link(None, 7) is None
    files = {
        "a.json": '{"3": "x, y", "4": "z"}',
        "b.csv": 'feature,label\n3,"x, y"\n4,z\n',
        "c.jsonl": '{"index": 3, "description": "x, y"}\n{"index": "4", "description": "z"}\n',
        "d.json": '[{"feature": 3, "label": "x, y"}, {"feature": 4, "label": "z"}]',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_labels(tmp_path / name) == {3: "x, y", 4: "z"}
    for name, text in {"e.json": "[", "f.csv": "a,b\n1,2\n", "g.json": "3", "h.json": '{"a": "b"}'}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(AuditError, match="cannot be read"):
            read_labels(tmp_path / name)
    with pytest.raises(AuditError, match="cannot be read"):
        read_labels(tmp_path / "none.json")


def test_another_dictionary_is_refused(model, tokenizer, dictionary):
    audit = audit_preferences(model, tokenizer, DATA, dictionary, lookahead=None, progress=False)
    other = FeatureDictionary(torch.randn(96, 32), dictionary.hook_point, "other")
    with pytest.raises(AuditError, match="pass the same one"):
        gather_evidence(audit, [1], model, tokenizer, other)


def test_the_text_leads_with_generations_and_says_what_is_beyond_chance():
    statistics = {
        "effect_size": 0.03, "effect_size_low": 0.02, "effect_size_high": 0.04, "selection": 0.5, "selection_standard_error": 0.1,
        "selection_q_value": 0.001, "disparity": 0.25, "standard_error": 0.2, "beyond_chance": 1.0,
    }  # fmt: skip
    evidence = Evidence("tiny", 3, "", 1.0, 0.5, [], [], [], statistics=statistics)
    text = evidence.to_markdown()
    assert "Effect size in generations +0.03 ± 0.01, selection +0.5 ± 0.2 (q 0.001), disparity +0.25." in text
    assert text.index("Effect size") < text.index(
        "Attribution +1 ± 0.4, q 0.5: what the loss asks of the layer."
    )
    assert "chance" not in text
    weak = replace(evidence, statistics={**statistics, "beyond_chance": 0.0})
    assert "Not beyond chance: too few pairs to tell; audit more" in weak.to_markdown()
