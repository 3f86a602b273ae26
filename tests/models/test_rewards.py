"""Rewards, against TRL's own call of them."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rewards import PROTOCOLS, answered, asked_by_trl, awaited, by_length, reward_model, trainer_of
from helpers.worlds import make_reward_model, make_tokenizer, save_model

from trl_sae_audit import AuditError
from trl_sae_audit.models.event_loop import wait_for
from trl_sae_audit.models.rewards import Rewards, load_reward


def identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    return torch.equal(first.nan_to_num(-9e9), second.nan_to_num(-9e9))


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_as_trl_calls_it(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    protocol, rows = PROTOCOLS[name], answered(PROTOCOLS[name].conversational)
    trainer = trainer_of(protocol, tmp_path)
    tokenizers = None if protocol.tokenizers is None else protocol.tokenizers()
    ours = Rewards(protocol.rewards(), tokenizers, protocol.weights)
    expected = asked_by_trl(trainer, rows)
    assert identical(ours(rows), expected)
    assert ours.names == trainer.reward_func_names
    assert torch.equal(ours.weights, trainer.reward_weights)
    assert expected.shape == (16, len(protocol.rewards()))
    assert bool(expected.isnan().all()) == (name == "None for all")


def test_a_weighted_sum_leaves_out_what_was_not_judged() -> None:
    rewards = Rewards([by_length, by_length], weights=[2.0, -1.0])
    values = torch.tensor([[1.0, 3.0], [torch.nan, 3.0], [torch.nan, torch.nan]])
    assert identical(rewards.combine(values), torch.tensor([-1.0, -3.0, torch.nan]))


def test_padding_is_left_as_it_was() -> None:
    model, tokenizer = reward_model(padded=False, pad=False)
    Rewards(model, tokenizer)(answered(False))
    assert model.config.pad_token_id is None
    assert tokenizer.pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(AuditError, match=r"set tokenizer\.pad_token"):
        Rewards(model, tokenizer)(answered(False))


def test_a_model_in_small_batches_is_the_same() -> None:
    model, tokenizer = reward_model()
    model.train()
    whole, parts = (Rewards(model, tokenizer, batch_size=size)(answered(False)) for size in (None, 3))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)
    assert model.training


def test_async_rewards_run_at_the_same_time() -> None:
    together = []

    def waits(number: int) -> Any:
        async def reward(completions: list[str], **columns: Any) -> list[float]:
            together.append(number)
            while len(together) < 3:
                await asyncio.sleep(0.001)
            return [float(number)] * len(completions)

        return reward

    found = Rewards([waits(1), waits(2), waits(3)])(answered(False))
    assert found[0].tolist() == [1.0, 2.0, 3.0]


def test_inside_a_running_event_loop_as_in_a_notebook() -> None:
    expected = Rewards(by_length)(answered(False))

    async def cell() -> torch.Tensor:
        return Rewards(awaited)(answered(False))

    assert torch.equal(asyncio.run(cell()), expected)

    async def nested(
        **keywords: Any,
    ) -> list[float]:  # an async reward that asks another one without awaiting it
        return Rewards(awaited)(answered(False))[:, 0].tolist()

    assert torch.equal(Rewards(nested)(answered(False)), expected)


def test_one_loop_for_all_calls_and_errors_come_through() -> None:
    async def loop() -> Any:
        return asyncio.get_running_loop()

    async def broken() -> None:
        raise ZeroDivisionError("the judge")

    before = threading.active_count()
    assert wait_for(loop()) is wait_for(loop())
    assert wait_for(3) == 3
    with pytest.raises(ZeroDivisionError, match="the judge"):
        wait_for(broken())
    assert threading.active_count() <= before + 1


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        ([1.0], "1 rewards for 16 responses"),
        ([float("nan")] * 16, "Reward 0 of 'reward' is nan; return None"),
        ([float("inf")] * 16, "is inf"),
        (1.0, "returned a float"),
        ([[1.0, 2.0]] * 16, "is a list"),
    ],
)
def test_refused_returns(returned: Any, match: str) -> None:
    def reward(completions: list[str], **columns: Any) -> Any:
        return returned

    async def later(completions: list[str], **columns: Any) -> Any:
        return returned

    later.__name__ = "reward"
    for each in (reward, later):
        with pytest.raises(AuditError, match=match):
            Rewards(each)(answered(False))


def test_refusals() -> None:
    with pytest.raises(AuditError, match=r"cannot be called as TRL's trainers call it .*take \*\*kwargs"):
        Rewards(lambda prompts, completions: [0.0] * len(prompts))(answered(False))
    with pytest.raises(AuditError, match="column 'prompts'"):
        Rewards(by_length)([{**row, "prompts": "w1"} for row in answered(False)])
    with pytest.raises(AuditError, match="2 rewards and 1 weights"):
        Rewards([by_length, awaited], weights=[1.0])
    with pytest.raises(AuditError, match="no reward"):
        Rewards([])
    with pytest.raises(AuditError, match="pass a function or a reward model"):
        Rewards(3)  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="reward_tokenizer="):
        Rewards(make_reward_model(make_tokenizer()))
    model, tokenizer = reward_model()
    model.config.num_labels = 2
    with pytest.raises(AuditError, match="2 labels"):
        Rewards(model, tokenizer)
    model.config.num_labels = 1
    with pytest.raises(AuditError, match=r"tokenizer of reward model 'org/judge' cannot be loaded"):
        Rewards(model)


def test_a_reward_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "def brief(completions, **columns):\n    return [-float(len(c)) for c in completions]\n"
        "class Scale:\n    @staticmethod\n    def up(completions, **columns):\n        return [1.0] * len(completions)\n"
        "limit = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    rows = answered(False)
    assert Rewards("my_rewards:brief")(rows)[:, 0].tolist() == [-len(row["completion"]) for row in rows]
    assert Rewards("my_rewards:Scale.up").names == ["up"]
    for name, match in {
        "my_rewards:long": "has no 'long'",
        "my_rewards:limit": "is a int; name a function",
        "no_such_module:brief": "cannot be imported",
        "./nowhere": "reward model './nowhere' cannot be loaded",
    }.items():
        with pytest.raises(AuditError, match=match):
            load_reward(name)
    model, tokenizer = reward_model()
    save_model(model, tokenizer, tmp_path / "judge")
    assert torch.equal(Rewards(str(tmp_path / "judge"))(rows), Rewards(model, tokenizer)(rows))


def test_a_language_model_is_no_reward_model(workspace: Path) -> None:
    with pytest.raises(AuditError, match=r"lack 1 of its weights, such as 'score\.weight'"):
        load_reward(str(workspace / "model"))
