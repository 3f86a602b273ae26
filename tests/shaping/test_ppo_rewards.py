"""What PPO receives is the inner reward minus the penalty, recomputed in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.shaped import FLAGS, SIGNS, adapted, reward_model, scorer, weighted
from helpers.worlds import (
    WORDS,
    make_dictionary,
    make_model,
    make_tokenizer,
    reward_by_length,
)
from torch import Tensor, nn
from transformers import Trainer

from trl_sae_audit import (
    AdaptivePenalty,
    AuditError,
    FeatureAttributionCallback,
    FeatureScorer,
    FixedPenalty,
    ShapedRewardModel,
)


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
    from helpers.ppo import ppo
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
