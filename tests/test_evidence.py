"""Evidence for a feature: tokens add up to the example, vocabulary comes through the model's own head."""

from __future__ import annotations

import json

import pytest
import torch
from worlds import make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import AuditError, FeatureDictionary, audit_preferences
from trl_sae_audit.evidence import gather_evidence, neuronpedia_link, read_labels, vocabulary_of
from trl_sae_audit.objectives import PreferenceLoss


@pytest.fixture(scope="module")
def world():
    tokenizer = make_tokenizer()
    return make_model(tokenizer), tokenizer, make_dictionary(), pairs(12)


def gathered(world, features=(3, 40), **options):
    model, tokenizer, dictionary, data = world
    audit = audit_preferences(model, tokenizer, data, dictionary, progress=False)
    loss = PreferenceLoss(tokenizer)
    return audit, gather_evidence(audit, features, model, tokenizer, data, dictionary, loss, **options)


def test_the_examples_are_the_extremes_and_their_tokens_explain_them(world):
    audit, found = gathered(world, examples=4, labels={3: "flattery"})
    contributions = audit.contributions([3])[:, 0]
    evidence = found[0]
    assert evidence.label == "flattery"
    rows = {example.row for example in evidence.examples}
    order = contributions.argsort()
    assert rows == {int(place) for place in (*order[:2], *order[-2:])}
    by_side = audit.examples([3])
    for example in evidence.examples:
        assert example.attribution == pytest.approx(contributions[example.row], rel=1e-5)
        assert example.prompt == world[3][example.row]["prompt"]
        for side, tokens in example.tokens.items():
            text = "".join(f"{token.text} " for token in tokens)
            assert world[3][example.row][side] in text
            mine = by_side[(by_side["row"] == example.row) & (by_side["side"] == side)]
            # the prompt's tokens before the last carry the rest of the gradient
            largest = max(abs(token.attribution) for token in tokens)
            assert largest > 0
            assert mine["max_activation"].iloc[0] in [
                pytest.approx(token.activation, rel=1e-3) for token in tokens
            ]
    text = evidence.to_markdown()
    assert "## Feature 3: flattery" in text
    assert f"Row {evidence.examples[0].row}" in text
    json.dumps(evidence.to_dict())


def test_the_vocabulary_is_what_the_unembedding_says(world):
    model, tokenizer, _, _ = world
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


def test_another_dictionary_or_dataset_is_refused(world):
    model, tokenizer, dictionary, data = world
    audit = audit_preferences(model, tokenizer, data, dictionary, progress=False)
    loss = PreferenceLoss(tokenizer)
    other = FeatureDictionary(torch.randn(96, 32), dictionary.hook_point, "other")
    with pytest.raises(AuditError, match="pass the same one"):
        gather_evidence(audit, [1], model, tokenizer, data, other, loss)
    with pytest.raises(AuditError, match="no row"):
        gather_evidence(audit, [1], model, tokenizer, data.select([0]), dictionary, loss)
