"""What penalties share, and the fixed one: the formula, the reward's spread, states, processes, and what is refused."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import multiprocessing

from trl_sae_audit import AdaptivePenalty, AuditError, FixedPenalty, Flag
from trl_sae_audit.shaping.penalties import Penalty
from trl_sae_audit.shaping.shaper import penalty_from_settings

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

FLAGS = [Flag("tiny", 3, "flattery"), Flag("tiny", 7, "length", weight=2.0)]
SCORES = torch.tensor([[1.0, -0.5], [6.0, 2.0], [-3.0, 0.25]])
REWARDS = torch.tensor([0.5, 2.5, -1.5])


def bound(penalty: Penalty) -> Penalty:
    penalty.bind(FLAGS)
    return penalty


def batch(penalty: Penalty, scores: torch.Tensor = SCORES, rewards: torch.Tensor = REWARDS) -> list[float]:
    penalty.begin_batch()
    off = penalty(scores)
    penalty.end_batch(scores, rewards)
    return off.tolist()


def test_fixed_penalty_is_its_formula() -> None:
    assert batch(bound(FixedPenalty(0.5))) == pytest.approx([0.0, 5.0, -1.25], abs=1e-12)
    assert batch(bound(FixedPenalty(0.5, clip=2.0))) == pytest.approx([0.0, 2.0, -1.25], abs=1e-12)
    assert batch(bound(FixedPenalty(-0.5, allow_negative=True))) == pytest.approx([0.0, -5.0, 1.25])


def test_fixed_penalty_warms_up() -> None:
    penalty = bound(FixedPenalty(1.0, warmup=2))
    assert [batch(penalty)[1] for _ in range(4)] == pytest.approx([0.0, 5.0, 10.0, 10.0])


def test_a_relative_penalty_follows_the_spread_of_the_rewards() -> None:
    penalty = bound(FixedPenalty(0.5, relative=True, clip=3.0))
    spread = float(np.std(REWARDS.double().numpy()))
    assert batch(penalty)[1] == 0.0
    assert batch(penalty)[1] == pytest.approx(3.0 * spread)
    assert batch(penalty)[2] == pytest.approx(-1.25 * spread)
    for _ in range(400):
        batch(penalty, rewards=REWARDS * 100)
    assert penalty.spread == pytest.approx(100 * spread, rel=0.05)


def test_the_running_spread_forgets() -> None:
    penalty = bound(FixedPenalty(1.0, decay=0.5))
    history = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    for rewards in history:
        batch(penalty, SCORES[:1].expand(5, 2), rewards)
    penalty.begin_batch()
    weights = np.repeat([0.5 ** (3 - age) for age in range(4)], 5)
    values = torch.cat(history).double().numpy()
    mean = np.average(values, weights=weights)
    assert penalty.spread == pytest.approx(math.sqrt(np.average((values - mean) ** 2, weights=weights)))


@pytest.mark.parametrize("make", [lambda: FixedPenalty(0.5, warmup=5, relative=True), AdaptivePenalty])
def test_the_state_continues_exactly(make: Any) -> None:
    rng = np.random.default_rng(1)
    batches = [(torch.tensor(rng.normal(1, 1, (6, 2))), torch.tensor(rng.normal(0, 2, 6))) for _ in range(8)]
    through, first = bound(make()), bound(make())
    expected = [batch(through, *each) for each in batches]
    got = [batch(first, *each) for each in batches[:4]]
    state = json.loads(json.dumps(first.state_dict()))
    second = bound(penalty_from_settings(state["kind"], json.loads(json.dumps(first.settings()))))
    second.load_state_dict(state)
    got += [batch(second, *each) for each in batches[4:]]
    assert got == expected
    assert expected[5] != expected[4]
    assert second.coefficients() == through.coefficients()


def test_an_unjudged_batch_moves_nothing() -> None:
    penalty = bound(AdaptivePenalty())
    batch(penalty)
    penalty.begin_batch()
    before = penalty.state_dict()
    penalty.end_batch(SCORES[:0], REWARDS[:0])
    penalty.begin_batch()
    assert {**penalty.state_dict(), "batches": 1} == before


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FixedPenalty(-0.1), "allow_negative=True"),
        (lambda: FixedPenalty(math.nan), "finite"),
        (lambda: FixedPenalty(1, warmup=-1), "warmup"),
        (lambda: FixedPenalty(1, clip=0), "clip"),
        (lambda: FixedPenalty(1, decay=0), "decay"),
        (lambda: AdaptivePenalty("policy"), "'reference'"),
        (lambda: AdaptivePenalty(proportional=-1), "proportional"),
        (lambda: AdaptivePenalty(memory=0), "memory"),
        (lambda: AdaptivePenalty(maximum=math.inf), "maximum"),
        (lambda: bound(AdaptivePenalty({"flattery": 0.0})), "no target"),
        (lambda: bound(AdaptivePenalty({"flattery": 0, "length": 0, "lenght": 0})), "no labels"),
        (lambda: bound(FixedPenalty(1)).bind(FLAGS[:1]), "other flags"),
        (lambda: bound(FixedPenalty(1)).load_state_dict(AdaptivePenalty().state_dict()), "AdaptivePenalty"),
    ],
)
def test_what_cannot_be_meant_is_refused(make: Any, match: str) -> None:
    with pytest.raises(AuditError, match=match):
        make()


def test_coefficients_of_other_flags_are_refused() -> None:
    one = AdaptivePenalty()
    one.bind(FLAGS[:1])
    with pytest.raises(AuditError, match="same flags"):
        bound(AdaptivePenalty()).load_state_dict(one.state_dict())


def _process(rank: int, port: int, directory: str) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", OMP_NUM_THREADS="1"
    )
    torch.distributed.init_process_group("gloo")
    rng = np.random.default_rng(rank)
    penalty = bound(AdaptivePenalty())
    for _ in range(3):
        batch(penalty, torch.tensor(rng.normal(1, 1, (5, 2))), torch.tensor(rng.normal(rank, 2, 5)))
    penalty.begin_batch()
    (Path(directory) / f"{rank}.json").write_text(json.dumps(penalty.state_dict()))
    torch.distributed.destroy_process_group()


@pytest.mark.processes
def test_two_processes_have_the_coefficients_of_their_joint_batch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    states = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert states[0] == states[1]
    generators = [np.random.default_rng(rank) for rank in range(2)]
    joint = bound(AdaptivePenalty())
    for _ in range(3):
        parts = [(rng.normal(1, 1, (5, 2)), rng.normal(rank, 2, 5)) for rank, rng in enumerate(generators)]
        scores, rewards = (torch.tensor(np.concatenate(each)) for each in zip(*parts, strict=True))
        batch(joint, scores, rewards)
    joint.begin_batch()
    assert states[0]["lambdas"] == pytest.approx(joint.state_dict()["lambdas"], rel=1e-9)
    assert max(states[0]["lambdas"]) > 0
    assert states[0]["moments"] == pytest.approx(joint.state_dict()["moments"], rel=1e-12)
