"""Break one file of a valid input, read it, and tell what came of it."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from helpers.hostile.mutations import mutations_for
from helpers.hostile.readers import Reader, text_of
from trl_sae_audit.errors import AuditError

OUTCOMES = ("as before", "another value", "refused", "silent", "crash")


@dataclass
class Tally:
    """What came of the iterations of one reader.

    Attributes:
        counts: outcome → how often.
        failures: what went wrong, in short → the first iteration it did.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, int] = field(default_factory=dict)

    def add(self, iteration: int, outcome: str, detail: str) -> None:
        self.counts[outcome] += 1
        if outcome in ("crash", "silent"):
            self.failures.setdefault(detail, iteration)


@dataclass
class Fuzz:
    """One reader, its valid input in `scratch/valid`, and what it reads from that, as text."""

    name: str
    reader: Reader
    scratch: Path
    expected: str
    seed: int = 0

    def once(self, iteration: int) -> tuple[str, str]:
        """Break one file and read: the outcome, and where something is wrong what it is."""
        rng = Random(f"{self.seed} {self.name} {iteration}")
        broken = self.scratch / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(self.scratch / "valid", broken)
        file = rng.choice(
            sorted(path for path in broken.rglob("*") if path.is_file() and path.stat().st_size)
        )
        mutation = rng.choice(mutations_for(file))
        before = file.read_bytes()
        changed = mutation(before, rng)
        file.write_bytes(changed)
        known = rng.random() < 0.5 and correct_checksum(broken, file, changed)
        path = file.relative_to(broken).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = text_of(self.reader.read(broken))
        except AuditError as error:
            return "refused", str(error)
        except BaseException as error:  # noqa: BLE001, whatever it is, it is what is looked for
            return "crash", f"{type(error).__name__} at {_place(error)} ({path}): {str(error)[:100]}"
        if value == self.expected:
            return "as before", ""
        covered = any(fnmatch(path, pattern) for pattern in self.reader.checked)
        if covered and changed != before and not known:
            return "silent", f"{mutation.__name__} of {path}"
        return "another value", ""


def _place(error: BaseException) -> str:
    """The last line of the package that an error passed."""
    ours = [each for each in traceback.extract_tb(error.__traceback__) if "trl_sae_audit" in each.filename]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"


def correct_checksum(directory: Path, file: Path, content: bytes) -> bool:
    """Put the length and checksum of a broken file into the manifest of a run record, as somebody who means harm would."""
    manifest = directory / "manifest.json"
    if file == manifest or not manifest.is_file():
        return False
    fields = json.loads(manifest.read_text())
    for entry in fields["files"] if fields["kind"] == "run" else []:
        if directory / entry["file"] == file:
            entry |= {"size": len(content), "crc32": zlib.crc32(content)}
            manifest.write_text(json.dumps(fields))
            return True
    return False


def run(name: str, reader: Reader, iterations: int, seed: int, memory: int) -> Tally:
    """Fuzz one reader in child processes, so that a crash or a bomb ends a child only."""
    tally, done = Tally(), 0
    memory_disk = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=memory_disk if memory_disk.is_dir() else None
    ) as scratch:
        valid = Path(scratch) / "valid"
        valid.mkdir()
        reader.write(valid)
        fuzz = Fuzz(name, reader, Path(scratch), text_of(reader.read(valid)), seed)
        while done < iterations:
            for iteration, outcome, detail in _in_a_child(fuzz, range(done, iterations), memory):
                tally.add(iteration, outcome, detail)
                done = iteration + 1
            if done < iterations:  # the child died at iteration `done`
                tally.add(done, "crash", "the process died")
                done += 1
    return tally


def _in_a_child(fuzz: Fuzz, iterations: range, memory: int) -> Iterator[tuple[int, str, str]]:
    """(iteration, outcome, detail) of each iteration that a forked child lives through."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + memory, size + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            with os.fdopen(into, "w") as pipe:
                for iteration in iterations:
                    pipe.write(json.dumps([iteration, *fuzz.once(iteration)]) + "\n")
                    pipe.flush()
        except BaseException:  # noqa: BLE001, a mistake of the fuzzer's own
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        for line in pipe:
            if line.endswith("\n"):
                yield tuple(json.loads(line))
    os.waitpid(child, 0)
