"""A filtered dataset on disk: kept, dropped, what was decided and a card, all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.opener import DatasetLike
from ..errors import AuditError
from ..flags import Flag, FlagSet
from ..io.atomic import whole_directory
from ..io.manifest import StoredFile, check_free, write_manifest
from ..text import sanitize
from .check import describe_check
from .plan import FilterPlan
from .rows import apply_plan, iterate_dropped, iterate_kept, select_dropped
from .writers import Format, Writer, writer_for

FLAGS = "flags.yaml"


def write_filtered(
    source: DatasetLike,
    plan: FilterPlan,
    summary: Mapping[str, Any],
    path: Path,
    format: Format | None,
    overwrite: bool,
) -> Path:
    """See `FilterResult.save`. The directory appears under its name when it is complete, never before."""
    if path.exists():
        if not overwrite:
            raise AuditError(f"{path} exists already; choose another directory, or pass overwrite=True.")
        check_free(path, "filtered")
    writer = writer_for(source, format)
    try:
        with whole_directory(path) as scratch:
            _fill(scratch, source, plan, summary, writer)
    except OSError as error:
        raise AuditError(
            f"{path} could not be written ({error.strerror}); the input is untouched and nothing was put in place: make "
            "room or choose another directory."
        ) from error
    return path


def _fill(
    scratch: Path, source: DatasetLike, plan: FilterPlan, summary: Mapping[str, Any], writer: Writer
) -> None:
    column = plan.settings["weight_column"]

    def keep(chosen: FilterPlan) -> Any:
        return apply_plan(source, chosen, column) if writer.whole else iterate_kept(source, chosen, column)

    dropped = select_dropped(source, plan) if writer.whole else iterate_dropped(source, plan)
    writer.write(scratch / "kept", keep(plan))
    writer.write(scratch / "dropped", dropped)
    if plan.settings["control"]:
        writer.write(scratch / "control", keep(plan.control(plan.settings["seed"])))
    plan.table()[["row", "action", "score", "weight", "copies", "reason"]].to_parquet(
        scratch / "decisions.parquet", index=False, write_page_checksum=True
    )
    FlagSet(Flag(**flag) for flag in plan.settings["flags"]).save(scratch / FLAGS)
    score = plan.settings["score"]
    config = {
        **plan.settings,
        "flags": FLAGS,
        "score": score if isinstance(score, str) else json.dumps(score),
        "format": writer.format,
    }
    (scratch / "README.md").write_text(_dataset_card(config, summary, writer.ending), encoding="utf-8")
    body = {"config": config, "summary": dict(summary)}
    write_manifest(scratch, "filtered", body, StoredFile.all_in(scratch))


def _cell(text: str) -> str:
    return sanitize(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def _predicted(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return summary["check"]["flags"] if "check" in summary else [{}] * len(summary["flags"])


def _flag_row(flag: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    cells = [_cell(flag["dictionary"]), str(flag["feature"]), _cell(flag["label"]), _cell(flag["words"])]
    for when in ("before", "after"):
        cells.append(
            f"{found[when]:+.2g} [{found[f'{when}_low']:+.2g}, {found[f'{when}_high']:+.2g}]"
            if found
            else "–"
        )
    for when in ("before", "after"):
        name = f"disparity_{when}"
        cells.append(f"{flag[name]:+.2f} ± {flag[f'{name}_margin']:.2f}" if name in flag else "–")
    cells += [f"{flag[f'attribution_{when}']:+.3g}" for when in ("before", "after")]
    return "| " + " | ".join(cells) + " |"


def _dataset_card(config: Mapping[str, Any], summary: Mapping[str, Any], ending: str) -> str:
    """A README that says how the data was made, and how to make it again."""
    flags = "\n".join(
        _flag_row(flag, found) for flag, found in zip(summary["flags"], _predicted(summary), strict=True)
    )
    check = (
        _cell(" ".join(describe_check(summary["check"])))
        if "check" in summary
        else "What is kept was not predicted again."
    )
    splits = "\n".join(
        f"  - split: {name}\n    path: {name}{ending}"
        for name in ("kept", *(["control"] if config["control"] else []))
    )
    return f"""---
configs:
- config_name: default
  data_files:
{splits}
tags:
- trl-sae-audit
- preference
---

# Preference data, filtered by what it teaches

Of {summary["rows"]} rows {summary["kept"]} are kept and {summary["dropped"]} dropped; {summary["flipped"]} of the kept
are flipped, {summary["weighted"]} weighted down and {summary["repeated"]} repeated. `dropped{ending}` has the dropped rows with each one's number, its score
and the reason; `decisions.parquet` what was decided about every row.

| dictionary | feature | label | words | effect size before | after | disparity before | after | attribution before | after |
|---|---|---|---|---|---|---|---|---|---|
{flags}

{check}

Effect size: what an optimizer step on the data does to the feature in the model's own answers, in standard deviations over them.
Disparity: share of chosen answers with the feature less share of rejected ones. In brackets and after ±: 95 % intervals.
Attribution: how strongly the mean loss's gradient up-weights the feature.

Made by [trl-sae-audit](https://pypi.org/project/trl-sae-audit/). The options are in `manifest.json`, the flags in `{FLAGS}`;
to make it again from the same data and audit:

```
trl-sae-audit filter --config THIS_DIRECTORY --output_dir AGAIN
```
"""
