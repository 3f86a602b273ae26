"""The page: what was read, put into the template, written as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..errors import AuditError
from ..record_files import write_durably
from .sources import Source, open_source, with_audit
from .text import plain, probability, shown, signed

PathLike = str | os.PathLike[str]


def write_report(
    sources: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
    audit: PathLike | None = None,
    filtered: PathLike | None = None,
    reload_seconds: float | None = None,
) -> Path:
    """Write one self-contained HTML file about run records and audits.

    Args:
        sources: directories of run records or audits. The page is about the first; the others are compared with it.
            Outcomes and evidence that lie in them are shown.
        output: the file; by default `report.html` in the first directory.
        names: what to call the sources, one each; by default their directories' names.
        title: the page's heading; by default made from the first source.
        note: a paragraph under the heading, plain text: what a reader must know of these runs.
        audit: directory of an audit of the first run's data with the same dictionary, for what a run cannot know:
            disparity, correlation with length, driving examples.
        filtered: directory that `filter` wrote, to show what was dropped and why.
        reload_seconds: the page loads itself again that often, for a run that goes on.

    Returns:
        The file that was written.

    Raises:
        AuditError: a directory that cannot be read, or an output that cannot be written.
    """
    opened = _opened(sources, names)
    if audit is not None:
        opened[0] = with_audit(opened[0], open_source(audit))
    target = Path(output) if output is not None else opened[0].directory / "report.html"
    page = _render(opened, title, note, reload_seconds)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, page.encode("utf-8"))
    except OSError as error:
        raise AuditError(
            f"The report could not be written to {target} ({error.strerror}); choose another --output."
        ) from error
    return target


def _opened(sources: PathLike | Sequence[PathLike], names: Sequence[str] | None) -> list[Source]:
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not paths:
        raise AuditError("There is nothing to report on; name at least one run record or audit.")
    if names is not None and len(names) != len(paths):
        raise AuditError(f"There are {len(paths)} sources but {len(names)} names; give one each.")
    return [open_source(path, names[place] if names else None) for place, path in enumerate(paths)]


def _render(sources: list[Source], title: str, note: str, reload_seconds: float | None) -> str:
    environment = Environment(
        loader=PackageLoader("trl_sae_audit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "signed": signed, "plain": plain, "probability": probability}
    context: dict[str, Any] = {
        "title": title or f"What {sources[0].name} teaches",
        "note": note,
        "sources": sources,
        "reload_seconds": reload_seconds,
    }
    return environment.get_template("report.html.jinja").render(context)
