"""Contexts of an audit against every activation of every answer, read one by one."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.worlds import make_sae_dictionary, pairs

from trl_sae_audit import Audit, AuditError, audit_preferences
from trl_sae_audit.audit.lookahead.config import LookaheadConfig
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states
from trl_sae_audit.models.sampling import Sampling

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

DATA = pairs(14)


@pytest.fixture(scope="module")
def audit(model, tokenizer, tmp_path_factory):
    where = tmp_path_factory.mktemp("contexts") / "audit"
    config = LookaheadConfig(prompts=3, sampling=Sampling(2, 6))
    dictionary = make_sae_dictionary()
    audit_preferences(
        model, tokenizer, DATA, dictionary, part_size=5, batch_size=3, output_dir=where, progress=False, lookahead=config
    )  # fmt: skip
    return Audit.load(where)


def every_activation(model, tokenizer) -> pd.DataFrame:
    """One row an answer, token and feature that is active there."""
    dictionary, loss = make_sae_dictionary(), PreferenceLoss(tokenizer)
    point = resolve_hook_point(model, dictionary.hook_point)
    tables = []
    for number, row in enumerate(DATA):
        batch = loss.collate(loss.tokenize([(number, row)]))
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            hidden = hidden_states(point, inputs)
        for place, side in enumerate(("chosen", "rejected")):
            own = batch["completion_mask"][place].bool()
            activations = dictionary.encode(hidden[place][own]).numpy()
            token, feature = activations.nonzero()
            words = [tokenizer.decode([each]) for each in batch["input_ids"][place][own].tolist()]
            tables.append(
                pd.DataFrame(
                    {
                        "feature": feature, "source": side, "row": number, "token": token,
                        "activation": activations[token, feature], "at": [words[each] for each in token],
                    }
                )
            )  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def test_the_strongest_places_of_the_data_are_those_of_every_activation(audit, model, tokenizer):
    every = every_activation(model, tokenizer)
    best = every.sort_values("activation", ascending=False).drop_duplicates(["feature", "source", "row"])
    features = sorted(every["feature"].unique())
    assert len(features) > 20
    found = audit.contexts(features)
    checked = 0
    for feature in features:
        expected = best[best["feature"] == feature].head(8)
        own = found[(found["feature"] == feature) & (found["source"] != "generation")]
        strongest = own[own["kind"] == "strongest"]
        np.testing.assert_allclose(strongest["activation"], expected["activation"], rtol=1e-3, atol=1e-5)
        keys = ["source", "row", "token"]
        if expected["activation"].diff().abs().min() > 1e-4:
            assert strongest[keys].to_numpy().tolist() == expected[keys].to_numpy().tolist()
            assert [text.strip() for text in strongest["at"]] == expected["at"].tolist()
            checked += 1
        of_feature = best[best["feature"] == feature]
        sample = own[own["kind"] == "drawn"]
        assert len(sample) == min(4, len(of_feature))
        assert set(map(tuple, sample[keys].to_numpy())) <= set(map(tuple, of_feature[keys].to_numpy()))
    assert checked > 10


def test_texts_are_those_of_the_data(audit):
    found = audit.contexts(range(96))
    for row in found[found["source"] != "generation"].to_dict("records"):
        answer = " ".join((row["before"] + row["at"] + row["after"]).replace("<eos>", "").split())
        assert answer in " ".join(DATA[row["row"]][row["source"]].split())
        assert " ".join(row["prompt"].split()) in " ".join(DATA[row["row"]]["prompt"].split())


def test_generations_are_among_them(audit):
    found = audit.contexts(range(96))
    sampled = found[found["source"] == "generation"]
    assert len(sampled)
    assert (sampled["row"] == -1).all()
    assert (sampled.groupby("feature").size() <= 8).all()
    prompts = " | ".join(row["prompt"] for row in DATA)
    assert all(" ".join(prompt.split()) in prompts for prompt in sampled["prompt"])


def test_density_and_histogram(audit, model, tokenizer):
    every = every_activation(model, tokenizer)
    tokens = (
        every.groupby(["source", "row"])["token"].max().add(1).sum()
    )  # some feature is active on the last one
    feature = int(every["feature"].mode()[0])
    table = audit.activity([feature])
    own = every[every["feature"] == feature]
    assert table["density"].iloc[0] == pytest.approx(len(own) / tokens, rel=1e-6)
    highest = own.groupby(["source", "row"])["activation"].max()
    for side in ("chosen", "rejected"):
        assert table[side].sum() == len(highest[side])
    counts, _ = np.histogram(highest["chosen"], bins=16, range=(0, highest.max()))
    np.testing.assert_array_equal(table["chosen"], counts)


def test_words_stand_beside_every_feature(audit, tmp_path):
    table = audit.features()
    found = audit.contexts(table["feature"].tolist())
    for row in table.to_dict("records"):
        assert bool(row["words"]) == bool((found["feature"] == row["feature"]).any())
    saved = Audit.load(audit.save(tmp_path / "copy"))
    assert saved.features()["words"].tolist() == table["words"].tolist()
    pd.testing.assert_frame_equal(saved.contexts([1, 2]), audit.contexts([1, 2]))


def test_without_activations_there_are_no_words(model, tokenizer):
    audit = audit_preferences(
        model, tokenizer, DATA, make_sae_dictionary(), activations=False, lookahead=None, progress=False
    )
    assert (audit.features()["words"] == "").all()
    assert audit.contexts([1]).empty
    with pytest.raises(AuditError, match="no activations"):
        audit.activity([1])
    with pytest.raises(AuditError, match="not in dictionary"):
        audit.contexts([1000])


def test_a_damaged_table_is_refused(audit, tmp_path):
    where = audit.save(tmp_path / "copy")
    content = (where / "contexts.parquet").read_bytes()
    (where / "contexts.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(AuditError, match=r"contexts\.parquet"):
        Audit.load(where).contexts([1])
