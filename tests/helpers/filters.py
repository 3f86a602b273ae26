"""Flags of the tiny dictionary."""

from __future__ import annotations

from trl_sae_audit import Flag, FlagSet

FLAGS = FlagSet(
    [Flag("tiny", 11, "sycophancy", "a test", 1.0), Flag("tiny", 40, "verbosity", "", 0.5, "down")]
)
