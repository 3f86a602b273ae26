"""What GRPO, RLOO and OnlineDPO receive from a shaped reward: the inner reward minus the documented penalty."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.shaped import FLAGS, scorer
from helpers.trainers import arguments
from helpers.worlds import (
    make_dictionary,
    make_model,
    make_reward_model,
    make_tokenizer,
    prompts,
    reward_by_length,
)
from transformers import Trainer, trainer_jit_checkpoint
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureScorer,
    FixedPenalty,
    Flag,
    ShapedReward,
    ShapingCallback,
)
from trl_sae_audit.models.event_loop import wait_for
from trl_sae_audit.trainers.rollout import trainer_of_function


def signed_scores(texts: Any, completions: Any) -> torch.Tensor:
    """By a scorer of its own, turned by hand."""
    return scorer().score(texts, completions, [3, 50]).double() * torch.tensor([1.0, -1.0])


class Asked(ShapedReward):
    """Keeps what it was asked and what it answered."""

    def __call__(self, prompts: Any, completions: Any, **kwargs: Any) -> Any:
        coefficients = self.shaper.penalty.coefficients()
        answer = super().__call__(prompts, completions, **kwargs)
        self.calls = [*vars(self).get("calls", []), (prompts, completions, kwargs, answer, coefficients)]
        return answer


def policy_gradient(kind: str, directory: Path, reward: Any, **overrides: Any) -> Trainer:
    tokenizer = make_tokenizer()
    settings = arguments(directory, num_generations=4, max_completion_length=6, beta=0.0, **overrides)
    trainer, config = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[kind]
    return trainer(
        make_model(tokenizer),
        reward_funcs=reward,
        args=config(**settings),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )


def online_dpo(directory: Path, reward: Any) -> Trainer:
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    tokenizer = make_tokenizer()
    return OnlineDPOTrainer(
        make_model(tokenizer),
        make_model(tokenizer, seed=5),
        reward_funcs=reward,
        args=OnlineDPOConfig(**arguments(directory, max_new_tokens=6, beta=0.5)),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )


@pytest.mark.newest
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_the_trainer_receives_inner_reward_minus_penalty(kind: str, tmp_path: Path) -> None:
    shaped = Asked(reward_by_length, scorer(), FLAGS, FixedPenalty(0.5, clip=2.0))
    trainer: Any = policy_gradient(kind, tmp_path, shaped, log_completions=True)
    received: list[torch.Tensor] = []
    original = trainer._calculate_rewards
    trainer._calculate_rewards = lambda *args: received.append(original(*args)) or received[-1]
    trainer.train()
    assert len(received) == len(shaped.calls) >= 3
    clipped = 0
    for tensor, (texts, completions, kwargs, _, _) in zip(received, shaped.calls, strict=True):
        inner = torch.tensor(reward_by_length(completions), dtype=torch.float64)
        weighted = 0.5 * signed_scores(texts, completions) @ torch.tensor([1.0, 2.0], dtype=torch.float64)
        clipped += int((weighted.abs() > 2).sum())
        torch.testing.assert_close(
            tensor[:, 0], (inner - weighted.clamp(-2, 2)).float(), rtol=1e-5, atol=1e-5
        )
        assert {"completion_ids", "trainer_state", "log_metric"} <= kwargs.keys()
    assert clipped > 0
    logged = [entry for entry in trainer.state.log_history if "shaping/reward" in entry]
    assert logged
    inner = [np.mean(reward_by_length(completions)) for _, completions, *_ in shaped.calls]
    assert logged[0]["shaping/reward"] == pytest.approx(np.mean(inner[:2]), rel=1e-4)
    assert logged[0]["rewards/reward_by_length/mean"] == pytest.approx(
        logged[0]["shaping/reward"] - logged[0]["shaping/penalty"], abs=1e-4
    )
    for name in ("shaping/flattery/score", "shaping/length/score", "shaping/flattery/coefficient"):
        assert name in logged[0]
    if kind == "RLOO":  # shows its table of completions on dashboards only
        return
    shown = pd.concat(pd.read_parquet(path) for path in sorted((tmp_path / "out" / "completions").iterdir()))
    assert set(shown["completion"]) <= {text for _, completions, *_ in shaped.calls for text in completions}
    row = shown.iloc[0]
    scores = signed_scores([row["prompt"]], [row["completion"]])[0]
    assert row["shaping/flattery/score"] == pytest.approx(float(scores[0]), abs=1e-4)
    assert row["shaping/length/score"] == pytest.approx(float(scores[1]), abs=1e-4)
    assert row["reward_by_length"] == pytest.approx(
        reward_by_length([row["completion"]])[0] - row["shaping/penalty"], abs=1e-4
    )


@pytest.mark.newest
def test_online_dpo_receives_inner_reward_minus_penalty(tmp_path: Path) -> None:
    shaped = Asked(reward_by_length, scorer(), FLAGS, 0.25)
    trainer: Any = online_dpo(tmp_path, shaped)
    received: list[torch.Tensor] = []
    original = trainer._calculate_rewards_from_functions
    trainer._calculate_rewards_from_functions = lambda *args, **kwargs: (
        received.append(original(*args, **kwargs)) or received[-1]
    )
    trainer.train()
    assert len(received) == len(shaped.calls) >= 3
    for tensor, (texts, completions, *_) in zip(received, shaped.calls, strict=True):
        inner = torch.tensor(reward_by_length(completions), dtype=torch.float64)
        off = 0.25 * signed_scores(texts, completions) @ torch.tensor([1.0, 2.0], dtype=torch.float64)
        torch.testing.assert_close(tensor, (inner - off).float(), rtol=1e-5, atol=1e-5)
        assert float(off.abs().max()) > 0.1
    inner_means = [np.mean(reward_by_length(completions)) for _, completions, *_ in shaped.calls]
    (entry, *_) = [entry for entry in trainer.state.log_history if "loss" in entry]
    in_window = len(shaped.calls) * 2 // 3  # two of three steps
    assert entry["shaping/reward"] == pytest.approx(np.mean(inner_means[:in_window]), rel=1e-5)
    assert "log" not in vars(trainer)


@pytest.mark.newest
def test_adaptive_coefficients_follow_their_rule_in_grpo(tmp_path: Path) -> None:
    penalty = AdaptivePenalty(proportional=0.3)
    shaped = Asked(reward_by_length, scorer(), FLAGS, penalty)
    policy_gradient("GRPO", tmp_path, shaped, gradient_accumulation_steps=1, max_steps=4).train()
    by_hand = AdaptivePenalty(proportional=0.3)
    by_hand.bind(list(FLAGS))
    assert len(shaped.calls) >= 4
    largest = 0.0
    for texts, completions, _, answer, _ in shaped.calls:
        scores = signed_scores(texts, completions)
        inner = torch.tensor(reward_by_length(completions), dtype=torch.float64)
        by_hand.begin_batch()
        off = by_hand(scores)
        by_hand.end_batch(scores, inner)
        assert answer == pytest.approx((inner - off).tolist(), abs=1e-4)
        largest = max(largest, float(off.abs().max()))
    assert largest > 0


@pytest.mark.newest
def test_a_resumed_run_continues_with_the_same_coefficients(tmp_path: Path) -> None:
    def run(directory: Path, checkpoint: str | None = None, **overrides: Any) -> list[list[float]]:
        shaped = Asked(reward_by_length, scorer(), FLAGS, AdaptivePenalty(target=-1.0, proportional=0.3))
        trainer = policy_gradient(
            "GRPO",
            directory,
            shaped,
            gradient_accumulation_steps=1,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            **overrides,
        )
        trainer.add_callback(ShapingCallback(shaped))
        trainer.train(resume_from_checkpoint=checkpoint)
        return [
            shaped.shaper.penalty.state_dict()["lambdas"],
            *[answer for *_, answer, _ in shaped.calls],
        ]

    through = run(tmp_path)
    resumed = run(tmp_path, str(tmp_path / "out" / "checkpoint-2"))
    assert len(resumed) == len(through) - 2
    assert resumed[1:] == through[3:]
    assert resumed[0] == through[0]
    assert max(through[0]) > 0
    (tmp_path / "out" / "checkpoint-2" / "sae_shaping.json").unlink()
    with pytest.raises(AuditError, match="resume without ShapingCallback"):
        run(tmp_path, str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.newest
def test_a_checkpoint_made_on_sigterm_in_the_midst_of_a_step_has_its_coefficients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_jit_checkpoint.CheckpointManager, "setup_signal_handler", lambda self: None)

    def run(name: str, in_call: int, failing: bool = False, **overrides: Any) -> Path:
        """`in_call`: the call of the reward, in the midst of a step, in which the signal, or an error, comes."""

        def interrupted(completions: Any, **kwargs: Any) -> list[float]:
            if len(vars(shaped).get("calls", [])) == in_call - 1:
                assert not failing, "the reward fails"
                (jit,) = [
                    callback
                    for callback in trainer.callback_handler.callbacks
                    if isinstance(callback, trainer_jit_checkpoint.JITCheckpointCallback)
                ]
                assert jit.jit_manager is not None
                jit.jit_manager.is_checkpoint_requested = True
            return reward_by_length(completions)

        shaped = Asked(interrupted, scorer(), FLAGS, AdaptivePenalty(target=-1.0, proportional=0.3))
        settings = {"gradient_accumulation_steps": 1, "max_steps": 4, **overrides}
        trainer = policy_gradient("GRPO", tmp_path / name, shaped, **settings)
        trainer.add_callback(ShapingCallback(shaped))
        with pytest.raises(AssertionError, match="reward fails") if failing else contextlib.nullcontext():
            trainer.train()
        assert "_save_checkpoint" not in vars(trainer)
        assert "_run_epoch" not in vars(trainer)
        return tmp_path / name / "out" / "checkpoint-2" / "sae_shaping.json"

    told = run("told", 5, save_strategy="steps", save_steps=2)
    untold = run("untold", 3, enable_jit_checkpoint=True)
    assert json.loads(untold.read_text()) == json.loads(told.read_text())
    assert max(json.loads(untold.read_text())["states"][0]["lambdas"]) > 0
    run("failing", 2, failing=True, enable_jit_checkpoint=True)


@pytest.mark.newest
def test_evaluation_moves_no_coefficient(tmp_path: Path) -> None:
    shaped = ShapedReward(reward_by_length, scorer(), FLAGS, AdaptivePenalty())
    trainer: Any = policy_gradient("GRPO", tmp_path, shaped, max_steps=1)
    trainer.train()
    before = shaped.shaper.penalty.state_dict()
    trainer.eval_dataset = prompts(4, seed=3)
    assert "eval_shaping/reward" in trainer.evaluate(trainer.eval_dataset)
    assert shaped.shaper.penalty.state_dict() == before


@pytest.mark.newest
def test_an_async_reward_stays_async_and_is_shaped(tmp_path: Path) -> None:
    from trl.trainer.utils import get_callable_name, is_async_callable

    async def judged(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return reward_by_length(completions)

    shaped = ShapedReward(judged, scorer(), FLAGS, FixedPenalty(0.5))
    assert is_async_callable(shaped)
    assert get_callable_name(shaped) == "judged"
    assert isinstance(shaped, ShapedReward)
    trainer = policy_gradient("GRPO", tmp_path, shaped, max_steps=1)
    trainer.train()
    entry = trainer.state.log_history[0]
    plain = ShapedReward(reward_by_length, scorer(), FLAGS, FixedPenalty(0.5))
    other = policy_gradient("GRPO", tmp_path / "plain", plain, max_steps=1)
    other.train()
    assert entry["rewards/judged/mean"] == other.state.log_history[0]["rewards/reward_by_length/mean"]
    assert entry["shaping/penalty"] == other.state.log_history[0]["shaping/penalty"]


def test_an_async_reward_is_shaped_whatever_awaits_it(tmp_path: Path) -> None:
    async def judged(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return reward_by_length(completions)

    texts, completions = ["w1 ", "w2 "], ["w3", "w4 w5"]
    plain = ShapedReward(reward_by_length, scorer(), FLAGS, FixedPenalty(0.5))
    shaped = ShapedReward(judged, scorer(), FLAGS, FixedPenalty(0.5))
    trainer = policy_gradient("GRPO", tmp_path, shaped, max_steps=1)
    rows = [{"prompt": text} for text in texts]
    assert trainer._calculate_rewards(rows, texts, completions, [[7], [8, 9]])[:, 0].tolist() == (
        pytest.approx(plain(texts, completions))
    )
    assert wait_for(shaped(texts, completions)) == plain(texts, completions)

    async def cell() -> None:  # of a notebook, in which an event loop runs
        shaped.learn_from(texts, completions)

    asyncio.run(cell())


@pytest.mark.newest
def test_the_policy_cannot_be_its_own_judge(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    policy = make_model(tokenizer)
    trainer = GRPOTrainer(
        policy,
        reward_funcs=ShapedReward(
            reward_by_length, FeatureScorer(policy, tokenizer, make_dictionary()), FLAGS, 0.5
        ),
        args=GRPOConfig(**arguments(tmp_path, num_generations=4, max_completion_length=6)),
        train_dataset=prompts(24),
        processing_class=tokenizer,
    )
    with pytest.raises(AuditError, match="learn to hide"):
        trainer.train()


def test_none_stays_none_and_keywords_are_handed_on() -> None:
    seen: dict[str, Any] = {}

    def picky(prompts: Any, completions: Any, **kwargs: Any) -> list[float | None]:
        seen.update(kwargs)
        return [None, 1.0, np.float32(2.0), torch.tensor(3.0)]

    shaped = ShapedReward(functools.partial(picky), scorer(), FLAGS, 0.5)
    assert shaped.__name__ == "picky"
    texts, completions = ["w1 "] * 4, ["w2", "w3", "w4 w5", "w6"]
    logged: dict[str, float] = {}
    answer = shaped(texts, completions, difficulty=[1, 2, 3, 4], log_metric=logged.__setitem__)
    off = 0.5 * signed_scores(texts, completions) @ torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert answer[0] is None
    assert answer[1:] == pytest.approx(
        [value - less for value, less in zip([1.0, 2.0, 3.0], off.tolist()[1:], strict=True)], abs=1e-5
    )
    assert seen["difficulty"] == [1, 2, 3, 4]
    assert logged["shaping/reward"] == pytest.approx(2.0)
    assert logged["shaping/penalty"] == pytest.approx(float(off[1:].mean()), abs=1e-5)
    assert logged["shaping/penalty_share"] == pytest.approx(
        float(off[1:].std(unbiased=False)) / np.std([1, 2, 3]), abs=1e-4
    )
    assert trainer_of_function({"log_metric": logged.__setitem__}) is None


def test_a_model_is_a_reward_too() -> None:
    tokenizer = make_tokenizer()
    model = make_reward_model(tokenizer).train()
    shaped = ShapedReward(model, scorer(), FLAGS, 0.0, reward_tokenizer=tokenizer)
    texts, completions = ["w1 ", "w2 w3 "], ["w4 w5 w6", "w7"]
    with torch.no_grad():
        expected = [
            float(model.eval()(torch.tensor([tokenizer(a + b)["input_ids"]])).logits)
            for a, b in zip(texts, completions, strict=True)
        ]
    model.train()
    assert shaped(texts, completions) == pytest.approx(expected, abs=1e-5)
    assert model.training
    with pytest.raises(AuditError, match="reward_tokenizer"):
        ShapedReward(model, scorer(), FLAGS, 0.0)
    model.config.num_labels = 3
    with pytest.raises(AuditError, match="3 labels"):
        ShapedReward(model, scorer(), FLAGS, 0.0, reward_tokenizer=tokenizer)


def test_no_flags_change_nothing() -> None:
    shaped = ShapedReward(reward_by_length, None, [], 3.0)
    assert shaped(["w1 "], ["w50 w3"]) == [reward_by_length(["w50 w3"])[0]]


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        ([math.nan, 1.0], "Reward 0 of 'reward' is nan"),
        ([1.0, math.inf], "Reward 1 of 'reward' is inf"),
        ([[1.0, 2.0], [1.0, 2.0]], "is a list"),
        (torch.zeros(2, 3), "shape"),
        ([torch.zeros(2), torch.zeros(2)], "shape"),
        ([1.0], "1 rewards for 2"),
        (1.0, "returned a float"),
        (["good", "bad"], "is a str"),
    ],
)
def test_rewards_that_are_no_numbers_are_refused(returned: Any, match: str) -> None:
    def reward(prompts: Any, completions: Any, **kwargs: Any) -> Any:
        return returned

    with pytest.raises(AuditError, match=match):
        ShapedReward(reward, scorer(), FLAGS, 0.5)(["w1 ", "w2 "], ["w3", "w4"])


def test_flags_and_penalties_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AuditError, match="No flag is of dictionary 'tiny'"):
        ShapedReward(reward_by_length, scorer(), [Flag("another", 3)], 0.5)
    with pytest.raises(AuditError, match="Some flags are of 'another'"):
        ShapedReward(reward_by_length, scorer(), [*FLAGS, Flag("another", 3)], 0.5)
    with pytest.raises(AuditError, match="no scorer"):
        ShapedReward(reward_by_length, None, FLAGS, 0.5)
    with pytest.raises(AuditError, match="flag the feature again"):
        ShapedReward(reward_by_length, scorer(), [Flag("tiny", 3, identity="0" * 64)], 0.5)
    with pytest.raises(AuditError, match="penalty below 0"):
        ShapedReward(reward_by_length, scorer(), FLAGS, -0.5)
    with pytest.raises(AuditError, match="a coefficient"):
        ShapedReward(reward_by_length, scorer(), FLAGS, "0.5")  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="pass a function"):
        ShapedReward(3, scorer(), FLAGS, 0.5)  # type: ignore[arg-type]
    tokenizer = make_tokenizer()
    raw = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary())
    with pytest.raises(AuditError, match="not calibrated"):
        ShapedReward(reward_by_length, raw, FLAGS, AdaptivePenalty())


def test_a_reward_model_s_conversations_are_rendered_as_the_trainer_does(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% if strict is defined %}w1 w2 {% endif %}{% for message in messages %}{{ message.content }} {% endfor %}"
    asked = [[{"role": "user", "content": text}] for text in ("w3", "w4 w5")]
    answers = [[{"role": "assistant", "content": text}] for text in ("w6 w7", "w8")]
    rows = [{"prompt": prompt} for prompt in asked]
    found = []
    model = make_reward_model(tokenizer)
    for reward, reader in (
        (model, tokenizer),
        (ShapedReward(model, scorer(), [], 0.0, reward_tokenizer=tokenizer), None),
    ):
        settings = arguments(tmp_path, num_generations=2, chat_template_kwargs={"strict": True})
        trainer = GRPOTrainer(
            make_model(tokenizer),
            reward_funcs=reward,
            reward_processing_classes=reader,
            args=GRPOConfig(**settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        found.append(trainer._calculate_rewards(rows, asked, answers, [[1], [1]]))
    assert torch.allclose(found[0], found[1])
    assert found[0][0] != found[0][1]
