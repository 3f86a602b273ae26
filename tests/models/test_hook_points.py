"""Hook points: TransformerLens' names on the layouts Hugging Face models really have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from trl_sae_audit.errors import AuditError
from trl_sae_audit.models.hook_names import LayerName, parse_hook_name
from trl_sae_audit.models.hook_points import layer_lists, residual_width, resolve_hook_point

LAYERS, WIDTH, VOCABULARY = 3, 16, 32
USUAL = {
    "hidden_size": WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEADS_OF_8 = {**USUAL, "head_dim": 8}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "llama": (USUAL, "model.layers.1"),
    "gemma": (HEADS_OF_8, "model.layers.1"),
    "gemma2": (HEADS_OF_8, "model.layers.1"),
    "gemma3_text": (HEADS_OF_8, "model.layers.1"),
    "qwen2": (USUAL, "model.layers.1"),
    "qwen3": (HEADS_OF_8, "model.layers.1"),
    "mistral": (USUAL, "model.layers.1"),
    "mixtral": ({**USUAL, "num_local_experts": 2}, "model.layers.1"),
    "phi": (USUAL, "model.layers.1"),
    "phi3": (USUAL, "model.layers.1"),
    "olmo2": (USUAL, "model.layers.1"),
    "gpt_neox": (USUAL, "gpt_neox.layers.1"),
    "gpt2": ({"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": VOCABULARY}, "transformer.h.1"),
    "gptj": (
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "rotary_dim": 4, "vocab_size": VOCABULARY},
        "transformer.h.1",
    ),
    "opt": (
        {**USUAL, "ffn_dim": 32, "word_embed_proj_dim": WIDTH},
        "model.decoder.layers.1",
    ),
    "bloom": (
        {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": 2, "vocab_size": VOCABULARY},
        "transformer.h.1",
    ),
    "falcon": (USUAL, "transformer.h.1"),
}
RETURN_TUPLES = {"gptj", "bloom", "falcon"}  # (hidden state, attention weights)


def build(family: str, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    torch.manual_seed(0)
    return auto.from_config(AutoConfig.for_model(family, **FAMILIES[family][0])).eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return build("llama")


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    def test_resid_post_is_the_output_of_the_layer(self, family: str) -> None:
        """The module found gives what the model itself reports as the hidden state after that layer."""
        model = build(family)
        point = resolve_hook_point(model, "blocks.1.hook_resid_post")
        assert point.path == FAMILIES[family][1]
        assert point.module is model.get_submodule(point.path)
        seen: list[Any] = []
        with (
            point.module.register_forward_hook(lambda module, args, output: seen.append(output)),
            torch.no_grad(),
        ):
            states = model(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states
        output = seen[0][0] if family in RETURN_TUPLES else seen[0]
        torch.testing.assert_close(output, states[2])
        assert residual_width(model) == WIDTH == output.shape[-1]

    def test_decoder_ends_in_the_state_the_logits_are_made_of(self, family: str) -> None:
        model = build(family)
        decoder = resolve_hook_point(model, "blocks.1.hook_resid_post").decoder
        ids = torch.tensor([[3, 4, 5]])
        with torch.no_grad():
            last = decoder(ids).last_hidden_state
            logits = model(ids).logits
            assert isinstance(model.get_output_embeddings(), nn.Module)
            torch.testing.assert_close(model.get_output_embeddings()(last), logits)

    def test_names_of_the_same_place(self, family: str) -> None:
        model, path = build(family), FAMILIES[family][1]
        for name in ("blocks.2.hook_resid_pre", path, f"{path}.output", f"{path}.hook_resid_post"):
            assert resolve_hook_point(model, name).path == path

    def test_reward_models_of_the_family(self, family: str) -> None:
        if family == "olmo2":
            pytest.skip("transformers has no sequence classifier of this family")
        model = build(family, AutoModelForSequenceClassification)
        assert resolve_hook_point(model, "blocks.1.hook_resid_post").path.endswith(".1")


class TestWrapped:
    def test_peft(self) -> None:
        plain = build("llama")
        layer = plain.model.layers[1]
        model = get_peft_model(plain, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        for name in ("blocks.1.hook_resid_post", "model.layers.1"):
            point = resolve_hook_point(model, name)
            assert point.path == "base_model.model.model.layers.1"
            assert point.module is layer
        assert residual_width(model) == WIDTH

    def test_inside_any_module(self, llama: PreTrainedModel) -> None:
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = llama

        point = resolve_hook_point(Wrapper(), "blocks.1.hook_resid_post")
        assert point.path == "module.model.layers.1"
        assert point.decoder is llama.model

    def test_vision_layers_do_not_count(self) -> None:
        model = make_multimodal()
        point = resolve_hook_point(model, "blocks.1.hook_resid_post")
        assert point.path == "model.language_model.layers.1"
        assert residual_width(model) == WIDTH


class TestAmbiguous:
    class PolicyAndValue(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy, self.value_model = build("llama"), build("llama")

    def test_two_models_in_one(self) -> None:
        both = self.PolicyAndValue()
        with pytest.raises(AuditError, match=r"several lists of layers \(policy.*value_model.*--hook_point"):
            resolve_hook_point(both, "blocks.1.hook_resid_post")
        with pytest.raises(AuditError, match=r"ambiguous.*policy.model.layers.1, value_model.model.layers.1"):
            resolve_hook_point(both, "model.layers.1")

    def test_a_longer_path_decides(self) -> None:
        both = self.PolicyAndValue()
        point = resolve_hook_point(both, "policy.model.layers.1")
        assert point.module is both.policy.model.layers[1]
        assert point.decoder is both.policy.model

    def test_a_suffix_ends_at_a_dot(self, llama: PreTrainedModel) -> None:
        assert resolve_hook_point(llama, "layers.1").path == "model.layers.1"
        with pytest.raises(AuditError, match=r"is not in LlamaForCausalLM"):
            resolve_hook_point(llama, "ayers.1")


class TestMissing:
    def test_beyond_the_last_layer(self, llama: PreTrainedModel) -> None:
        with pytest.raises(
            AuditError, match=r"is layer 3, but the model's model.layers has 3 layers \(0 to 2\)"
        ):
            resolve_hook_point(llama, "blocks.3.hook_resid_post")

    def test_path_names_what_exists(self, llama: PreTrainedModel) -> None:
        with pytest.raises(AuditError, match=r"whose layers are model.layers.0 … model.layers.2"):
            resolve_hook_point(llama, "transformer.h.1")

    def test_no_layers_at_all(self) -> None:
        with pytest.raises(AuditError, match="no list of decoder layers"):
            resolve_hook_point(nn.Linear(2, 2), "blocks.1.hook_resid_post")
        with pytest.raises(AuditError, match="contains no Hugging Face model"):
            residual_width(nn.Linear(2, 2))

    @pytest.mark.parametrize(
        "name",
        [
            "blocks.1.attn.hook_z",
            "blocks.1.hook_mlp_out",
            "blocks.1.hook_resid_mid",
            "blocks.0.hook_resid_pre",
        ],
    )
    def test_not_the_stream_between_layers(self, llama: PreTrainedModel, name: str) -> None:
        with pytest.raises(AuditError, match="is not the output of a layer"):
            resolve_hook_point(llama, name)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.12.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 11),
        ("blocks.12.hook_out", 12),
        ("blocks.12.hook_in", 11),
        ("resid_post_layer_12", 12),
        ("layer_12", 12),
        ("12", 12),
    ],
)
def test_names_that_count_layers(name: str, layer: int) -> None:
    assert parse_hook_name(name) == LayerName(layer, None)


def test_paths_lose_what_is_not_a_module() -> None:
    for suffix in ("", ".output", ".output.0", ".hook_out"):
        assert parse_hook_name(f"model.layers.12{suffix}") == LayerName(None, "model.layers.12")


def make_multimodal() -> PreTrainedModel:
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    text = FAMILIES["gemma3_text"][0]
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return AutoModelForImageTextToText.from_config(config)


class TestSeveralNames:
    def test_the_path_of_the_text_model_in_the_multimodal_class(self) -> None:
        """Gemma Scope 2 says `model.layers.N.output`; TRL loads Gemma 3 from 4B up as a multimodal class."""
        model = make_multimodal()
        for name in ("model.layers.1.output", "model.layers.1", "language_model.layers.1", "layers.1", "1"):
            assert resolve_hook_point(model, name).path == "model.language_model.layers.1"

    def test_the_first_that_is_found(self, llama: PreTrainedModel) -> None:
        names = ("transformer.h.1", "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post", "model.layers.1")
        assert resolve_hook_point(llama, names).path == "model.layers.1"

    def test_none_is_found(self, llama: PreTrainedModel) -> None:
        with pytest.raises(
            AuditError,
            match=r"'transformer.h.1', 'blocks.7.hook_resid_post' were tried.*model.layers.0 … model.layers.2.*--hook_point",
        ):
            resolve_hook_point(llama, ("transformer.h.1", "blocks.7.hook_resid_post"))

    def test_names_that_contradict_each_other(self, llama: PreTrainedModel) -> None:
        with pytest.raises(
            AuditError, match=r"contradict.*'model.layers.0' is model.layers.0, .*model.layers.1"
        ):
            resolve_hook_point(llama, ("model.layers.0", "blocks.1.hook_resid_post"))

    def test_a_full_path_comes_before_its_suffixes(self) -> None:
        class Wrapper(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.copy = build("llama").model, nn.ModuleDict({"model": build("llama").model})

        assert resolve_hook_point(Wrapper(), "model.layers.1").path == "model.layers.1"


class TestOtherLayouts:
    def test_layers_of_two_blocks(self) -> None:
        """LongCat counts a layer's two blocks as two hidden layers; a hook point is a layer."""
        settings = {**USUAL, "num_layers": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
        own = {
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "n_routed_experts": 2,
            "zero_expert_num": 1,
            "moe_topk": 1,
        }
        del settings["num_hidden_layers"], settings["intermediate_size"]
        config = AutoConfig.for_model(
            "longcat_flash", **settings, **own, ffn_hidden_size=16, expert_ffn_hidden_size=8
        )
        model = AutoModelForCausalLM.from_config(config)
        assert resolve_hook_point(model, "blocks.1.hook_resid_post").path == "model.layers.1"
        with pytest.raises(AuditError, match=r"has 2 layers \(0 to 1\)"):
            resolve_hook_point(model, "blocks.2.hook_resid_post")

    def test_custom_code_with_names_of_its_own(self) -> None:
        class OwnConfig(PretrainedConfig):
            model_type = "own"

            def __init__(self, n_layers: int = 3, dim: int = WIDTH, **settings: Any) -> None:
                super().__init__(**settings)
                self.n_layers, self.dim = n_layers, dim

        class OwnModel(PreTrainedModel):
            config_class = OwnConfig

            def __init__(self, config: OwnConfig) -> None:
                super().__init__(config)
                self.blocks = nn.ModuleList(
                    nn.Sequential(nn.Linear(config.dim, config.dim)) for _ in range(config.n_layers)
                )
                self.projections = nn.ModuleList(nn.Linear(4, 4) for _ in range(config.n_layers))

        model = OwnModel(OwnConfig())
        assert residual_width(model) == WIDTH
        assert resolve_hook_point(model, "blocks.1.hook_resid_post").path == "blocks.1"

    def test_several_streams_are_refused_for_what_they_are(self, llama: PreTrainedModel) -> None:
        """Gemma 3n's layers return four streams that predict and correct each other."""
        point = resolve_hook_point(llama, "1")
        with pytest.raises(AuditError, match=r"no one residual stream.*returns several that are mixed"):
            point.hidden_states(torch.zeros(4, 2, 5, WIDTH), WIDTH)


def test_layer_lists(llama: PreTrainedModel) -> None:
    assert layer_lists(llama) == {"model.layers": LAYERS}
