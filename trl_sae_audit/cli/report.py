"""`trl-sae-audit report`."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from ..console import console, single_line
from ..errors import AuditError
from .options import DictionaryArguments, ModelArguments, OutputArguments, PreferenceArguments
from .parser import option

DESCRIPTION = (
    "One HTML file about a run or an audit, for people: what was taught, when, on which examples; to open in any browser, "
    "offline, on a phone, from a mail. A run record does not hold the examples that drive a feature: --evidence gathers them."
)
EXAMPLE = """\
trl-sae-audit report runs/dpo
trl-sae-audit report runs/dpo --watch
trl-sae-audit report runs/dpo --evidence 10 --model ./model \\
    --dictionary ./sae --dataset pairs.jsonl"""


@dataclass
class ReportArguments:
    """The report."""

    source: str = option("Directory of a run record or an audit.", positional=True, metavar="DIRECTORY")
    output: str | None = option(
        "The file to write; default report.html in that directory.", None, main=True, metavar="FILE.html"
    )
    against: list[str] | None = option(
        "Other run records or audits to compare with it.", None, main=True, metavar="DIRECTORY"
    )
    watch: bool = option(
        "Follow a run that is going: write the page again and again, and serve it to this machine's browser at an address with a "
        "random token. An open page reloads itself and keeps its place. Ends with the run, or with Ctrl-C.",
        False,
        main=True,
    )
    every: float = option("Seconds between two updates with --watch.", 10.0)
    port: int = option("Port that --watch serves at; 0 takes any that is free.", 0)
    names: list[str] | None = option(
        "Names for the source and those it is compared with, one each.", None, metavar="NAME", text=True
    )
    title: str = option("Heading of the page.", "", text=True)
    note: str = option("A paragraph under the heading.", "", text=True)
    audit: str | None = option(
        "Audit of the run's data with the same dictionary: adds disparity, length correlation, its examples.",
        None,
    )
    filtered: str | None = option("A directory that filter wrote: adds what was dropped and why.", None)
    verified: str | None = option(
        "A directory that verify wrote: adds predicted against measured change.", None
    )


@dataclass
class EvidenceArguments:
    """Evidence: examples that drive the features."""

    evidence: int = option(
        "First gather evidence for that many features in each direction, and keep it. Needs --model, --dictionary and "
        "--dataset; of a run, its data is audited for it, once.",
        0,
    )
    model: str | None = option("The model that the run began with.", None, aliases=["--model_name_or_path"])
    dictionary: str | None = option("The dictionary, a directory or a release.", None, aliases=["--sae"])
    sae_id: str | None = option("Which SAE of the release.", None)
    hook_point: str | None = option("Read here instead of where the SAE says it hooks.", None)
    transcoder: bool = option("Also take a transcoder, whose scores are about what its MLP adds.", False)
    dataset: str | None = option("The preference pairs.", None, aliases=["--dataset_name"])
    split: str | None = option("Split, of a dataset that has several; default train.", None)
    max_rows: int | None = option("Use the first rows only.", None)
    labels: str | None = option("A local file of feature labels.", None)


OPTIONS = (ReportArguments, EvidenceArguments, OutputArguments)


def run(arguments: ReportArguments, evidence: EvidenceArguments, output: OutputArguments) -> int:
    if arguments.every <= 0:
        raise AuditError(f"--every is {arguments.every:g}; give a number of seconds above 0.")
    if evidence.evidence:
        _gather(arguments.source, evidence)
    if arguments.watch:
        path, status = _follow(arguments, output)
    else:
        path, status = _write(arguments, None)
    if path is None:
        output.show(
            {"report": None, "status": status}, "The run has written no figures yet, so there is no page."
        )
        return 0
    size = path.stat().st_size
    output.show(
        {"report": path, "bytes": size, "status": status},
        f"A page of {size / 2**20:.1f} MB; open it in a browser:",
        single_line(str(path)),
    )
    return 0


def _write(arguments: ReportArguments, version: int | None) -> tuple[Path, str]:
    """Write the page; where it is, and the run's status. With a version the page of a run that is going reloads itself."""
    from ..report.page import open_sources, write_report

    status = open_sources(arguments.source)[0].status
    reloads = version is not None and status == "running"
    path = write_report(
        [arguments.source, *(arguments.against or [])],
        arguments.output,
        names=arguments.names,
        title=arguments.title,
        note=arguments.note,
        audit=arguments.audit or _audit_beside(Path(arguments.source)),
        filtered=arguments.filtered,
        verified=arguments.verified,
        reload_seconds=arguments.every if reloads else None,
        version=version if reloads else None,
    )
    return path, status


def _follow(arguments: ReportArguments, output: OutputArguments) -> tuple[Path | None, str]:
    """Write and serve the page until the run ends, or Ctrl-C."""
    from ..report.live import LiveServer
    from ..report.sources import has_begun

    path, status, version = None, "waiting", 0
    with LiveServer(arguments.port) as server:
        if not output.json:
            console().print(
                f"Follow the run at {server.address} (Ctrl-C ends)", soft_wrap=True, highlight=False
            )
        try:
            while not has_begun(arguments.source):
                time.sleep(arguments.every)
            while True:
                version += 1
                path, status = _write(arguments, version)
                server.show(path.read_bytes(), version)
                if status != "running":
                    server.wait_for_reader(arguments.every + 2.0)
                    break
                time.sleep(arguments.every)
        except KeyboardInterrupt:
            status = f"{status}, left"
    return path, status


def _audit_beside(source: Path) -> Path | None:
    """The audit of a run's data that an earlier --evidence left in the record."""
    beside = source / "audit"
    return beside if (beside / "manifest.json").is_file() else None


def _gather(directory: str, arguments: EvidenceArguments) -> None:
    model, dictionary, dataset = arguments.model, arguments.dictionary, arguments.dataset
    if model is None or dictionary is None or dataset is None:
        raise AuditError(
            "--evidence needs the model, the dictionary and the data; pass --model, --dictionary and --dataset too."
        )
    from ..audit.evidence import read_labels
    from ..report.page import open_sources
    from .gathering import gather_for

    source = open_sources(directory)[0]
    loaded = DictionaryArguments(
        dictionary, arguments.sae_id, arguments.hook_point, arguments.transcoder
    ).load()
    gather_for(
        source,
        *ModelArguments(model).load(),
        PreferenceArguments(dataset, arguments.split, arguments.max_rows).source(),
        loaded,
        features=arguments.evidence,
        labels=read_labels(arguments.labels) if arguments.labels else None,
    )
