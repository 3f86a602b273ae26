"""Activations are mixed, used once an epoch, and the same with the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trl_sae_audit import AuditError
from trl_sae_audit.saes.activation_buffer import ActivationBuffer


class TestActivationBuffer:
    def buffer(self, tmp_path: Path, rows: int, capacity: int, batch: int = 8) -> ActivationBuffer:
        def source() -> Iterator[Tensor]:
            yield from torch.arange(rows, dtype=torch.float32)[:, None].expand(rows, 2).split(7)

        return ActivationBuffer(source, capacity, 2, batch, tmp_path / "store", seed=0)

    def test_a_source_that_fits_is_used_once_an_epoch(self, tmp_path: Path) -> None:
        buffer = self.buffer(tmp_path, rows=32, capacity=100)
        assert buffer.complete
        for _ in range(3):
            epoch = torch.cat([next(buffer)[:, 0] for _ in range(4)])
            assert sorted(epoch.tolist()) == list(range(32))
        assert epoch.tolist() != sorted(epoch.tolist())

    def test_a_larger_source_is_seen_whole_and_mixed(self, tmp_path: Path) -> None:
        buffer = self.buffer(tmp_path, rows=200, capacity=64)
        assert not buffer.complete
        seen = torch.cat([next(buffer)[:, 0] for _ in range(100)])
        counts = torch.bincount(seen.long(), minlength=200)
        assert len(seen) == 800
        assert int((counts > 0).sum()) >= 190
        assert int(counts.max()) <= 8
        assert buffer.rows.shape == (64, 2)

    def test_same_seed_same_batches(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        one, other = (self.buffer(tmp_path / name, rows=50, capacity=30) for name in "ab")
        assert all(torch.equal(next(one), next(other)) for _ in range(30))

    def test_too_few_rows(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="give only 5 activations, fewer than one batch of 8"):
            self.buffer(tmp_path, rows=5, capacity=30)

    def test_not_finite(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="not finite on these texts"):
            ActivationBuffer(lambda: iter([torch.full((9, 2), math.inf)]), 20, 2, 4, tmp_path / "s", seed=0)
