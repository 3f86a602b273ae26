"""Answers that are sampled once: what is kept of them, what a look shows, and that the trainer is as it was."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from helpers.trainers import BUILDERS, build, dpo, sft
from helpers.worlds import D_SAE, make_dictionary, make_model, make_tokenizer
from transformers import Trainer, TrainerCallback

from trl_sae_audit.attribution.drift import effective_answers, weigh_tokens
from trl_sae_audit.callbacks import generations
from trl_sae_audit.callbacks.generation_prompts import DRAWN, prompts_for
from trl_sae_audit.callbacks.generations import GenerationDrift, check_generations
from trl_sae_audit.callbacks.sampled_answers import SampledAnswers, answer_log_probs, draw_within
from trl_sae_audit.errors import AuditError
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.sampling import Sampling

pytestmark = pytest.mark.newest

SHORT = Sampling(answers=3, max_new_tokens=6)
PROMPTS = ["w1 w2 w3", "w4", "w5 w6", "w7 w8 w9 w10"]


def watched(
    trainer: Trainer, sampling: Sampling = SHORT, prompts: Any = PROMPTS, **more: Any
) -> GenerationDrift:
    dictionary = make_dictionary()
    point = resolve_hook_point(trainer.model, dictionary.hook_point)
    return GenerationDrift(trainer, [dictionary], [point], sampling, prompts, **more)


def disturb(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return dpo(tmp_path)


def test_nothing_has_moved_at_the_start(trainer: Trainer) -> None:
    look = watched(trainer).measure()
    assert look is not None
    assert (look.answers, look.prompts, look.divergence) == (12, 4, 0.0)
    assert look.effective == pytest.approx(12)
    assert look.trusted
    assert not look.drifts["tiny"].change.any()


@pytest.mark.parametrize(
    ("temperature", "sinks", "counted"),
    [(1.0, False, False), (0.7, False, False), (1.0, True, False), (1.0, True, True)],
)
def test_a_look_agrees_with_the_formula_on_plain_forward_passes(
    trainer: Trainer, temperature: float, sinks: bool, counted: bool
) -> None:
    if sinks:
        with torch.no_grad():
            trainer.model.get_input_embeddings().weight[10:20] *= 100
    tables: dict[str, Any] = {}
    sampling = Sampling(answers=3, max_new_tokens=6, temperature=temperature)
    generations = watched(trainer, sampling, append=tables.__setitem__, attention_sinks=counted)
    answers, prompts = (pd.DataFrame(tables[name]) for name in ("generations", "generation_prompts"))
    start, after = (make_model(make_tokenizer()).eval() for _ in range(2))
    start.load_state_dict(trainer.model.state_dict())
    disturb(trainer.model)
    after.load_state_dict(trainer.model.state_dict())
    look = generations.measure()
    assert look is not None

    ratios, active, found = [], [], 0
    dictionary = make_dictionary()
    point = resolve_hook_point(start, dictionary.hook_point)
    captured: list[torch.Tensor] = []
    point.module.register_forward_hook(lambda module, args, output: captured.append(output))
    for _, row in answers.groupby("answer"):
        asked = prompts["token"][prompts["prompt"] == row["prompt"].iloc[0]]
        ids = torch.tensor([[*asked, *row["token"]]])
        first = len(asked)
        with torch.no_grad():
            before, now = (
                (model(ids).logits[0] / temperature)
                .log_softmax(-1)[:-1]
                .gather(-1, ids[0, 1:, None])[first - 1 :, 0]
                for model in (start, after)
            )
        np.testing.assert_allclose(before, row["log_prob"], atol=1e-5)
        ratios.append((now - before).numpy())
        norms = captured[-1][0, first:].norm(dim=-1).numpy()
        huge = norms > 10 * np.sort(norms)[(len(norms) - 1) // 2]
        silent = huge & (not counted)
        active.append(np.where(silent[:, None], 0.0, dictionary.encode(captured[-1][0, first:]).numpy()))
        found += huge.sum()
    assert bool(found) == sinks  # nothing is active at an attention sink
    layout = generations._layout
    weights = 1 + weigh_tokens(np.concatenate(ratios), layout).excess
    dense = np.concatenate(active)
    expected = (weights[:, None] * dense).sum(0) / weights.sum() - dense.mean(0)
    assert look.drifts["tiny"].features.tolist() == list(range(D_SAE))
    np.testing.assert_allclose(look.drifts["tiny"].change, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 1e-3
    assert look.effective == pytest.approx(effective_answers(np.concatenate(ratios), layout), rel=1e-3)
    assert look.divergence == pytest.approx(-np.concatenate(ratios).sum() / 12, rel=1e-3)


def test_the_trainer_is_as_it_was(trainer: Trainer) -> None:
    trainer.model.train()
    trainer.model.generation_config.top_k = 7
    state = copy.deepcopy(trainer.model.state_dict())
    config, generation = copy.deepcopy(trainer.model.config), copy.deepcopy(trainer.model.generation_config)
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    hooks = [len(module._forward_hooks) for module in trainer.model.modules()]
    watched(trainer, prompts=None).measure()
    assert all(module.training for module in trainer.model.modules())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == drawn[1:]
    assert trainer.model.config.to_dict() == config.to_dict()
    assert trainer.model.generation_config == generation
    assert [len(module._forward_hooks) for module in trainer.model.modules()] == hooks
    assert all(torch.equal(value, state[key]) for key, value in trainer.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_what_is_kept_gives_the_same_looks_to_the_bit(trainer: Trainer) -> None:
    tables: dict[str, Any] = {}
    first = watched(trainer, append=tables.__setitem__)
    kept = SampledAnswers.from_tables(
        *(
            pd.DataFrame(tables[name])
            for name in ("generation_prompts", "generations", "generation_activations")
        )
    )
    disturb(trainer.model)
    more: dict[str, Any] = {}
    again = watched(trainer, prompts=["w59"], kept=kept, append=more.__setitem__)
    assert not more
    one, other = first.measure(), again.measure()
    assert one is not None
    assert other is not None
    np.testing.assert_array_equal(one.drifts["tiny"].change, other.drifts["tiny"].change)
    np.testing.assert_array_equal(one.drifts["tiny"].low, other.drifts["tiny"].low)
    assert (one.effective, one.divergence) == (other.effective, other.divergence)


def test_log_probs_in_a_training_with_mixed_precision_are_those_in_full(tmp_path: Path) -> None:
    rows = [((5, 6, 7), (8, 9, 2)), ((5,), (10, 11, 12, 2))]
    model = make_model(make_tokenizer())
    found: list[np.ndarray] = []

    class Reading(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            rounded = model(torch.tensor([[5, 6, 7, 8, 9, 2]])).logits.log_softmax(-1)[0, 2, 8].item()
            found.append(answer_log_probs(model, rows, 1.0))
            assert abs(rounded - found[0][0]) > 1e-3

    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = dpo(tmp_path, bf16=True, max_steps=1)
    model.load_state_dict(trainer.model.state_dict())
    trainer.add_callback(Reading())
    trainer.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    np.testing.assert_array_equal(found[0], answer_log_probs(model, rows, 1.0))


def test_log_probs_are_those_of_whole_rows_though_prompts_are_read_once() -> None:
    model = make_model(make_tokenizer())
    prompts = [(5, 6, 7, 9), (8, 9), (11,)]
    rows = [(prompt, (10 + n, *range(20, 20 + n), 2)) for prompt in prompts for n in range(4)]
    found = answer_log_probs(model, rows, 0.7)
    read: list[int] = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    answer_log_probs(model, rows[:4], 1.0)
    handle.remove()
    # the prompt but for its last token once, that and the answers without theirs, and the head
    assert read[-3:] == [3, 4 * 5, 14]
    expected = []
    for prompt, answer in rows:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / 0.7
        expected += logits.log_softmax(-1)[range(len(answer)), list(answer)].tolist()
    np.testing.assert_allclose(found, expected, atol=1e-5)


# Which prompts


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO", "OnlineDPO"])
def test_prompts_come_from_the_train_set(name: str, tmp_path: Path) -> None:
    trainer = BUILDERS[name](tmp_path)
    tokenizer = make_tokenizer()
    known = {tuple(tokenizer(row["prompt"])["input_ids"]) for row in trainer.train_dataset}
    prompts = prompts_for(trainer, None, SHORT)
    assert len(prompts) == len(set(prompts)) == min(len(known), DRAWN)
    assert set(prompts) == known
    assert prompts == prompts_for(trainer, None, SHORT)
    assert prompts != prompts_for(trainer, None, Sampling(seed=1, max_new_tokens=6))


def test_no_more_prompts_are_drawn_than_said_and_none_twice(tmp_path: Path) -> None:
    trainer = BUILDERS["GRPO"](tmp_path)
    trainer.train_dataset = Dataset.from_dict({"prompt": [f"w{n % 20} w{n % 7}" for n in range(1000)]})
    assert len(set(prompts_for(trainer, None, SHORT))) == DRAWN
    trainer.train_dataset = Dataset.from_dict({"prompt": ["w1", "w2"] * 500})
    assert len(prompts_for(trainer, None, SHORT)) == 2


def test_answers_within_a_number_of_tokens_are_drawn_whatever_they_say() -> None:
    """As many as fit at the mean length, spread over the prompts; over many seeds, each as often as any other of its place."""
    answers = [[[place, answer] * (1 + place) for answer in range(4)] for place in range(5)]
    assert draw_within(answers, 120, 0) == answers
    for tokens, wanted in ((72.0, 12), (30.0, 5), (12.0, 2), (0.0, 1)):
        kept = draw_within(answers, tokens, 0)
        assert sum(map(len, kept)) == wanted
        assert all(some == several[: len(some)] for some, several in zip(kept, answers, strict=True))
        assert max(map(len, kept)) - min(map(len, kept)) <= 1
    counts = np.mean(
        [[len(some) for some in draw_within(answers, 72.0, seed)] for seed in range(2000)], axis=0
    )
    np.testing.assert_allclose(counts, 12 / 5, atol=0.05)


def test_only_prompts_that_were_drawn_are_answered_within_the_budget(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = watched(trainer, prompts=None).measure()
    assert whole is not None
    monkeypatch.setattr(generations, "TOKENS_A_LOOK", 30)
    drawn = watched(trainer, prompts=None).measure()
    assert drawn is not None
    assert 0 < drawn.answers < whole.prompts
    assert drawn.prompts == drawn.answers  # one answer each, numbered without a gap
    given = watched(trainer).measure()
    assert given is not None
    assert given.answers == 12  # who gives prompts says how many


def test_texts_conversations_and_rows_are_prompts(trainer: Trainer) -> None:
    talk = [{"role": "user", "content": "w1 w2"}]
    tokenizer = make_tokenizer()
    rendered = tuple(
        tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
    )
    found = prompts_for(trainer, ["w3 w4", talk, {"prompt": "w3 w4"}, {"prompt": talk}], SHORT)
    assert found == [tuple(tokenizer("w3 w4")["input_ids"]), rendered]
    assert prompts_for(trainer, Dataset.from_dict({"prompt": ["w3 w4"]}), SHORT) == found[:1]


def test_messages_of_a_train_set_are_answered_where_the_last_answer_stood(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    talk = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    trainer.train_dataset = Dataset.from_dict({"messages": [talk]})
    asked = make_tokenizer().apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=True)
    assert prompts_for(trainer, None, SHORT) == [tuple(asked["input_ids"])]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ([], "no prompts in generation_prompts"),
        ("w1 w2", "no prompts in generation_prompts"),
        ([5], "Prompt 0 of generation_prompts is neither a text nor a conversation"),
        (["w1", {"text": "w2"}], "Prompt 1 of generation_prompts is neither"),
        (["w1 " * 123], r"Prompt 0 of generation_prompts has 123 tokens, .* between 1 and 122"),
    ],
)
def test_what_is_no_prompt_is_refused(trainer: Trainer, given: Any, sentence: str) -> None:
    with pytest.raises(AuditError, match=sentence):
        prompts_for(trainer, given, SHORT)


def test_a_train_set_without_prompts_asks_for_some(tmp_path: Path) -> None:
    with pytest.raises(
        AuditError, match=r"SFTTrainer has no prompts in its train set .* pass generation_prompts"
    ):
        prompts_for(sft(tmp_path), None, SHORT)


def test_a_train_set_of_long_prompts_asks_for_shorter_answers(trainer: Trainer) -> None:
    with pytest.raises(AuditError, match="smaller max_new_tokens"):
        prompts_for(trainer, None, Sampling(max_new_tokens=128))


def test_a_reward_model_generates_nothing(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="generates nothing"):
        check_generations(build("Reward", tmp_path))
