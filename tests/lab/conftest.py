"""The world, built once and then read from its cache; and its language."""

from __future__ import annotations

import pytest

from trl_sae_audit.lab import Language, World, build_world


@pytest.fixture(scope="session")
def world() -> World:
    return build_world(progress=False)


@pytest.fixture(scope="module")
def language() -> Language:
    return Language(seed=0)
