"""Which tests belong to this environment, and the settings and parts that many of them share.

Two environments run the tests: one with the newest TRL, one with the last that has PPO. A test marked `ppo` or
`newest` belongs to one of them and is deselected, not skipped, in the other. What is not marked runs in both where its folder
is in WITH_TRL, and otherwise in the first alone.

A third, with the oldest versions, runs the files that the Makefile names.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Before any library is imported, and inherited by the processes that tests start.
os.environ.update(
    {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRACKIO_DIR": str(Path(tempfile.gettempdir()) / f"trackio-{os.getpid()}"),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "WANDB_MODE": "disabled",
    }
)

import numpy as np
import pytest
import torch
from helpers import worlds
from packaging.version import Version
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trl_sae_audit import FeatureDictionary

torch.set_num_threads(1)

TRL = Version(version("trl"))
ELSEWHERE = "ppo" if Version("1.13") <= TRL else "newest"
"""The mark of the tests that run in the other environment."""

WITH_TRL = ("audit", "callbacks", "cli", "e2e", "shaping", "trainers", "verification")
"""Folders of tests that run in both environments: what they test touches TRL. The others run in the first alone."""


def pytest_configure(config: pytest.Config) -> None:
    for known in (
        "ignore:The 'utils' module has been deprecated:DeprecationWarning:sae_lens",
        "ignore:.*is deprecated and will be removed in v6:FutureWarning:transformers",
    ):
        config.addinivalue_line("filterwarnings", known)


def pytest_report_header() -> str:
    has = "no PPO" if ELSEWHERE == "ppo" else "with PPO"
    return (
        f"environment: TRL {TRL} ({has}; tests marked {ELSEWHERE!r} run in the other environment), "
        f"transformers {version('transformers')}, torch {torch.__version__}, sae-lens {version('sae-lens')}"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    elsewhere = [item for item in items if _runs_elsewhere(item)]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not _runs_elsewhere(item)]
    for mark, missing, present in (
        ("gpu", "no CUDA device", torch.cuda.is_available()),
        ("deepspeed", "pip install deepspeed", importlib.util.find_spec("deepspeed") is not None),
        (
            "browser",
            "no Chromium: apt-get install chromium, or put a chromium or google-chrome on the PATH",
            _chromium() is not None,
        ),
        (
            "smollm",
            "make a copy with scripts/smollm.py, and name its directory in SMOLLM_MODEL",
            "SMOLLM_MODEL" in os.environ,
        ),
    ):
        if not present:
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=missing))


def _chromium() -> str | None:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return worlds.make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return worlds.make_model(tokenizer)


@pytest.fixture(scope="module")
def dictionary() -> FeatureDictionary:
    return worlds.make_dictionary()


@pytest.fixture(scope="module")
def workspace(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A directory as a user of the commands has one: model, sae and pairs.jsonl."""
    directory = tmp_path_factory.mktemp("workspace")
    worlds.save_model(model, tokenizer, directory / "model")
    worlds.save_sae(directory / "sae")
    worlds.pairs(20).to_json(directory / "pairs.jsonl")
    return directory


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; tests marked `browser` are skipped where there is none."""
    path = _chromium()
    assert path is not None
    return path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Tests of the first environment are not even imported in the other, which lacks what some of them need."""
    if ELSEWHERE != "newest" or not collection_path.name.startswith("test_"):
        return None
    folder = collection_path.relative_to(Path(__file__).parent).parts[0]
    return None if folder in WITH_TRL else True


def _runs_elsewhere(item: pytest.Item) -> bool:
    return item.get_closest_marker(ELSEWHERE) is not None
