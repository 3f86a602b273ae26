"""`trl-sae-audit report`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import AuditError
from ..report.page import open_sources, write_report
from ..report.sources import Source, has_begun
from ..terminal import OutputArguments, to_copy
from .arguments import ModelArguments, load_model, parse
from .preferences import PreferenceArguments, first_as_option

DESCRIPTION = (
    "One HTML file about a run or an audit, for people: what was taught, when, on which examples; to open in any browser, "
    "offline, on a phone, from a mail. Example: trl-sae-audit report runs/dpo. With the driving examples of each "
    "feature, which a run record does not hold: trl-sae-audit report runs/dpo --evidence 10 --model_name_or_path ./model --sae ./sae "
    "--dataset pairs.jsonl"
)


@dataclass
class ReportArguments:
    """The report."""

    source: str = field(
        metadata={"help": "Directory of a run record or an audit; may stand first, without --source."}
    )
    output: str | None = field(
        default=None, metadata={"help": "The file to write; default report.html in that directory."}
    )
    against: list[str] | None = field(
        default=None, metadata={"help": "Other run records or audits to show beside it."}
    )
    names: list[str] | None = field(
        default=None, metadata={"help": "What to call the source and those beside it, one each."}
    )
    title: str = field(default="", metadata={"help": "Heading of the page."})
    note: str = field(default="", metadata={"help": "A paragraph under the heading."})
    audit: str | None = field(
        default=None,
        metadata={
            "help": "Audit of the run's data with the same dictionary: adds disparity, length correlation, its examples."
        },
    )
    filtered: str | None = field(
        default=None, metadata={"help": "A directory that filter wrote: adds what was dropped and why."}
    )
    verified: str | None = field(
        default=None,
        metadata={"help": "A directory that verify wrote: adds predicted against realised change."},
    )
    evidence: int = field(
        default=0,
        metadata={
            "help": "First gather evidence for that many features in each direction, and keep it. Needs --model_name_or_path, "
            "--sae and --dataset; of a run, its data is audited for it, once."
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "For --evidence: the model that the run began with."}
    )
    sae: str | None = field(
        default=None, metadata={"help": "For --evidence: the dictionary, a directory or a release."}
    )
    sae_id: str | None = field(default=None, metadata={"help": "For --evidence: which SAE of the release."})
    hook_point: str | None = field(
        default=None, metadata={"help": "For --evidence: read here instead of where the SAE says."}
    )
    dataset: str | None = field(default=None, metadata={"help": "For --evidence: the preference pairs."})
    split: str = field(
        default="train", metadata={"help": "For --evidence: split of a dataset that has several."}
    )
    max_rows: int | None = field(
        default=None, metadata={"help": "For --evidence: audit only the first rows of a run's data."}
    )
    labels: str | None = field(
        default=None, metadata={"help": "For --evidence: a local file of feature labels."}
    )
    watch: bool = field(
        default=False,
        metadata={"help": "Write the page anew while the run goes on; an open page loads itself again."},
    )
    every: float = field(default=10.0, metadata={"help": "For --watch: seconds between two writings."})


def main(argv: Sequence[str]) -> int:
    arguments, output = parse(
        "report", DESCRIPTION, (ReportArguments, OutputArguments), first_as_option(argv, "source")
    )
    if arguments.every <= 0:
        raise AuditError(f"--every is {arguments.every:g}; give a number of seconds above 0.")
    if arguments.evidence:
        _gather(arguments)
    audit = arguments.audit or _audit_beside(Path(arguments.source))
    while arguments.watch and not has_begun(arguments.source):
        time.sleep(arguments.every)
    while True:
        status = open_sources(arguments.source)[0].status
        going_on = arguments.watch and status == "running"
        path = write_report(
            [arguments.source, *(arguments.against or [])],
            arguments.output,
            names=arguments.names,
            title=arguments.title,
            note=arguments.note,
            audit=audit,
            filtered=arguments.filtered,
            verified=arguments.verified,
            reload_seconds=arguments.every if going_on else None,
        )
        if not going_on:
            break
        time.sleep(arguments.every)
    size = path.stat().st_size
    output.show(
        {"report": path, "bytes": size, "status": status},
        f"A page of {size / 2**20:.1f} MB; open it in a browser:",
        to_copy(str(path)),
    )
    return 0


def _audit_beside(source: Path) -> Path | None:
    """The audit of a run's data that an earlier --evidence left in the record."""
    beside = source / "audit"
    return beside if (beside / "manifest.json").is_file() else None


def _gather(arguments: ReportArguments) -> None:
    missing = [name for name in ("model_name_or_path", "sae", "dataset") if getattr(arguments, name) is None]
    if missing:
        raise AuditError(
            f"--evidence needs the model, the dictionary and the data; pass --{' and --'.join(missing)} too."
        )
    from ..evidence import read_labels
    from ..report.gathering import gather_for
    from ..sae import load_dictionary

    source: Source = open_sources(arguments.source)[0]
    dictionary = load_dictionary(arguments.sae, arguments.sae_id, hook_point=arguments.hook_point)
    model, tokenizer = load_model(ModelArguments(str(arguments.model_name_or_path)))
    gather_for(
        source,
        model,
        tokenizer,
        PreferenceArguments(str(arguments.dataset), arguments.split).source(),
        dictionary,
        features=arguments.evidence,
        max_rows=arguments.max_rows,
        labels=read_labels(arguments.labels) if arguments.labels else None,
    )
