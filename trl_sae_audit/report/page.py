"""The page: what was read, put into the template, written as one file."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import AuditError
from ..record_files import write_durably
from . import curves, sentences
from .charts import Drawing
from .comparison import compare_features, compare_outcomes
from .curriculum import Map, curriculum_map, map_note
from .dots import feature_plot, outcome_plot
from .filtered import read_filtered
from .packing import MOST_FEATURES, as_json, base64_floats, card, packed_features
from .sources import Source, View, open_source, with_audit
from .tables import HeadTable, head_table, hint
from .text import plain, shown
from .verified import read_verified

PathLike = str | os.PathLike[str]

_USUAL_NAMES = ("record", "sae_audit", "audit")


def write_report(
    sources: PathLike | Sequence[PathLike],
    output: PathLike | None = None,
    *,
    names: Sequence[str] | None = None,
    title: str = "",
    note: str = "",
    audit: PathLike | None = None,
    filtered: PathLike | None = None,
    verified: PathLike | None = None,
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
        verified: directory that `verify` wrote, to show how well the scores predicted what training did.
        reload_seconds: the page loads itself again that often, for a run that goes on.

    Returns:
        The file that was written.

    Raises:
        AuditError: a directory that cannot be read, or an output that cannot be written.
    """
    opened = open_sources(sources, names)
    if audit is not None:
        opened[0] = with_audit(opened[0], open_source(audit))
    target = Path(output) if output is not None else opened[0].directory / "report.html"
    beside = {
        "filtered": read_filtered(filtered) if filtered is not None else None,
        "verified": read_verified(verified) if verified is not None else None,
    }
    page = _render(opened, title, note, beside, reload_seconds)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_durably(target, page.encode("utf-8"))
    except OSError as error:
        raise AuditError(
            f"The report could not be written to {target} ({error.strerror}); choose another --output."
        ) from error
    return target


def open_sources(sources: PathLike | Sequence[PathLike], names: Sequence[str] | None = None) -> list[Source]:
    """Every source, under its own name.

    Raises:
        AuditError: none, one that cannot be read, or not as many names as sources.
    """
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not paths:
        raise AuditError("There is nothing to report on; name at least one run record or audit.")
    if names is not None and len(names) != len(paths):
        raise AuditError(f"There are {len(paths)} sources but {len(names)} names; give one each.")
    chosen = list(names) if names else _short_names([Path(path).resolve() for path in paths])
    return [open_source(path, name) for path, name in zip(paths, chosen, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Directories' names, without what every record is called, with as many parents as it takes to tell them apart."""
    if all(path.name in _USUAL_NAMES for path in paths):
        paths = [path.parent for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, start=1)]


@dataclass(frozen=True)
class _Panel:
    """One dictionary of the first source."""

    view: View
    head: HeadTable
    map: Map | None
    map_note: str
    watched: list[Drawing]
    watched_are_chosen: bool
    drift: Drawing | None
    gradient: list[Drawing]
    shown_features: int


def _render(
    sources: list[Source], title: str, note: str, beside: dict[str, Any], reload_seconds: float | None
) -> str:
    main = sources[0]
    measures = compare_outcomes(sources)
    rows = compare_features(sources)
    panels = [_panel(main, view) for view in main.views]
    hints = {
        feature: hint(evidence)
        for (dictionary, feature), evidence in main.evidence.items()
        if dictionary == main.views[0].name
    }
    script, style = _part("report.js"), _part("report.css")
    data = {
        "kind": main.kind,
        "sides": main.sides,
        "dictionaries": [_data(main, panel) for panel in panels],
        "reload": reload_seconds,
    }
    context: dict[str, Any] = {
        "title": title or _title(sources),
        "note": note,
        "sources": sources,
        "main": main,
        "line": sentences.what_was_run(main),
        "in_short": sentences.in_short(sources, measures, rows, hints),
        "warnings": sentences.warnings(main),
        "outcomes": outcome_plot(measures, sources) if measures else None,
        "compared": feature_plot(rows, sources, hints),
        "compared_charts": curves.compared_charts(rows, sources),
        "panels": panels,
        "shaping": [(source.name, charts) for source in sources if (charts := curves.shaping_charts(source))],
        "trainer": curves.trainer_charts(main),
        **beside,
        "facts": [(source.name, sentences.provenance(source)) for source in sources],
        "most_features": MOST_FEATURES,
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": Markup(as_json(data)),
        "reload_seconds": reload_seconds,
    }
    return _environment().get_template("report.html.jinja").render(context)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("trl_sae_audit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "plain": plain}
    return environment


def _part(name: str) -> str:
    return (resources.files("trl_sae_audit.report") / "templates" / name).read_text(encoding="utf-8")


def _title(sources: list[Source]) -> str:
    if len(sources) > 1:
        return "Side by side: " + ", ".join(source.name for source in sources)
    return f"What {sources[0].name} {'would teach' if sources[0].kind == 'audit' else 'taught'}"


def _panel(source: Source, view: View) -> _Panel:
    found = None
    if view.means is not None and view.bins is not None:
        found = curriculum_map(view.means, view.bins, view.watched.values())
    watched = curves.watched_charts(source, view)
    return _Panel(
        view,
        head_table(source, view),
        found,
        map_note(found, len(view.features)) if found else "",
        watched or curves.largest_charts(view),
        bool(watched),
        curves.drift_chart(view),
        curves.gradient_charts(view),
        min(len(view.features), MOST_FEATURES),
    )


def _data(source: Source, panel: _Panel) -> dict[str, Any]:
    view = panel.view
    neuronpedia = view.described.get("neuronpedia_id")
    found = panel.map
    return {
        "name": view.name,
        "identity": view.described["identity"],
        "neuronpedia": neuronpedia,
        "size": len(view.features),
        "factor": panel.head.scale.factor,
        "unit": panel.head.scale.unit,
        **packed_features(view.features),
        "evidence": {
            str(feature): card(evidence)
            for (dictionary, feature), evidence in source.evidence.items()
            if dictionary == view.name
        },
        "map": None
        if found is None
        else {
            "features": found.features,
            "bins": found.bins.tolist(),
            "values": base64_floats(found.values),
            "starts": [group.start for group in found.groups],
            "rows": [group.rows for group in found.groups],
            "names": [group.name for group in found.groups],
            "height": found.height,
        },
    }
