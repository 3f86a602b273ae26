"""Whatever kills a writer, at whatever byte or file operation, what is there afterwards is the old content or the new.

The process is killed by the kernel in the middle of a write (RLIMIT_FSIZE, whose signal nothing in Python sees), or at
every operation on files in turn; and where the kernel only refuses the write, as a full disk does, the writer says one
sentence and leaves nothing behind.
"""

from __future__ import annotations

import faulthandler
import functools
import itertools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import report_sources
from helpers.worlds import make_dictionary, make_model, make_reward_model, make_tokenizer, pairs

from trl_sae_audit import (
    Audit,
    AuditError,
    FeatureScorer,
    FixedPenalty,
    Flag,
    FlagSet,
    ShapedRewardModel,
    audit_preferences,
    filter_preferences,
)
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.audit.evidence_files import Evidence, read_evidence, write_evidence
from trl_sae_audit.filtering.api import FilterResult
from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.record.checkpoint import CallbackState
from trl_sae_audit.report import write_report
from trl_sae_audit.report.filtered import read_filtered
from trl_sae_audit.report.verified import read_verified
from trl_sae_audit.verification.comparison import Verification, save_verifications, verify
from trl_sae_audit.verification.measured import AnswerActivations, MeasuredChange

OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
READ_BACK = (1, 2)


@dataclass
class Writer:
    """How to write version 1 or 2 of something into a directory, and which version is there.

    `read` gives None where nothing is there, which only a writer of several files may leave (`gap`), and raises
    for anything that is neither version. `refused` is what it raises where the kernel refuses a write: one sentence,
    or an error that the callback turns into one in the log.
    """

    write: Callable[[Path, int], Any]
    read: Callable[[Path], int | None]
    gap: bool = False
    refused: type[Exception] = AuditError


def flag_set(version: int) -> FlagSet:
    return FlagSet([Flag("tiny", version, f"behaviour {version}", "x" * 2000)])


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("parts")
    tokenizer = make_tokenizer()
    model, dictionary = make_model(tokenizer), make_dictionary()
    scorers = [FeatureScorer(model, tokenizer, dictionary) for _ in READ_BACK]
    for index, scorer in enumerate(scorers):
        scorer.calibrate([(f"w{i} ", f"w{i + index}") for i in range(10)])
    data = pairs(20)
    audit = audit_preferences(
        model, tokenizer, data, dictionary, output_dir=root / "audit", lookahead=None, progress=False
    )
    records = [
        report_sources.make_record(root / f"record {version}", report_sources.make_dictionary(), seed=version)
        for version in READ_BACK
    ]
    return {
        "audit": audit,
        "data": data,
        "dictionary": dictionary,
        "records": records,
        "reward_model": make_reward_model(tokenizer),
        "scorers": scorers,
        "tokenizer": tokenizer,
    }


def writers(parts: dict[str, Any]) -> dict[str, Writer]:
    """All that this package writes for later, but the run record, whose own tests kill it everywhere."""

    @functools.cache
    def filtered(version: int) -> FilterResult:
        flags = FlagSet([Flag("tiny", 11, "flattery")])
        return filter_preferences(parts["data"], parts["audit"], flags, budget=2 + version)

    @functools.cache
    def shaped(version: int) -> ShapedRewardModel:
        model, scorer = parts["reward_model"], parts["scorers"][version - 1]
        return ShapedRewardModel(
            model, scorer, flag_set(version), FixedPenalty(float(version)), tokenizer=parts["tokenizer"]
        )

    def read_scorer(path: Path) -> int | None:
        found = FeatureScorer(parts["scorers"][0].model, parts["tokenizer"], parts["dictionary"]).load(path)
        return next(
            version for version in READ_BACK if torch.equal(found.mean, parts["scorers"][version - 1].mean)
        )

    def read_shaped(directory: Path) -> int | None:
        if not (directory / "manifest.json").exists():
            return None
        scorer = FeatureScorer(parts["scorers"][0].model, parts["tokenizer"], parts["dictionary"])
        found = ShapedRewardModel.from_pretrained(directory, scorer, tokenizer=parts["tokenizer"])
        version = int(
            json.loads((directory / "manifest.json").read_text())["config"]["settings"]["coefficient"]
        )
        assert found.shaper.flags[0].feature == version
        assert torch.equal(scorer.mean, parts["scorers"][version - 1].mean)
        return version

    def totals(version: int) -> CallbackState:
        each = FeatureTotals(parts["dictionary"].d_sae)
        for _ in range(version):
            each.update(*[np.ones((1, each.n_features), np.float32)] * 5)
        return CallbackState(version, {"tiny": each}, {"tiny": torch.ones(2)}, "record")

    def write_state(directory: Path, version: int) -> None:
        (directory / MANIFEST).unlink(missing_ok=True)
        totals(version).save(directory, [parts["dictionary"]])

    def read_state(directory: Path) -> int | None:
        if not (directory / MANIFEST).exists():
            return None
        state = CallbackState.load(directory, [parts["dictionary"]])
        assert state.totals["tiny"].steps == state.step
        return state.step

    def verification(version: int) -> list[Verification]:
        generator = np.random.default_rng(version)
        names, seen = tuple(map(str, range(8))), np.ones(30, bool)
        halves = [
            AnswerActivations(generator.random((8, 30), np.float32), np.full(8, 3), names, seen)
            for _ in range(2)
        ]
        return [verify({"one": generator.random(30)}, MeasuredChange("on given text", *halves), draws=5)]

    verifications = {version: verification(version) for version in READ_BACK}

    def read_verification(directory: Path) -> int | None:
        if not (directory / "manifest.json").exists():
            return None
        read_verified(directory)
        stored = pd.read_parquet(directory / "verify.parquet")["measured"]
        return next(v for v in READ_BACK if np.allclose(stored, verifications[v][0].features["measured"]))

    def read_report(path: Path) -> int | None:
        page = path.read_text()
        assert page.rstrip().endswith("</html>")
        return next(version for version in READ_BACK if f"report {version}" in page)

    def evidence(version: int) -> list[Evidence]:
        return [
            report_sources.make_evidence(report_sources.make_dictionary(), feature)
            for feature in range(1, version + 1)
        ]

    return {
        "flags": Writer(lambda d, v: flag_set(v).save(d / "x"), lambda d: FlagSet.load(d / "x")[0].feature),
        "audit": Writer(
            lambda d, v: parts["audit"].save(d / f"audit {v}"),
            lambda d: (
                max(v for v in READ_BACK if len(Audit.load(d / f"audit {v}")) == 20)
                if (d / "audit 2").exists()
                else 1
            ),
        ),
        "filter": Writer(
            lambda d, v: filtered(v).save(d / "x", format="jsonl", overwrite=True),
            lambda d: read_filter(d / "x"),
            gap=True,
        ),
        "report": Writer(
            lambda d, v: write_report(parts["records"][v - 1], d / "x.html", title=f"report {v}"),
            lambda d: read_report(d / "x.html"),
        ),
        "verify": Writer(
            lambda d, v: save_verifications(verifications[v], d / "x", {}),
            lambda d: read_verification(d / "x"),
            gap=True,
        ),
        "outcomes": Writer(
            lambda d, v: write_outcomes(d, [Outcome("agreement", float(v))]),
            lambda d: int(read_outcomes(d)[0].estimate),
        ),
        "evidence": Writer(lambda d, v: write_evidence(d, evidence(v)), lambda d: len(read_evidence(d))),
        "calibration": Writer(
            lambda d, v: parts["scorers"][v - 1].save(d / "x"), lambda d: read_scorer(d / "x")
        ),
        "shaped reward": Writer(
            lambda d, v: shaped(v).save_pretrained(d / "x"), lambda d: read_shaped(d / "x"), gap=True
        ),
        "checkpoint": Writer(
            lambda d, v: write_state(d / "x", v), lambda d: read_state(d / "x"), gap=True, refused=OSError
        ),
    }


def read_filter(directory: Path) -> int | None:
    if not directory.exists():
        return None
    read_filtered(directory)
    kept = (directory / "kept.jsonl").read_text().splitlines()
    dropped = (directory / "dropped.jsonl").read_text().splitlines()
    assert len(kept) + len(dropped) == 20
    return len(dropped) - 2


NAMES = [
    "flags",
    "audit",
    "filter",
    "report",
    "verify",
    "outcomes",
    "evidence",
    "calibration",
    "shaped reward",
    "checkpoint",
]


def in_child(work: Callable[[], Any], refused: type[Exception] = AuditError) -> int:
    """The exit code of a forked child that does `work`, negative if a signal ended it; 3 if it raised `refused`."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            faulthandler.dump_traceback_later(120, exit=True)
            work()
            code = 0
        except refused as error:
            code = 3 if len(str(error)) > 40 or refused is OSError else 4
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def limited(size: int, write: Callable[[], Any], *, deadly: bool) -> None:
    """`write`, in a process whose files cannot grow beyond `size` bytes: it dies of it, or is refused."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    write()


def dying(at: int, directory: Path, write: Callable[[], Any]) -> None:
    """`write`, killed at its `at`-th operation on files below `directory`."""
    left = at

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in OPERATIONS and str(directory) in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    write()


def copies(root: Path, writer: Writer) -> Iterator[Path]:
    """Directories that each hold version 1."""
    template = root / "template"
    template.mkdir()
    writer.write(template, 1)
    assert writer.read(template) == 1
    for number in itertools.count():
        yield Path(shutil.copytree(template, root / str(number)))


@pytest.mark.parametrize("name", NAMES)
def test_old_or_new(name: str, parts: dict[str, Any], tmp_path: Path) -> None:
    writer = writers(parts)[name]
    fresh = copies(tmp_path, writer)
    directory = next(fresh)
    writer.write(directory, 2)
    assert writer.read(directory) == 2
    largest = max(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    outcomes = []
    for size in (0, 1, largest // 2, largest - 1):
        directory = next(fresh)
        code = in_child(
            functools.partial(limited, size, functools.partial(writer.write, directory, 2), deadly=True)
        )
        assert code == -signal.SIGXFSZ
        outcomes.append(writer.read(directory))
    for size in (1, largest - 1):
        directory = next(fresh)
        code = in_child(
            functools.partial(limited, size, functools.partial(writer.write, directory, 2), deadly=False),
            writer.refused,
        )
        assert code == 3, "a write that is refused ends in one sentence"
        assert not list(directory.rglob("*.tmp")), "room is what is wanting"
        outcomes.append(writer.read(directory))
    for at in range(1, 200):
        directory = next(fresh)
        code = in_child(
            functools.partial(dying, at, directory, functools.partial(writer.write, directory, 2))
        )
        outcomes.append(writer.read(directory))
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes[-1] == 2
    assert writer.gap or outcomes.count(1) >= 3
    assert set(outcomes) <= ({1, 2, None} if writer.gap else {1, 2}), outcomes
