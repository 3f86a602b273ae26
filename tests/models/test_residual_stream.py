"""The residual stream is what the model reports, without padding."""

from __future__ import annotations

import pytest
import torch
from helpers.sae_training import HOOK
from helpers.worlds import make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import TokenRules, hidden_states, residual_stream


class TestResidualStream:
    def rows(self, model: LlamaForCausalLM, texts: list[str], rules: TokenRules, batch: int = 4) -> Tensor:
        hook = resolve_hook_point(model, HOOK)
        return torch.cat(list(residual_stream(model, make_tokenizer(bos=True), texts, hook, rules, batch)))

    def test_is_what_the_model_reports_and_stops_there(self, model: LlamaForCausalLM) -> None:
        ids = torch.tensor([[1, 4, 5, 6]])
        above: list[object] = []
        hooks = len(model.model.layers[1]._forward_hooks)
        handle = model.model.layers[2].register_forward_hook(lambda *args: above.append(args))
        hidden = hidden_states(
            resolve_hook_point(model, HOOK), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        )
        assert above == []
        assert len(model.model.layers[1]._forward_hooks) == hooks
        handle.remove()
        with torch.no_grad():
            expected = model.eval()(ids, output_hidden_states=True).hidden_states[2]
        torch.testing.assert_close(hidden, expected)

    def test_layers_that_return_tuples(self) -> None:
        config = AutoConfig.for_model(
            "falcon", hidden_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=70
        )
        falcon = AutoModelForCausalLM.from_config(config)
        assert self.rows(falcon, ["w1 w2 w3"], TokenRules()).shape == (3, 16)

    def test_padding_and_special_tokens_stay_out(self, model: LlamaForCausalLM) -> None:
        texts = ["w1 w2 w3 w4 w5", "w6", "w7 <eos> w8"]
        together = self.rows(model, texts, TokenRules(skip_special_tokens=True, skip_first_position=False))
        alone = [self.rows(model, [text], TokenRules(skip_first_position=False)) for text in texts]
        assert [len(rows) for rows in alone] == [5, 1, 2]
        expected = torch.cat(sorted(alone, key=len))
        torch.testing.assert_close(together, expected)

    @pytest.mark.parametrize(
        ("special", "first", "count"),
        [(False, False, 4), (False, True, 3), (True, False, 2), (True, True, 2)],
    )
    def test_rules(self, model: LlamaForCausalLM, special: bool, first: bool, count: int) -> None:
        rules = TokenRules(skip_special_tokens=special, skip_first_position=first)
        assert len(self.rows(model, ["w1 w2 <eos>"], rules)) == count

    def test_first_position_without_bos(self, model: LlamaForCausalLM) -> None:
        hook = resolve_hook_point(model, HOOK)
        stream = residual_stream(model, make_tokenizer(), ["w1 w2 w3"], hook, TokenRules())
        assert sum(map(len, stream)) == 2

    def test_model_is_left_in_its_mode(self, model: LlamaForCausalLM) -> None:
        model.train()
        self.rows(model, ["w1 w2"], TokenRules())
        assert model.training
