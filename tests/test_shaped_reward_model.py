"""What PPO, GRPO, RLOO and OnlineDPO receive from a shaped reward model, and what it refuses."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer
from worlds import (
    WORDS,
    make_config,
    make_dictionary,
    make_model,
    make_reward_model,
    make_tokenizer,
    prompts,
    reward_by_length,
)

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureAttributionCallback,
    FeatureScorer,
    FixedPenalty,
    Flag,
    FlagSet,
    ShapedReward,
    ShapedRewardModel,
)

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length", weight=2.0, direction="down")])
SIGNS = torch.tensor([1.0, -1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([1.0, 2.0], dtype=torch.float64)
CALIBRATION = [(f"w{i} w{i + 1} ", f"w{i + 2} w{(7 * i) % 50} w{i + 3}") for i in range(20)]


def scorer(model: nn.Module | None = None, **options: Any) -> FeatureScorer:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, seed=5) if model is None else model
    return FeatureScorer(model, tokenizer, make_dictionary(), **options).calibrate(CALIBRATION)


def reward_model(seed: int = 1) -> Any:
    """With rewards that differ as much as the penalties do."""
    model = make_reward_model(make_tokenizer(), seed)
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model


def weighted(scores: Tensor) -> Tensor:
    return (scores.double() * SIGNS) @ WEIGHTS


class Received:
    """What PPO's get_reward returned to the trainer for the reward model, and for what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shaped: nn.Module) -> None:
        from trl.experimental.ppo import ppo_trainer

        self.original = ppo_trainer.get_reward
        self.calls: list[tuple[Tensor, int, Tensor]] = []
        self.coefficients: list[list[float]] = []

        def listening(model: nn.Module, query_responses: Tensor, pad: int, context_length: int) -> Any:
            result = self.original(model, query_responses, pad, context_length)
            if model is shaped:
                self.calls.append((query_responses, context_length, result[1].clone()))
                self.coefficients.append(shaped.shaper.penalty.coefficients())  # type: ignore[union-attr, operator]
            return result

        monkeypatch.setattr(ppo_trainer, "get_reward", listening)

    def rows(self) -> list[tuple[list[list[int]], list[list[int]]]]:
        """Prompts without padding, responses up to it."""
        rows = []
        for ids, n, _ in self.calls:
            responses = [[*row, 0] for row in ids[:, n:].tolist()]
            rows.append(
                (
                    [[token for token in row if token] for row in ids[:, :n].tolist()],
                    [row[: row.index(0)] for row in responses],
                )
            )
        return rows

    def texts(self) -> list[tuple[list[str], list[str]]]:
        decode = make_tokenizer().batch_decode
        return [
            (decode(prompts, skip_special_tokens=True), decode(responses, skip_special_tokens=True))
            for prompts, responses in self.rows()
        ]


def ppo_with(directory: Path, shaped: nn.Module, **overrides: Any) -> Trainer:
    from ppo import ppo
    from trl.experimental.ppo import PPOTrainer

    plain = ppo(directory, **overrides)
    trainer = PPOTrainer(
        args=plain.args,
        processing_class=plain.processing_class,
        model=plain.policy_model,
        ref_model=plain.ref_model,
        reward_model=shaped,
        value_model=plain.value_model,
        train_dataset=plain.train_dataset,
        eval_dataset=plain.eval_dataset,
    )
    trainer.callback_handler.callbacks = plain.callback_handler.callbacks
    return trainer


@pytest.mark.ppo
@pytest.mark.parametrize("own_backbone", [False, True])
def test_ppo_receives_inner_reward_minus_penalty(
    own_backbone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = reward_model()
    reads = scorer(model if own_backbone else None)
    shaped = ShapedRewardModel(model, reads, FLAGS, FixedPenalty(0.5, clip=0.5))
    received = Received(monkeypatch, shaped)
    trainer = ppo_with(tmp_path, shaped)
    forwards: list[int] = []
    reads.point.decoder.layers[0].register_forward_hook(lambda *_: forwards.append(1))  # type: ignore[union-attr, index]
    trainer.train()
    if own_backbone:
        assert len(forwards) == len(received.calls)
    plain, fresh = reward_model(), scorer(reward_model() if own_backbone else None)
    logged = [entry for entry in trainer.state.log_history if "objective/scores" in entry]
    assert len(received.calls) == len(logged) == 4
    clipped = 0
    for (ids, n, got), (texts, completions), entry in zip(
        received.calls, received.rows(), logged, strict=True
    ):
        inner = received.original(plain, ids, 0, n)[1].detach()
        off = 0.5 * weighted(fresh.score_ids(texts, completions, [3, 50]))
        clipped += int((off.abs() > 0.5).sum())
        torch.testing.assert_close(got, inner - off.clamp(-0.5, 0.5).float(), rtol=1e-5, atol=1e-5)
        assert float(off.abs().max()) > 0.1
        assert entry["objective/scores"] == pytest.approx(float(got.mean()), abs=1e-5)
        assert entry["shaping/reward"] == pytest.approx(float(inner.mean()), abs=1e-5)
        assert entry["shaping/penalty"] == pytest.approx(float(off.clamp(-0.5, 0.5).mean()), abs=1e-5)
        assert {"shaping/flattery/score", "shaping/length/coefficient"} <= entry.keys()
    assert clipped > 0
    assert "log" not in vars(trainer)


@pytest.mark.ppo
def test_ppo_reads_the_same_reward_where_the_response_ended_early(tmp_path: Path) -> None:
    from trl.experimental.utils import get_reward

    tokenizer = make_tokenizer()
    shaped = ShapedRewardModel(reward_model(), scorer(), FLAGS, 0.5)
    ids = torch.tensor(
        [
            [0, 0, 9, 10, 20, 21, tokenizer.eos_token_id, 0],
            [5, 6, 7, 8, 30, 31, 32, 33],
            [0, 5, 6, 7, 2, 0, 0, 0],
        ]
    )
    _, got, _ = get_reward(shaped, ids, 0, 4)
    _, inner, _ = get_reward(reward_model(), ids, 0, 4)
    off = 0.5 * weighted(
        scorer().score_ids([[9, 10], [5, 6, 7, 8], [5, 6, 7]], [[20, 21], [30, 31, 32, 33], []], [3, 50])
    )
    torch.testing.assert_close(got, inner - off.float(), rtol=1e-5, atol=1e-5)
    assert off[2] == 0
    assert float(off[:2].abs().min()) > 0
    assert shaped.shaper.penalty.state_dict()["pending"] is None  # asked by hand: nothing moves


@pytest.mark.ppo
def test_adaptive_coefficients_follow_their_rule_in_ppo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def penalty() -> AdaptivePenalty:
        return AdaptivePenalty(target=-1.0, proportional=0.3)

    shaped = ShapedRewardModel(reward_model(), scorer(), FLAGS, penalty())
    received = Received(monkeypatch, shaped)
    trainer = ppo_with(
        tmp_path, shaped, num_sample_generations=1, per_device_eval_batch_size=2, total_episodes=12
    )
    trainer.train()
    by_hand = penalty()
    by_hand.bind(list(FLAGS))
    training = [index for index, (ids, _, _) in enumerate(received.calls) if len(ids) == 4]
    assert len(training) == 3
    assert len(received.calls) == 4  # one of them for the table of samples
    largest = 0.0
    for index in training:
        (ids, n, got), (texts, completions) = received.calls[index], received.rows()[index]
        _, inner, _ = received.original(reward_model(), ids, 0, n)
        scores = scorer().score_ids(texts, completions, [3, 50]).double() * SIGNS
        by_hand.begin_batch()
        off = by_hand(scores)
        by_hand.end_batch(scores, inner.detach())
        torch.testing.assert_close(got, inner.detach() - off.float(), rtol=1e-4, atol=1e-4)
        largest = max(largest, float(off.abs().max()))
    assert largest > 0


@pytest.mark.ppo
def test_any_function_can_be_ppos_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        asked.append({"prompts": prompts, "completions": completions, **kwargs})
        return reward_by_length(completions)

    tokenizer = make_tokenizer()
    shaped = ShapedRewardModel(reward, tokenizer=tokenizer)
    received = Received(monkeypatch, shaped)
    ppo_with(tmp_path, shaped).train()
    assert len(asked) == len(received.calls) == 4
    for (_, _, got), (texts, completions), call in zip(received.calls, received.texts(), asked, strict=True):
        assert call["prompts"] == texts
        assert call["completions"] == completions
        assert tokenizer.batch_decode(call["completion_ids"], skip_special_tokens=True) == completions
        assert got.tolist() == pytest.approx(reward_by_length(completions))
        assert len({*got.tolist()}) > 1


@pytest.mark.ppo
def test_an_async_function_is_shaped_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def judge(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
        return reward_by_length(completions)

    shaped = ShapedRewardModel(judge, scorer(), FLAGS, 0.5)
    received = Received(monkeypatch, shaped)
    ppo_with(tmp_path, shaped, total_episodes=4).train()
    ((_, _, got),) = received.calls
    ((_, completions),) = received.texts()
    off = 0.5 * weighted(scorer().score_ids(*received.rows()[0], [3, 50]))
    assert got.tolist() == pytest.approx(
        (torch.tensor(reward_by_length(completions)) - off).tolist(), abs=1e-5
    )


def other_tokenizer() -> Any:
    """The same words under other numbers."""
    tokenizer = make_tokenizer()
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *reversed(WORDS)])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        chat_template=tokenizer.chat_template,
    )


@pytest.mark.ppo
def test_a_reward_model_and_a_scorer_with_other_tokenizers() -> None:
    from trl.experimental.utils import get_reward

    tokenizer, other = make_tokenizer(), other_tokenizer()
    model = reward_model()
    reads = FeatureScorer(make_model(tokenizer, seed=5), other, make_dictionary())
    shaped = ShapedRewardModel(model, reads, FLAGS, 0.5, tokenizer=tokenizer, reward_tokenizer=other)
    ids = torch.tensor([[0, 0, 9, 10, 20, 21], [5, 6, 7, 8, 30, 31]])
    _, got, _ = get_reward(shaped, ids, 0, 4)

    before = ["w5 w6", "w1 w2 w3 w4"]
    after = ["w16 w17", "w26 w27"]
    assert tokenizer.batch_decode(ids[:, 4:]) == after
    with torch.no_grad():
        inner = torch.cat(
            [
                model(torch.tensor([other(a + b)["input_ids"]])).logits[0]
                for a, b in zip(before, after, strict=True)
            ]
        )
    off = 0.5 * weighted(reads.score(before, after, [3, 50]))
    torch.testing.assert_close(got, inner - off.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.ppo
def test_ppo_with_attribution_and_shaping_leaves_nothing_behind(tmp_path: Path) -> None:
    shaped = ShapedRewardModel(reward_model(), scorer(), FLAGS, 0.5)
    trainer = ppo_with(tmp_path, shaped)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    trainer.train()
    assert {"shaping/penalty", "sae/grad_norm"} <= trainer.state.log_history[0].keys()
    assert "log" not in vars(trainer)


@pytest.mark.ppo
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_ppo_stops_at_a_reward_that_is_not_finite(bad: float, tmp_path: Path) -> None:
    model = reward_model()
    with torch.no_grad():
        model.score.weight.fill_(bad)
    with pytest.raises(AuditError, match="Reward 0 of"):
        ppo_with(tmp_path, ShapedRewardModel(model, scorer(), FLAGS, 0.5)).train()


@pytest.mark.ppo
def test_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shaped = ShapedRewardModel(reward_model().bfloat16(), scorer(), FLAGS, 0.5)
    received = Received(monkeypatch, shaped)
    ppo_with(tmp_path, shaped, dtype=torch.bfloat16, total_episodes=4).train()
    ((ids, n, got),) = received.calls
    _, inner, _ = received.original(reward_model().bfloat16(), ids, 0, n)
    off = 0.5 * weighted(scorer().score_ids(*received.rows()[0], [3, 50]))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, (inner.detach().float() - off.float()).bfloat16())


def policy_gradient(kind: str, directory: Path, shaped: nn.Module) -> Trainer:
    from trainers import arguments
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
    (tmp_path / "shaping.json").write_text('{"version": 9}')
    with pytest.raises(AuditError, match="version 9"):
        ShapedRewardModel.from_pretrained(tmp_path, uncalibrated)
    (tmp_path / "shaping.json").write_text("{")
    with pytest.raises(AuditError, match="cannot be read"):
        ShapedRewardModel.from_pretrained(tmp_path, uncalibrated)


def adapted(seed: int = 0) -> Any:
    """The reward model with a LoRA that changes its rewards."""
    torch.manual_seed(seed)
    adapter = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False
    )
    return get_peft_model(reward_model(), adapter)


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


@pytest.mark.ppo
@pytest.mark.parametrize("own_backbone", [False, True])
def test_ppo_receives_the_rewards_of_the_adapted_model(
    own_backbone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted()
    shaped = ShapedRewardModel(
        model, scorer(model if own_backbone else None), FLAGS, FixedPenalty(0.5), tokenizer=make_tokenizer()
    )
    received = Received(monkeypatch, shaped)
    ppo_with(tmp_path, shaped).train()
    merged = adapted().merge_and_unload()
    fresh = scorer(merged if own_backbone else None)
    assert received.calls
    for (ids, n, got), (texts, completions) in zip(received.calls, received.rows(), strict=True):
        _, inner, _ = received.original(merged, ids, 0, n)
        off = 0.5 * weighted(fresh.score_ids(texts, completions, [3, 50]))
        torch.testing.assert_close(got, inner.detach() - off.float(), rtol=1e-3, atol=1e-3)


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
