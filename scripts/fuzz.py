"""Break valid files on the spot, in every way there is, and see that each reader says so in one sentence.

Every reader of the package (run records, audits, SAE directories, flags, datasets …) is given a small valid input of which
one file was broken: bits flipped, cut short, pieces repeated, values in JSON, YAML, safetensors headers and Parquet metadata replaced
by hostile ones. What may come of it: the value as it was; another value, where no checksum covers the file; or an AuditError. Anything
else, also a crash of the process or more memory than allowed, is reported with the input that did it. Half of the broken files of a
run record get their checksums mended in the manifest, as somebody would who means harm.

    python scripts/fuzz.py --iterations 2000
    python scripts/fuzz.py --reader "run record" --seed 7 --keep /tmp/crashes
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parent))

from fuzzing.mutations import mutations_for
from fuzzing.readers import DamagedWorldError, Reader, readers, text_of
from rich.console import Console
from rich.table import Table

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
    seconds: float = 0.0

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
    seed: int
    keep: Path | None
    _content: dict[Path, bytes] = field(default_factory=dict)

    def once(self, iteration: int) -> tuple[str, str]:
        """Break one file and read: the outcome, and where something is wrong what it is."""
        rng = Random(f"{self.seed} {self.name} {iteration}")
        broken = self._whole()
        file = rng.choice(
            sorted(path for path in broken.rglob("*") if path.is_file() and path.stat().st_size)
        )
        mutation = rng.choice(mutations_for(file))
        before = file.read_bytes()
        changed = mutation(before, rng)
        file.write_bytes(changed)
        mended = rng.random() < 0.5 and mend(broken, file, changed)
        path = file.relative_to(broken).as_posix()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = text_of(self.reader.read(broken))
        except (AuditError, DamagedWorldError) as error:
            return "refused", str(error)
        except BaseException as error:  # noqa: BLE001, whatever it is, it is what is looked for
            self.keep_input(iteration)
            where = traceback.extract_tb(error.__traceback__)
            ours = [
                f"{Path(each.filename).name}:{each.lineno}"
                for each in where
                if "trl_sae_audit" in each.filename
            ]
            return (
                "crash",
                f"{type(error).__name__} at {ours[-1] if ours else '?'} ({path}): {str(error)[:100]}",
            )
        if found == self.expected:
            return "as before", ""
        unsealed = file.suffix == ".safetensors" and not re.search(
            rb'crc32\\?"', changed
        )  # as files were written once
        if (
            changed != before
            and not (mended or unsealed)
            and any(fnmatch(path, pattern) for pattern in self.reader.sealed)
        ):
            self.keep_input(iteration)
            return "silent", f"{mutation.__name__} of {path}"
        return "another value", ""

    def _whole(self) -> Path:
        """The valid input in a directory of its own; of the last iteration's only what was changed is put back."""
        valid, broken = self.scratch / "valid", self.scratch / "broken"
        if not self._content:
            self._content = {path: path.read_bytes() for path in valid.rglob("*") if path.is_file()}
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(valid, broken)
            return broken
        names = {path.relative_to(valid) for path in self._content}
        for path in [path for path in broken.rglob("*") if path.is_file()]:
            if path.relative_to(broken) not in names:
                path.unlink()
        for path, content in self._content.items():
            copy = broken / path.relative_to(valid)
            if not copy.is_file() or copy.read_bytes() != content:
                copy.write_bytes(content)
        return broken

    def keep_input(self, iteration: int) -> None:
        if self.keep is not None:
            shutil.copytree(
                self.scratch / "broken", self.keep / f"{self.name}-{iteration}", dirs_exist_ok=True
            )


def run(
    name: str, reader: Reader, iterations: int, seed: int, memory: int, keep: Path | None = None
) -> Tally:
    """Fuzz one reader in child processes, so that a crash or a bomb ends a child only."""
    tally, done, started = Tally(), 0, time.monotonic()
    memory_disk = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fuzz-", dir=memory_disk if memory_disk.is_dir() else None
    ) as scratch:
        valid = Path(scratch) / "valid"
        valid.mkdir()
        reader.write(valid)
        expected = text_of(reader.read(valid))
        if expected != text_of(reader.read(valid)):
            raise SystemExit(f"{name}: the valid input is not read twice alike")
        while done < iterations:
            before = done
            fuzz = Fuzz(name, reader, Path(scratch), expected, seed, keep)
            for iteration, outcome, detail in _in_a_child(fuzz, range(done, iterations), memory):
                tally.add(iteration, outcome, detail)
                done = iteration + 1
            if done < iterations:  # the child died at iteration `done`
                tally.add(done, "crash", "the process died")
                fuzz.keep_input(done)
                done += 1
            assert done > before
    tally.seconds = time.monotonic() - started
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


def mend(directory: Path, file: Path, content: bytes) -> bool:
    """Put the length and checksum of a broken file into the manifest of a run record."""
    manifest = directory / "manifest.json"
    if file == manifest or not manifest.is_file():
        return False
    fields = json.loads(manifest.read_text())
    if "tables" not in fields:
        return False
    stored = [part for parts in fields["tables"].values() for part in parts] + list(fields["totals"].values())
    for entry in stored:
        if directory / entry["file"] == file:
            entry |= {"bytes": len(content), "crc32": zlib.crc32(content)}
            manifest.write_text(json.dumps(fields))
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--reader", nargs="+", choices=list(readers()), help="Only these; default all.")
    parser.add_argument(
        "--iterations", type=int, default=200, help="Of the cheapest readers; others get fewer."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", type=float, default=1.0, help="GiB that a reader may take besides.")
    parser.add_argument("--keep", type=Path, help="Directory for the inputs that did harm.")
    arguments = parser.parse_args()
    table = Table("reader", *OUTCOMES, "seconds", title=f"seed {arguments.seed}")
    failures, total = [], 0
    for name, reader in readers().items():
        if arguments.reader and name not in arguments.reader:
            continue
        n = max(1, arguments.iterations // reader.cost)
        tally = run(name, reader, n, arguments.seed, int(arguments.memory * 2**30), arguments.keep)
        total += n
        table.add_row(name, *(str(tally.counts[outcome]) for outcome in OUTCOMES), f"{tally.seconds:.0f}")
        failures += [
            f"{name}, iteration {iteration}: {detail}" for detail, iteration in tally.failures.items()
        ]
        print(f"{name}: {dict(tally.counts)} {tally.seconds:.0f} s", file=sys.stderr, flush=True)
    console = Console(width=110)
    console.print(table)
    console.print(f"{total:,} iterations, {len(failures)} kinds of failure")
    for failure in failures:
        console.print(failure, markup=False, highlight=False)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
