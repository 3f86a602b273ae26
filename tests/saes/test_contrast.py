"""Directions from pairs of answers: against a difference of means written out, and refused where there is nothing to find."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.worlds import WORDS, make_model, save_model
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit import (
    AuditError,
    ContrastPair,
    contrast_directions,
    load_dictionary,
    save_directions,
)
from trl_sae_audit.cli.main import main
from trl_sae_audit.saes.contrast import area_under_curve
from trl_sae_audit.saes.contrast_sets import CONTRAST_SETS

PAIRS, HOOK = 30, "model.layers.1"


def draw(rng: random.Random, kinds: list[str] = WORDS[:40]) -> str:
    return " ".join(rng.choice(kinds) for _ in range(5))


def planted(n: int = PAIRS) -> list[ContrastPair]:
    """Answers with the trait have other words than those without."""
    rng = random.Random(0)
    return [ContrastPair(draw(rng), draw(rng, WORDS[40:44]), draw(rng, WORDS[50:54])) for _ in range(n)]


def aimless(n: int = PAIRS) -> list[ContrastPair]:
    rng = random.Random(1)
    return [ContrastPair(draw(rng), draw(rng), draw(rng)) for _ in range(n)]


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_model(tokenizer)


def mean_state(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str
) -> torch.Tensor:
    before, after = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        states = model.eval()(torch.tensor([before + after]), output_hidden_states=True).hidden_states
    return states[2][0, len(before) :].mean(0)


def test_the_direction_is_the_difference_of_means_of_the_training_pairs(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    pairs = planted()
    found = contrast_directions(model, tokenizer, {"kind": pairs}, [HOOK])
    order = np.random.default_rng(0).permutation(PAIRS)
    held_out, training = order[: PAIRS // 3], order[PAIRS // 3 :]
    states = [
        [mean_state(model, tokenizer, pair.prompt, answer) for answer in (pair.positive, pair.negative)]
        for pair in pairs
    ]
    difference = torch.stack([states[place][0] - states[place][1] for place in training]).mean(0)
    torch.testing.assert_close(
        found.directions[0], torch.nn.functional.normalize(difference, dim=0), atol=1e-5, rtol=1e-4
    )
    along = [[float(state @ found.directions[0]) for state in states[place]] for place in held_out]
    wins = [one[0] > other[1] for one in along for other in along]
    (separation,) = found.separations
    assert separation.auc == pytest.approx(np.mean(wins))
    assert separation.auc > 0.9
    assert separation.found
    assert separation.pairs == PAIRS // 3
    assert (found.hook_point, found.watch) == (HOOK, {"kind": 0})


def test_nothing_to_find_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(
        AuditError, match=r"No direction of 'mood' was found: on 10 held-out pairs its AUC is 0\.\d+ \[0"
    ):
        contrast_directions(model, tokenizer, {"kind": planted(), "mood": aimless()}, [HOOK])


def test_one_layer_for_all_traits_is_chosen_among_those_given(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    both = contrast_directions(
        model, tokenizer, {"one": planted(), "other": planted()[::-1]}, ["0", "1", "2"]
    )
    assert both.d_sae == 2
    assert both.hook_point in {f"model.layers.{layer}" for layer in range(3)}


def test_batches_do_not_change_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = (
        contrast_directions(model, tokenizer, {"kind": planted()}, [HOOK], batch_size=size) for size in (1, 7)
    )
    torch.testing.assert_close(one.directions, other.directions, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n", [0, 5, 11])
def test_too_few_pairs(n: int, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AuditError, match=rf"has {n} usable pairs, and a direction takes at least 12"):
        contrast_directions(model, tokenizer, {"kind": planted(n)}, [HOOK])


def test_a_pair_without_an_answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AuditError, match="has no negative; each has prompt, positive"):
        contrast_directions(model, tokenizer, {"kind": [{"prompt": "w1", "positive": "w2"}]}, [HOOK])


def test_area_under_the_curve_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    projections = rng.integers(0, 4, (9, 2)).astype(float)
    brute = np.mean(
        [1.0 if a > b else 0.5 if a == b else 0.0 for a in projections[:, 0] for b in projections[:, 1]]
    )
    assert area_under_curve(projections) == pytest.approx(brute)


def test_saved_and_loaded(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    found = contrast_directions(model, tokenizer, {"kind": planted()}, [HOOK])
    save_directions(found, tmp_path / "directions")
    loaded = load_dictionary(tmp_path / "directions")
    assert loaded.info == found.info
    assert loaded.separations == found.separations
    assert loaded.watch == {"kind": 0}
    assert torch.equal(loaded.directions, found.directions)
    file = tmp_path / "directions" / "directions.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(AuditError, match="truncated or changed"):
        load_dictionary(tmp_path / "directions")


def test_built_in_sets_are_pairs_of_one_question() -> None:
    assert list(CONTRAST_SETS) == [
        "sycophancy",
        "flattery",
        "hedging",
        "refusal",
        "verbosity",
        "markdown",
        "emoji",
    ]
    for pairs in CONTRAST_SETS.values():
        assert len(pairs) == len({pair.prompt for pair in pairs}) == 36
        assert all(
            pair.positive != pair.negative and "{" not in pair.positive + pair.negative for pair in pairs
        )


def test_the_command(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(model, tokenizer, tmp_path / "model")
    rows = [{"trait": "kind", **vars(pair)} for pair in planted()]
    rows += [{"trait": "mood", **vars(pair)} for pair in aimless()]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    arguments = ["direction", "--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "pairs.jsonl")]
    code = main([*arguments, "--output_dir", str(tmp_path / "out"), "--hook_points", "1", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert code == 1  # one of the two was not found
    assert {one["trait"]: one["found"] for one in printed["traits"]} == {"kind": True, "mood": False}
    assert load_dictionary(tmp_path / "out").watch == {"kind": 0}
