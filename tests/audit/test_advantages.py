"""Advantages, against those that TRL's GRPOTrainer computes of the same rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.rewards import PROTOCOLS, data, trainer_of

from trl_sae_audit import AuditError
from trl_sae_audit.audit.advantages import AdvantageRule, advantages
from trl_sae_audit.audit.policy_gradient import advantage_rule, sampling_of
from trl_sae_audit.models.rewards import Rewards


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize(
    "name",
    [
        "a function of texts",
        "None for some",
        "None for all",
        pytest.param("several with weights", marks=pytest.mark.newest),  # TRL 1.12 awaits functions alone
    ],
)
def test_those_of_trl(name: str, scale: Any, aggregation: Any, tmp_path: Path) -> None:
    protocol = PROTOCOLS[name]
    trainer = trainer_of(
        protocol,
        tmp_path,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        max_completion_length=8,
    )
    seen: list[torch.Tensor] = []
    ask = trainer._calculate_rewards

    def asked(*given: Any) -> torch.Tensor:
        seen.append(ask(*given))
        return seen[-1]

    trainer._calculate_rewards = asked  # type: ignore[method-assign]
    rows = list(data(protocol.conversational, n=2))
    made = trainer._generate_and_score_completions([row for row in rows for _ in range(4)])
    rule = advantage_rule(trainer.args)
    assert rule == AdvantageRule(scale, aggregation)
    weights = Rewards(protocol.rewards(), weights=protocol.weights).weights
    found = advantages(seen[0], weights, torch.tensor([0] * 4 + [1] * 4), rule)
    torch.testing.assert_close(found.float(), made["advantages"], rtol=1e-4, atol=1e-5)
    assert bool(found.any()) == (name != "None for all")
    assert sampling_of(trainer.args).answers == 4


def test_groups_of_different_size_and_order() -> None:
    rewards, groups = np.array([1.0, 5.0, 2.0, 4.0, 7.0, 9.0]), np.array([0, 1, 0, 1, 0, 2])
    expected = np.zeros(6)
    for group in (0, 1, 2):
        own = rewards[groups == group]
        expected[groups == group] = (own - own.mean()) / (own.std(ddof=1) + 1e-4) if len(own) > 1 else 0.0
    values = torch.tensor(rewards)[:, None]
    found = advantages(values, torch.ones(1), torch.tensor(groups), AdvantageRule())
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_where_every_prompt_has_one_answer_all_are_one_group() -> None:
    rewards = torch.tensor([[1.0], [3.0], [8.0]])
    found = advantages(rewards, torch.ones(1), torch.arange(3), AdvantageRule("none"))
    assert found.tolist() == [-3.0, -1.0, 4.0]


def test_unknown_words() -> None:
    with pytest.raises(AuditError, match="scale_rewards is 'row'; choose one of group, batch, none"):
        AdvantageRule("row")  # type: ignore[arg-type]
