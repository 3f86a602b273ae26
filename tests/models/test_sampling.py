"""Sampling draws from the model's own distribution, whatever its generation_config.json says."""

from __future__ import annotations

import copy

import pytest
from helpers.worlds import make_model
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit.models.sampling import Sampling, _SharedPrompts, answer_greedily, sample_ids

PROMPTS = [[8, 9, 10], [11, 12], [13]] * 2
SAMPLING = Sampling(answers=3, max_new_tokens=12, seed=1)
FILES = [
    {"temperature": 0.05},
    {"top_k": 1},
    {"top_p": 0.01},
    {"min_p": 0.9},
    {"typical_p": 0.1},
    {"epsilon_cutoff": 0.5},
    {"eta_cutoff": 0.5},
    {"repetition_penalty": 5.0},
    {"encoder_repetition_penalty": 2.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(8, 40))},
    {"begin_suppress_tokens": [30]},
    {"bad_words_ids": [[20], [21]]},
    {"min_new_tokens": 12},
    {"min_length": 30},
    {"max_length": 5},
    {"max_time": 1e-9},
    {"num_beams": 2},
    {"num_return_sequences": 2},
    {"penalty_alpha": 0.6},
    {"guidance_scale": 1.5},
    {"prompt_lookup_num_tokens": 3},
    {"stop_strings": ["w1"]},
    {"eos_token_id": [2, 5]},
    {"forced_eos_token_id": 2},
    {"forced_bos_token_id": 9},
    {"do_sample": False},
    {"renormalize_logits": True},
    {"remove_invalid_values": True},
    {"return_dict_in_generate": True, "output_scores": True},
    {"cache_implementation": "static"},
    {"use_cache": False},
    {"exponential_decay_length_penalty": (2, 1.5)},
    {"sequence_bias": [[[20], 10.0]]},
    {"watermarking_config": {"bias": 5.0}},
]


@pytest.fixture(scope="module")
def plain(tokenizer: PreTrainedTokenizerFast) -> list[list[list[int]]]:
    return sample_ids(make_model(tokenizer).eval(), tokenizer, PROMPTS, SAMPLING)


@pytest.mark.parametrize("file", FILES, ids=lambda file: "-".join(file))
def test_the_file_decides_nothing(
    tokenizer: PreTrainedTokenizerFast, plain: list[list[list[int]]], file: dict[str, object]
) -> None:
    model = make_model(tokenizer).eval()
    for name, value in file.items():
        setattr(model.generation_config, name, value)
    own = model.generation_config
    assert sample_ids(model, tokenizer, PROMPTS, SAMPLING) == plain
    assert model.generation_config is own
    assert all(getattr(own, name) == value for name, value in file.items())


def test_nor_that_of_a_model_inside_an_adapter(
    tokenizer: PreTrainedTokenizerFast, plain: list[list[list[int]]]
) -> None:
    model = get_peft_model(make_model(tokenizer), LoraConfig(target_modules=["q_proj"])).eval()
    base: LlamaForCausalLM = model.get_base_model()
    base.generation_config.repetition_penalty = 5.0
    assert sample_ids(model, tokenizer, PROMPTS, SAMPLING) == plain


def test_a_turn_ends_where_the_file_says_if_that_is_a_special_token(
    tokenizer: PreTrainedTokenizerFast, plain: list[list[list[int]]]
) -> None:
    """As in Gemma, whose turns end with a token that is not the end of sequence."""
    turn = next(token for several in plain for answer in several for token in answer[:-1] if token >= 8)
    marked = copy.deepcopy(tokenizer)
    marked.add_special_tokens({"additional_special_tokens": [marked.convert_ids_to_tokens(turn)]})
    model = make_model(tokenizer).eval()
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, turn])
    ended = [
        [answer[: answer.index(turn) + 1] if turn in answer else answer for answer in several]
        for several in plain
    ]
    assert ended != plain
    assert sample_ids(model, marked, PROMPTS, SAMPLING) == ended
    greedy = answer_greedily(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config = GenerationConfig(eos_token_id=greedy[0][3])
    marked.add_special_tokens({"additional_special_tokens": [marked.convert_ids_to_tokens(greedy[0][3])]})
    first = greedy[0].index(greedy[0][3])
    assert answer_greedily(model, marked, PROMPTS, max_new_tokens=12)[0] == greedy[0][:first]


def test_it_is_given_back_when_sampling_fails(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model(tokenizer).eval()
    own = model.generation_config = GenerationConfig(top_k=1)
    with pytest.raises(IndexError):
        sample_ids(model, tokenizer, [[10**6]], SAMPLING)
    assert model.generation_config is own


def test_a_prompt_is_read_once_for_all_its_answers(model, tokenizer, monkeypatch):
    prompts = [[8, 9, 10, 11], [11, 12, 13]]
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared = sample_ids(model, tokenizer, prompts, SAMPLING)
    handle.remove()
    assert read[:2] == [(2, 3), (6, 1)]
    monkeypatch.setattr(_SharedPrompts, "of", lambda model: None)
    assert sample_ids(model, tokenizer, prompts, SAMPLING) == shared
