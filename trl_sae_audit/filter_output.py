"""A filtered dataset on disk: kept, dropped, what was decided and a card, all of it or nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import AuditError
from .filter_plan import FilterPlan, rule_of
from .filter_rows import apply_plan, dropped_rows, kept_rows, rows_that_leave
from .filter_writers import Writer, writer_for
from .preferences import Source
from .visible_text import visible

_CONTROL = "control"


def write_filtered(
    source: Source,
    plan: FilterPlan,
    summary: Mapping[str, Any],
    path: Path,
    format: str | None,
    overwrite: bool,
    *,
    with_control: bool,
) -> Path:
    """See `FilterResult.save`. The directory appears under its name when it is complete, never before."""
    if path.exists() and not overwrite:
        raise AuditError(f"{path} exists already; choose another directory, or pass overwrite=True.")
    if path.exists() and not (path / "filter.json").is_file():
        raise AuditError(
            f"{path} was not written by a filter, so it is not overwritten; choose another directory."
        )
    writer = writer_for(source, format)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        scratch.mkdir(parents=True)
        _fill(scratch, source, plan, summary, writer, with_control)
        _put_in_place(scratch, path)
    except OSError as error:
        raise AuditError(
            f"{path} could not be written ({error.strerror}); the input is untouched and nothing was put in place: make "
            "room or choose another directory."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return path


def _fill(
    scratch: Path,
    source: Source,
    plan: FilterPlan,
    summary: Mapping[str, Any],
    writer: Writer,
    with_control: bool,
) -> None:
    column = plan.settings["weight_column"]
    files = {
        "kept": writer.write(
            scratch / "kept",
            apply_plan(source, plan, column) if writer.whole else kept_rows(source, plan, column),
        ),
        "dropped": writer.write(
            scratch / "dropped", rows_that_leave(source, plan) if writer.whole else dropped_rows(source, plan)
        ),
    }
    if with_control:
        chance = plan.control(plan.settings["seed"])
        rows = apply_plan(source, chance, column) if writer.whole else kept_rows(source, chance, column)
        files[_CONTROL] = writer.write(scratch / _CONTROL, rows)
    plan.table()[["row", "action", "score", "weight", "reason"]].to_parquet(
        scratch / "decisions.parquet", index=False, write_page_checksum=True
    )
    record = {"settings": plan.settings, "summary": dict(summary), "files": files}
    (scratch / "filter.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    (scratch / "README.md").write_text(dataset_card(record))


def _put_in_place(scratch: Path, path: Path) -> None:
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        path.replace(old)
    try:
        scratch.replace(path)
    except OSError:
        if old.exists():
            old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _cell(text: str) -> str:
    return visible(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def dataset_card(record: Mapping[str, Any]) -> str:
    """A README that says how the data was made, and how to make it again."""
    summary, settings = record["summary"], record["settings"]
    score = settings["score"] if isinstance(settings["score"], str) else json.dumps(settings["score"])
    command = [
        "trl-sae-audit filter --dataset DATA --audit AUDIT --flags flags.yaml",
        f"--strategy {settings['strategy']} --score {score} --weights {settings['weights']} --{rule_of(settings)} "
        f"--seed {settings['seed']}",
    ]
    flags = "\n".join(
        f"| {_cell(flag['dictionary'])} | {flag['feature']} | {_cell(flag['label'])} | {flag['attribution_before']:.4g} | "
        f"{flag['attribution_after']:.4g} |"
        for flag in summary["flags"]
    )
    files = "\n".join(
        f"  - split: {name}\n    path: {file}" for name, file in record["files"].items() if name != "dropped"
    )
    return f"""---
configs:
- config_name: default
  data_files:
{files}
tags:
- trl-sae-audit
- preference
---

# Preference data, filtered by what it teaches

Of {summary["rows"]} rows {summary["kept"]} are kept and {summary["dropped"]} dropped; {summary["flipped"]} of the kept
are flipped and {summary["weighted"]} weighted down. The dropped rows lie in `{record["files"]["dropped"]}` with the row's
number, its score and the reason; what was decided about every row in `decisions.parquet`.

| dictionary | feature | label | attribution before | after |
|---|---|---|---|---|
{flags}

Attribution: how strongly the mean loss's gradient up-weights the feature; positive = the data teaches it.

Made by [trl-sae-audit](https://pypi.org/project/trl-sae-audit/) from the flags in `filter.json`; to make it again:

```
{command[0]} \\
    {command[1]}
```
"""
