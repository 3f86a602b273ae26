"""A shaped reward model: saved and loaded, with adapters, in trainers other than PPO, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shaped import CALIBRATION, FLAGS, adapted, reward_model, scorer, weighted
from helpers.worlds import (
    make_config,
    make_dictionary,
    make_model,
    make_tokenizer,
    prompts,
    reward_by_length,
)
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureScorer,
    FixedPenalty,
    Flag,
    ShapedReward,
    ShapedRewardModel,
)


def policy_gradient(kind: str, directory: Path, shaped: nn.Module) -> Trainer:
    from helpers.trainers import arguments
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

    tokenizer = make_tokenizer()
    common: dict[str, Any] = {
        "reward_funcs": shaped,
        "reward_processing_classes": tokenizer,
        "train_dataset": spaced_prompts(),
        "processing_class": tokenizer,
    }
    if kind == "OnlineDPO":
        settings = arguments(directory, max_new_tokens=6, beta=0.5)
        return OnlineDPOTrainer(
            make_model(tokenizer), make_model(tokenizer, seed=5), args=OnlineDPOConfig(**settings), **common
        )
    trainer, config = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[kind]
    settings = arguments(directory, num_generations=4, max_completion_length=6, beta=0.0)
    return trainer(make_model(tokenizer), args=config(**settings), **common)


def spaced_prompts() -> Any:
    """TRL joins prompt and completion without a space."""
    return prompts(24).map(lambda row: {"prompt": row["prompt"] + " "}, load_from_cache_file=False)


@pytest.mark.newest
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "OnlineDPO"])
@pytest.mark.parametrize("own_backbone", [False, True])
def test_other_trainers_receive_inner_reward_minus_penalty(
    kind: str, own_backbone: bool, tmp_path: Path
) -> None:
    model = reward_model()
    reads = scorer(model if own_backbone else None)
    shaped = ShapedRewardModel(model.train(), reads, FLAGS, FixedPenalty(0.5))
    assert not model.training
    trainer: Any = policy_gradient(kind, tmp_path, shaped)
    name = "_calculate_rewards_from_functions" if kind == "OnlineDPO" else "_calculate_rewards"
    original, received = getattr(trainer, name), []

    def listening(*args: Any, **kwargs: Any) -> Tensor:
        texts = (kwargs["prompts"], kwargs["completions"]) if kind == "OnlineDPO" else args[1:3]
        received.append((*texts, original(*args, **kwargs)))
        return received[-1][2]

    setattr(trainer, name, listening)
    forwards: list[int] = []
    reads.point.decoder.layers[0].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[union-attr, index]
    trainer.train()
    tokenizer, plain = make_tokenizer(), reward_model()
    fresh = scorer(reward_model() if own_backbone else None)
    assert len(received) >= 3
    if own_backbone:
        assert len(forwards) == len(received)
    for texts, completions, got in received:
        with torch.no_grad():
            inner = torch.cat(
                [
                    plain(torch.tensor([tokenizer(a + b)["input_ids"]])).logits[0]
                    for a, b in zip(texts, completions, strict=True)
                ]
            )
        off = 0.5 * weighted(fresh.score(texts, completions, [3, 50]))
        torch.testing.assert_close(got.reshape(-1), inner - off.float(), rtol=1e-4, atol=1e-5)
        assert float(off.abs().max()) > 0.1
    assert any("shaping/penalty" in entry for entry in trainer.state.log_history)


@pytest.mark.newest
@pytest.mark.parametrize("kind", ["GRPO", "RLOO", "OnlineDPO"])
def test_a_function_in_it_gets_what_the_trainer_passes_to_functions(kind: str, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reads(prompts: Any, completions: Any, completion_ids: Any, trainer_state: Any, **columns: Any) -> Any:
        seen.append({"ids": completion_ids, "step": trainer_state.global_step, **columns})
        return [float(sum(ids)) for ids in completion_ids]

    trainer: Any = policy_gradient(
        kind, tmp_path, ShapedRewardModel(reads, scorer(), FLAGS, FixedPenalty(0.1))
    )
    trainer.train()
    assert all(len(ids) > 0 for call in seen for ids in call["ids"])
    assert len({call["step"] for call in seen}) > 1
    assert all("log_metric" in call for call in seen) == (kind != "OnlineDPO")


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    model = reward_model()
    penalty = AdaptivePenalty(target=-1.0, proportional=0.3)
    shaped = ShapedRewardModel(model, scorer(), FLAGS, penalty)
    for _ in range(3):
        scores = torch.rand(4, 2)
        penalty.begin_batch()
        penalty.end_batch(scores, torch.randn(4))
    penalty.begin_batch()
    shaped.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    uncalibrated = FeatureScorer(make_model(tokenizer, seed=5), tokenizer, make_dictionary())
    again = ShapedRewardModel.from_pretrained(tmp_path, uncalibrated)
    texts, completions = ["w1 ", "w2 w3 "], ["w4 w5 w6", "w7"]
    first = shaped.rewards(texts, completions)
    assert again.rewards(texts, completions) == first
    plain = ShapedRewardModel(model, tokenizer=tokenizer).rewards(texts, completions)
    assert plain != first
    assert max(again.shaper.penalty.coefficients()) > 0
    assert again.config.num_labels == 1
    (tmp_path / "manifest.json").write_text('{"kind": "shaped_reward", "format": 9}')
    with pytest.raises(AuditError, match="format 9"):
        ShapedRewardModel.from_pretrained(tmp_path, uncalibrated)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(AuditError, match="is damaged"):
        ShapedRewardModel.from_pretrained(tmp_path, uncalibrated)


def test_a_reward_model_with_adapters_pays_as_the_merged_one(tmp_path: Path) -> None:
    texts, completions = ["w1 ", "w2 w3 "], ["w4 w5 w6", "w7"]
    model = adapted()
    with_adapters = ShapedRewardModel(model, scorer(), FLAGS, 0.5)
    merged = ShapedRewardModel(adapted().merge_and_unload(), scorer(), FLAGS, 0.5)
    plain = ShapedRewardModel(reward_model(), scorer(), FLAGS, 0.5)
    expected = merged.rewards(texts, completions)
    assert with_adapters.rewards(texts, completions) == pytest.approx(expected, abs=1e-4)
    assert plain.rewards(texts, completions) != pytest.approx(expected, abs=1e-1)
    assert with_adapters.config.num_labels == 1
    with pytest.raises(AuditError, match="merge_and_unload"):
        with_adapters.save_pretrained(tmp_path)
    merged.save_pretrained(tmp_path)
    assert ShapedRewardModel.from_pretrained(tmp_path, scorer()).rewards(texts, completions) == pytest.approx(
        expected, abs=1e-5
    )
    prompts_before = get_peft_model(
        reward_model(), PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    )
    with pytest.raises(AuditError, match="before the input"):
        ShapedRewardModel(prompts_before, tokenizer=make_tokenizer())


def test_responses_of_the_reference_can_be_learned_from() -> None:
    """What the reward pays is then known from the first step on; both kinds of shaped reward learn the same."""

    async def judged(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        return paying(prompts, completions)

    def paying(prompts: Any, completions: Any, **kwargs: Any) -> list[float]:
        return scorer().score(prompts, completions, [3])[:, 0].tolist()

    texts, completions = map(list, zip(*CALIBRATION, strict=True))
    costs = []
    for reward in (paying, judged):
        model = ShapedRewardModel(reward, scorer(), FLAGS, AdaptivePenalty())
        function = ShapedReward(reward, scorer(), FLAGS, AdaptivePenalty())
        model.learn_from(texts, completions)
        function.learn_from(texts, completions)
        for shaper in (model.shaper, function.shaper):
            shaper.begin(None, learning=True)
            costs.append(shaper.penalty.coefficients())
    assert costs[0][0] > 0.1
    assert all(cost == costs[0] for cost in costs)


def test_a_function_must_be_given_again(tmp_path: Path) -> None:
    def reward(prompts: Any, completions: list[str], **kwargs: Any) -> list[float]:
        return reward_by_length(completions)

    ShapedRewardModel(reward, scorer(), FLAGS, 0.5).save_pretrained(tmp_path)
    with pytest.raises(AuditError, match="pass it as reward="):
        ShapedRewardModel.from_pretrained(tmp_path, scorer())
    again = ShapedRewardModel.from_pretrained(tmp_path, scorer(), reward=reward)
    off = 0.5 * weighted(scorer().score(["w1 "], ["w5 w9"], [3, 50]))
    assert again.rewards(["w1 "], ["w5 w9"]) == pytest.approx(
        [reward_by_length(["w5 w9"])[0] - float(off)], abs=1e-5
    )


class NoHead(nn.Module):
    """A backbone, and no head."""

    base_model_prefix = "model"

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Linear(2, 2)


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = make_tokenizer()
    with pytest.raises(AuditError, match="no head called `score`"):
        ShapedRewardModel(NoHead(), scorer(), FLAGS, 0.5)
    with pytest.raises(AuditError, match="no backbone"):
        ShapedRewardModel(nn.Linear(2, 2), scorer(), FLAGS, 0.5)
    with pytest.raises(AuditError, match="no head called `score`"):
        ShapedRewardModel(make_model(tokenizer), scorer(), FLAGS, 0.5)
    config = make_config(tokenizer)
    config.num_labels = 3
    from transformers import AutoModelForSequenceClassification

    with pytest.raises(AuditError, match="3 labels"):
        ShapedRewardModel(AutoModelForSequenceClassification.from_config(config), scorer(), FLAGS, 0.5)
    with pytest.raises(AuditError, match="as tokenizer="):
        ShapedRewardModel(reward_by_length)
    with pytest.raises(AuditError, match="no penalty"):
        ShapedRewardModel(reward_model(), scorer(), FLAGS)
    with pytest.raises(AuditError, match="penalty below 0"):
        ShapedRewardModel(reward_model(), scorer(), FLAGS, -1.0)
    with pytest.raises(AuditError, match="No flag is of dictionary"):
        ShapedRewardModel(reward_model(), scorer(), [Flag("another", 1)], 0.5)
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["more"])
    with pytest.raises(AuditError, match="another model's"):
        ShapedRewardModel(reward_model(), tokenizer=larger)
    shaped = ShapedRewardModel(reward_model(), scorer(), FLAGS, 0.5)
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(AuditError, match="where responses begin"):
        shaped.backbone(ids, torch.ones_like(ids))
    with pytest.raises(AuditError, match="prompt from response"):
        shaped(ids, torch.ones_like(ids))
    none = ShapedRewardModel(lambda **_: [None], tokenizer=tokenizer)
    with pytest.raises(AuditError, match="must judge every response"):
        none.rewards(["w1 "], ["w2"])
