"""A prompt is read once for all of its answers, and everything comes out as if every row were read whole."""

from __future__ import annotations

import pytest
import torch
from helpers.lookaheads import D_MODEL, RULES, answers_of, look, make_gpt2, topk
from transformers import MistralConfig, MistralForCausalLM

from trl_sae_audit.audit.lookahead import generations, sampled_tokens
from trl_sae_audit.audit.lookahead.generations import predict_in_generations
from trl_sae_audit.audit.lookahead.sampled_tokens import SharedPrompts
from trl_sae_audit.models.hook_points import layer_output

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

PROMPTS = [[*range(3, 23)], [7, 30, *range(9, 21)], [3, 11, 22]]


def make_mistral(tokenizer):
    """Whose window is shorter than the prompts."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=3,
        pad_token_id=0,
    )
    return MistralForCausalLM(config).double().eval()


def predict(model, tokenizer, dictionary, batches):
    return predict_in_generations(
        look(model, tokenizer, dictionary, RULES["adamw"], borders=(2,)), iter(batches)
    )


@pytest.mark.parametrize("method", ["auto", "finite_difference"])
def test_predictions_are_those_of_whole_rows(tokenizer, monkeypatch, method):
    model, dictionary = make_gpt2(tokenizer), topk()
    batches = answers_of(model, tokenizer, PROMPTS, 5, 6)
    read = []
    model.transformer.h[0].register_forward_hook(
        lambda module, args, output: read.append(layer_output(output)[..., 0].numel())
    )

    def predictions():
        read.clear()
        ahead = look(model, tokenizer, dictionary, RULES["adamw"], method=method, borders=(2,))
        ahead.update()
        read.clear()
        return predict_in_generations(ahead, iter(batches)), sum(read)

    found, tokens = predictions()
    monkeypatch.setattr(generations, "share_prompts", lambda ahead, answers: None)
    expected, tokens_of_whole_rows = predictions()
    assert tokens < 0.8 * tokens_of_whole_rows
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-7, atol=1e-12, equal_nan=True)


def test_they_are_with_a_window_shorter_than_the_prompts(tokenizer, monkeypatch):
    monkeypatch.setattr("helpers.lookaheads.HOOK", "model.layers.1")
    model, dictionary = make_mistral(tokenizer), topk()
    batches = answers_of(model, tokenizer, PROMPTS, 4, 6)
    shared = [SharedPrompts.of(batch) for _, batch in batches]
    assert all(shared)
    found = predict(model, tokenizer, dictionary, batches)
    monkeypatch.setattr(generations, "share_prompts", lambda ahead, answers: None)
    for name, values in predict(model, tokenizer, dictionary, batches).items():
        torch.testing.assert_close(found[name], values, rtol=1e-7, atol=1e-12, equal_nan=True)


def test_a_model_that_reads_otherwise_is_given_whole_rows(tokenizer, monkeypatch, caplog):
    model, dictionary = make_gpt2(tokenizer), topk()
    batches = answers_of(model, tokenizer, PROMPTS, 4, 5)
    expected = predict(model, tokenizer, dictionary, batches)
    plain = SharedPrompts.last_hidden_state
    monkeypatch.setattr(
        sampled_tokens.SharedPrompts, "last_hidden_state", lambda self, prompts: plain(self, prompts) + 1
    )
    with caplog.at_level("INFO", logger="trl_sae_audit"):
        found = predict(model, tokenizer, dictionary, batches)
    assert "reads an answer differently" in caplog.text
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-7, atol=1e-12, equal_nan=True)


def test_prompts_that_cannot_be_shared_are_not():
    def batch(rows):
        ids = torch.tensor(rows)
        answer = torch.zeros_like(ids)
        answer[:, -1] = 1
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": answer}

    assert SharedPrompts.of(batch([[1, 2, 3], [1, 2, 4]])).begun == [(1,)]
    assert SharedPrompts.of(batch([[1, 2, 3], [4, 2, 3]])) is None
    assert SharedPrompts.of(batch([[1, 3], [1, 4]])) is None  # nothing comes before the last token
