"""The scorer against activations computed by hand from the whole forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.worlds import D_SAE, N_LAYERS, make_dictionary, make_model, make_reward_model, make_tokenizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from trl_sae_audit import AuditError, FeatureDictionary, FeatureScorer

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

PROMPTS = ["w1 w2 w3 ", "w4 ", "w5 w6 ", ""]
RESPONSES = ["w7 w8", "w9 w10 w11 w12", "w13", "w14 w15 w16"]
FEATURES = [3, 50, 7]


def by_hand(
    model: nn.Module, prompt: str, response: str, pooling: str, dictionary: FeatureDictionary
) -> Tensor:
    tokenizer = make_tokenizer()
    before, after = tokenizer(prompt)["input_ids"], tokenizer(response)["input_ids"]
    with torch.no_grad():
        hidden = model.eval()(torch.tensor([before + after]), output_hidden_states=True).hidden_states[
            2
        ]  # the output of layer 1
    activations = (hidden[0] @ dictionary.directions.T)[max(1, len(before)) :]
    pool: dict[str, Any] = {
        "mean": lambda a: a.mean(0),
        "max": lambda a: a.max(0).values,
        "last": lambda a: a[-1],
    }
    return pool[pooling](activations)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_scores_equal_the_whole_forward_pass(pooling: str, batch_size: int) -> None:
    model, dictionary = make_model(make_tokenizer()), make_dictionary()
    scorer = FeatureScorer(model, make_tokenizer(), dictionary, pooling=pooling, batch_size=batch_size)
    scores = scorer.score(PROMPTS, RESPONSES, FEATURES)
    expected = torch.stack(
        [
            by_hand(model, prompt, response, pooling, dictionary)[FEATURES]
            for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
        ]
    )
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max", "last"])
def test_attention_sinks_are_left_out_unless_asked_for(pooling: str, tmp_path: Path) -> None:
    tokenizer, dictionary = make_tokenizer(), make_dictionary()
    model = make_model(tokenizer)
    sink = tokenizer.convert_tokens_to_ids("w30")
    with torch.no_grad():
        model.get_input_embeddings().weight[sink] *= 100
    prompt, response = "w1 w2 ", "w3 w30 w5 w6 w30"
    ids = tokenizer(prompt + response, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        hidden = model.eval()(ids, output_hidden_states=True).hidden_states[2][0, 2:]
    norms = hidden.norm(dim=-1)
    assert (norms > 10 * norms.sort().values[2]).tolist() == [False, True, False, False, True]
    pool: dict[str, Any] = {"mean": lambda a: a.mean(0), "max": lambda a: a.amax(0), "last": lambda a: a[-1]}
    without, with_them = (
        FeatureScorer(model, tokenizer, dictionary, pooling=pooling),
        FeatureScorer(model, tokenizer, dictionary, pooling=pooling, attention_sinks=True),
    )
    for scorer, rows in ((without, [0, 2, 3]), (with_them, [0, 1, 2, 3, 4])):
        expected = pool[pooling](hidden[rows] @ dictionary.directions.T)[FEATURES]
        torch.testing.assert_close(
            scorer.score([prompt], [response], FEATURES)[0], expected, rtol=1e-4, atol=1e-4
        )
    assert (without.sinks, with_them.sinks) == (2, 0)
    without.calibrate(RESPONSES).save(tmp_path / "calibration")
    with pytest.raises(AuditError, match="attention_sinks=False, and this scorer has attention_sinks=True"):
        with_them.load(tmp_path / "calibration")


def test_the_forward_pass_stops_at_the_hook_point() -> None:
    model = make_model(make_tokenizer())
    scorer = FeatureScorer(model, make_tokenizer(), make_dictionary())
    ran: list[int] = []
    for index, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    scorer.score(PROMPTS, RESPONSES, FEATURES)
    assert sorted(set(ran)) == [0, 1]
    assert N_LAYERS == 3


def test_special_tokens_and_padding_do_not_count() -> None:
    tokenizer = make_tokenizer()
    scorer = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary())
    response = tokenizer("w7 w8")["input_ids"]
    plain = scorer.score_ids([[5, 6]], [response], FEATURES)
    ended = scorer.score_ids([[5, 6]], [[*response, tokenizer.eos_token_id]], FEATURES)
    torch.testing.assert_close(plain, ended, rtol=0, atol=1e-6)


def test_calibrated_scores_are_z_scores() -> None:
    tokenizer = make_tokenizer()
    pairs = [(f"w{i} w{i + 1} ", f"w{i + 2} w{(7 * i) % 50} w{i + 3}") for i in range(20)]
    raw = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary()).score(
        *map(list, zip(*pairs, strict=True)), list(range(D_SAE))
    )
    scorer = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary()).calibrate(pairs)
    scores = scorer.score(*map(list, zip(*pairs, strict=True)), list(range(D_SAE)))
    torch.testing.assert_close(scores, (raw - raw.mean(0)) / raw.std(0), rtol=1e-4, atol=1e-4)


def test_an_empty_response_is_neutral() -> None:
    tokenizer = make_tokenizer()
    scorer = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary())
    assert scorer.score(["w1 "], [""], FEATURES).tolist() == [[0.0] * 3]
    scorer.calibrate(["w1 w2 w3", "w5 w6 w7", "w8 w9"])
    assert scorer.score(["w1 "], [""], FEATURES).tolist() == [[0.0] * 3]
    assert scorer.score(["w1 "], ["w2"], FEATURES).abs().min() > 0


def test_a_response_is_read_once_and_the_oldest_is_forgotten() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    scorer = FeatureScorer(model, tokenizer, make_dictionary(), batch_size=1, cache_size=2)
    forwards: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: forwards.append(1))
    first = scorer.score(["w1 "] * 2, ["w2 w3"] * 2, FEATURES)
    assert len(forwards) == 1
    scorer.score(["w1 "], ["w4"], FEATURES)
    again = scorer.score(["w1 "], ["w2 w3"], FEATURES)
    assert len(forwards) == 2
    assert torch.equal(first[:1], again)
    scorer.score(["w1 "], ["w5"], FEATURES)  # w4 goes, w2 w3 was used later
    scorer.score(["w1 "], ["w2 w3"], FEATURES)
    assert len(forwards) == 3
    scorer.score(["w1 "], ["w4"], FEATURES)
    assert len(forwards) == 4
    scorer.score(["w1 "], ["w4"], [1])  # other features are another content
    assert len(forwards) == 5


def test_modes_and_gradients_stay_as_they_were() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    scores = FeatureScorer(model, tokenizer, make_dictionary()).score(PROMPTS, RESPONSES, FEATURES)
    assert modes == [module.training for module in model.modules()]
    assert not scores.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_reward_model_and_bfloat16_can_be_read() -> None:
    tokenizer = make_tokenizer()
    exact = FeatureScorer(make_reward_model(tokenizer), tokenizer, make_dictionary())
    rough = FeatureScorer(make_reward_model(tokenizer).bfloat16(), tokenizer, make_dictionary())
    one, other = (scorer.score(PROMPTS, RESPONSES, FEATURES) for scorer in (exact, rough))
    assert other.dtype == torch.float32
    torch.testing.assert_close(one, other, rtol=0.1, atol=0.02)


def test_conversations_are_rendered_by_the_chat_template() -> None:
    tokenizer = make_tokenizer()
    scorer = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary())
    messages = scorer.score(
        [[{"role": "user", "content": "w1 w2"}]], [[{"role": "assistant", "content": "w3 w4"}]], FEATURES
    )
    assert torch.equal(messages, scorer.score(["w1 w2 "], ["w3 w4 "], FEATURES))
    tokenizer.chat_template = None
    with pytest.raises(AuditError, match="no chat template"):
        scorer.score([[{"role": "user", "content": "w1"}]], ["w2"], FEATURES)


def test_the_state_comes_back(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    scorer = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary()).calibrate(RESPONSES)
    scorer.save(tmp_path / "calibration.safetensors")
    again = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary())
    before = again.score(PROMPTS, RESPONSES, FEATURES)
    again.load(tmp_path / "calibration.safetensors")
    after = again.score(PROMPTS, RESPONSES, FEATURES)
    assert torch.equal(after, scorer.score(PROMPTS, RESPONSES, FEATURES))
    assert not torch.equal(before, after)
    other = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary(seed=9))
    with pytest.raises(AuditError, match="calibrate again"):
        other.load(tmp_path / "calibration.safetensors")
    pooled = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary(), pooling="mean")
    with pytest.raises(AuditError, match="pooling"):
        pooled.load(tmp_path / "calibration.safetensors")
    (tmp_path / "broken").write_bytes(b"no")
    with pytest.raises(AuditError, match="not a calibration"):
        again.load(tmp_path / "broken")


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    tokenizer.add_tokens(["another", "vocabulary"])
    with pytest.raises(AuditError, match="another model's"):
        FeatureScorer(model, tokenizer, make_dictionary())
    wide = FeatureDictionary(torch.randn(8, 48), "model.layers.1", "wide")
    with pytest.raises(AuditError, match="48 dimensions"):
        FeatureScorer(model, make_tokenizer(), wide)
    with pytest.raises(AuditError, match="choose one of max, mean, last"):
        FeatureScorer(model, make_tokenizer(), make_dictionary(), pooling="sum")
    scorer = FeatureScorer(model, make_tokenizer(), make_dictionary())
    with pytest.raises(AuditError, match="has 0 to 95"):
        scorer.score(["w1 "], ["w2"], [D_SAE])
    with pytest.raises(AuditError, match="one prompt a response"):
        scorer.score(["w1 "], ["w2", "w3"], [1])
    with pytest.raises(AuditError, match="at least two"):
        scorer.calibrate(["w1 w2", ""])
    scorer.calibrate(["w1 w2", "w1 w2"])
    with pytest.raises(AuditError, match="no z-score"):
        scorer.score(["w1 "], ["w2"], [1])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(torch.inf)
    with pytest.raises(AuditError, match="overflowed"):
        FeatureScorer(model, make_tokenizer(), make_dictionary()).score(["w1 "], ["w2 w3"], [1, 2])


def test_a_loaded_model_is_as_good_as_one_in_memory(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    scores = [
        FeatureScorer(each, tokenizer, make_dictionary()).score(PROMPTS, RESPONSES, FEATURES)
        for each in (model, loaded)
    ]
    assert torch.equal(*scores)
