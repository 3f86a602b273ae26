"""A shaped GRPO run in two real processes: one set of coefficients, learned from both, and the right rewards on each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.shaped_worker import FLAGS, scorer
from helpers.worlds import reward_by_length

from trl_sae_audit import AdaptivePenalty

pytestmark = [pytest.mark.newest, pytest.mark.processes]


def test_two_processes_share_their_coefficients(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    paths = [str(tests), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *(str(tests / "helpers" / "shaped_worker.py"), str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    assert ranks[0]["state"] == ranks[1]["state"]
    assert len(ranks[0]["batches"]) == len(ranks[1]["batches"]) == 4
    assert ranks[0]["batches"][0][1] != ranks[1]["batches"][0][1]  # each has its own responses

    joint = AdaptivePenalty(target=-1.0)
    joint.bind(list(FLAGS))
    signs, largest = torch.tensor([1.0, -1.0]), 0.0
    for batches in zip(*(rank["batches"] for rank in ranks), strict=True):
        joint.begin_batch()
        expected = joint.coefficients()
        seen = []
        for prompts, completions, paid, coefficients in batches:
            assert coefficients == pytest.approx(expected, rel=1e-6, abs=1e-12)
            scores = scorer().score(prompts, completions, [3, 50]) * signs
            inner = torch.tensor(reward_by_length(completions), dtype=torch.float64)
            off = joint(scores)
            assert paid == pytest.approx((inner - off).tolist(), abs=1e-4)
            largest = max(largest, float(off.abs().max()))
            seen.append((scores, inner))
        joint.end_batch(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    assert largest > 0.01
    saved = json.loads((tmp_path / "out" / "checkpoint-4" / "sae_shaping.json").read_text())
    assert saved["states"] == [ranks[0]["state"]]
    assert any("shaping/penalty" in entry for entry in ranks[0]["log"])
