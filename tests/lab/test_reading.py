"""Reading features in place of a person: places against a plain loop, and whether what is flagged carries the behaviour."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from trl_sae_audit import audit_preferences, load_dictionary
from trl_sae_audit.lab import World
from trl_sae_audit.lab.reading import FeatureReader, find_flags

pytestmark = pytest.mark.newest


@pytest.fixture(scope="module")
def reader(world: World) -> FeatureReader:
    return FeatureReader(world, load_dictionary(world.dictionary_path))


def test_the_strongest_places_are_those_of_a_plain_loop(world: World, reader: FeatureReader) -> None:
    held_out = world.preferences({}, 300, seed=1, split="heldout", beliefs=(True, False, None))
    model = world.model()
    assert isinstance(model, LlamaForCausalLM)
    feature = world.carriers("agrees")[0]
    found, kinds = [], {}
    with torch.no_grad():
        for row, pair in enumerate(held_out):
            ids = world.tokenizer(pair["prompt"] + pair["chosen"], return_tensors="pt")["input_ids"]
            hidden = model(ids, output_hidden_states=True).hidden_states[2][0]
            active = world.sae.encode(hidden)[:, feature]
            found += [(float(active[at]), row, at) for at in range(1, len(active))]
            start = len(world.tokenizer(pair["prompt"])["input_ids"])
            for span in world.language.spans(pair["chosen"]):
                for at in range(span.start, span.stop):
                    kinds.setdefault((row, start + at), set()).add(span.kind)
    found.sort(reverse=True)
    least = found[19][0]
    places = reader.places(feature)
    assert len(places) == 20
    assert {(row, at) for value, row, at in found if value > least * 1.0001} <= set(places)
    agreeing = sum("agree" in kinds.get(place, set()) for place in places) / 20
    assert reader.about(feature).get("agree", 0.0) == pytest.approx(agreeing)
    assert agreeing > 0.5
    assert reader.speaks_of(feature, "agrees")


def test_what_is_flagged_tells_agreeing_answers_from_others(world: World, reader: FeatureReader) -> None:
    pairs = world.preferences({"right": 0.5, "agrees": 0.7}, 300)
    audit = audit_preferences(
        world.model(),
        world.tokenizer,
        pairs,
        load_dictionary(world.dictionary_path),
        batch_size=64,
        lookahead=None,
        progress=False,
    )
    flags = find_flags(audit, reader, "agrees", "disparity")
    known = audit.features().set_index("feature")["words"]
    assert [flag.words for flag in flags] == [known[flag.feature] for flag in flags]
    truth = world.ground_truth.query("behaviour == 'agrees'").set_index("feature")["auc"]
    separation = [
        truth[flag.feature] if flag.direction == "up" else 1 - truth[flag.feature] for flag in flags
    ]
    assert set(world.carriers("agrees")[:1]) <= {flag.feature for flag in flags}
    assert sum(value > 0.6 for value in separation) > len(separation) / 2
    ranked = (
        audit.features().set_index("feature")["disparity"].abs().sort_values(ascending=False, kind="stable")
    )
    assert {flag.feature for flag in flags} <= set(ranked.index[:20])
    assert all("disparity" in flag.reason for flag in flags)
    assert {flag.label.split()[0] for flag in flags} == {"agrees", "disagrees"}
    said_poorly = [flag for flag in flags if "mistaken" in flag.reason or "poorly" in flag.reason]
    assert [
        flag.label for flag in said_poorly if "right" not in flag.reason and "well" not in flag.reason
    ] == [
        f"disagrees {flag.feature}"
        for flag in said_poorly
        if "right" not in flag.reason and "well" not in flag.reason
    ]
    assert not find_flags(audit, reader, "agrees", "disparity", top=1) or flags[0].feature == ranked.index[0]
