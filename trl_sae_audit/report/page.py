"""The page: fills the template with what was read and writes it as one file."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .. import __version__
from ..errors import AuditError
from ..io.atomic import write_durably
from ..text import sanitize_excerpt
from . import curves, sentences
from .columns import MAP_NAMES, define_columns
from .comparison import compare_features, compare_outcomes
from .contents import name_sections
from .dots import plot_features, plot_outcomes
from .filtered import read_filtered
from .front import build_front, name_group
from .links import link_features
from .packing import encode_json
from .panels import build_panel, pack_panel
from .rollouts import build_reader, name_features
from .sources import ReportSource, add_audit, open_source
from .tables import describe_feature
from .text import format_number
from .topics import read_families, read_topic_section
from .verified import VerifiedSamples, read_verified, read_verified_samples

PathLike = str | os.PathLike[str]

_SCRIPTS = ("base.js", "columns.js", "features.js", "card.js", "map.js", "page.js")
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
    version: int | None = None,
) -> Path:
    """Write one self-contained HTML file about run records and audits.

    Args:
        sources: directories of run records or audits. The page is about the first; the others are compared with it.
            Outcomes and evidence in them are shown.
        output: the file; by default `report.html` in the first directory.
        names: of the sources, one each; by default their directories' names.
        title: the page's heading; by default made from the first source.
        note: a paragraph under the heading, plain text: what a reader must know of these runs.
        audit: directory of an audit of the first run's data with the same dictionary, for what a run cannot know:
            disparity, correlation with length, driving examples.
        filtered: directory that `filter` wrote, to show what was dropped and why.
        verified: directory that `verify` wrote, to show how well the scores predicted what training did.
        reload_seconds: interval at which the page reloads itself, for a run that is still going.
        version: of a page that is served: it reloads itself only when what is served beside it as `version` is another number.

    Returns:
        The file that was written.

    Raises:
        AuditError: a directory that cannot be read, or an output that cannot be written.
    """
    opened = open_sources(sources, names)
    if audit is not None:
        opened[0] = add_audit(opened[0], open_source(audit))
    target = Path(output) if output is not None else opened[0].directory / "report.html"
    beside = {
        "filtered": read_filtered(filtered) if filtered is not None else None,
        "verified": read_verified(verified) if verified is not None else None,
        "samples": read_verified_samples(verified) if verified is not None else None,
    }
    page = _render(opened, title, note, beside, reload_seconds, version)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # half a surrogate pair, as in the name of a file that is not UTF-8, is no character: it is shown as "?"
        write_durably(target, page.encode("utf-8", "replace"))
    except OSError as error:
        raise AuditError(
            f"The report could not be written to {target} ({error.strerror}); choose another --output."
        ) from error
    return target


def open_sources(
    sources: PathLike | Sequence[PathLike], names: Sequence[str] | None = None
) -> list[ReportSource]:
    """Every source, under its own name.

    Raises:
        AuditError: none, one that cannot be read, or not as many names as sources.
    """
    paths = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    if not paths:
        raise AuditError("There is nothing to report on; name at least one run record or audit.")
    if names is not None and len(names) != len(paths):
        raise AuditError(f"There are {len(paths)} sources but {len(names)} names; pass one name per source.")
    chosen = list(names) if names else _short_names([Path(path).resolve() for path in paths])
    return [open_source(path, name) for path, name in zip(paths, chosen, strict=True)]


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Names of the directories, with as many parents as it takes to tell them apart, without a name that all share."""
    if all(path.name in _USUAL_NAMES for path in paths):
        paths = [path.parent for path in paths]
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({place})" for place, path in enumerate(paths, start=1)]


def _render(
    sources: list[ReportSource],
    title: str,
    note: str,
    beside: dict[str, Any],
    reload_seconds: float | None,
    version: int | None,
) -> str:
    main = sources[0]
    watched = main.views[0].watched
    measures = compare_outcomes(sources)
    rows = compare_features(sources)
    panels = [build_panel(main, view) for view in main.views]
    first = main.views[0].features
    hints = {
        feature: describe_feature(words, main.evidence.get((main.views[0].name, feature)))
        for feature, words in zip(first["feature"].tolist(), first["words"].tolist(), strict=True)
        if words or (main.views[0].name, feature) in main.evidence
    }
    script = "".join(_read_template(name) for name in _SCRIPTS)
    style = _read_template("report.css")
    reader = build_reader(main.views[0], main.rollouts)
    labels = {
        feature: evidence.label
        for (name, feature), evidence in main.evidence.items()
        if evidence.label and name == main.views[0].name
    }
    data = {
        "kind": main.kind,
        "sides": main.sides,
        "sources": [source.name for source in sources],
        "dictionaries": [pack_panel(main, panel) for panel in panels],
        "reload": reload_seconds,
        "version": version,
    }
    context: dict[str, Any] = {
        "title": title or _choose_title(sources),
        "note": note,
        "sources": sources,
        "main": main,
        "line": sentences.describe_source(main),
        "front": build_front(sources, measures, rows, hints, labels),
        "in_short": sentences.summarize(sources, measures, rows, hints),
        "warnings": sentences.find_warnings(main),
        "outcomes": plot_outcomes(measures, sources) if measures else None,
        "compared": plot_features(rows, sources, hints),
        "lead": rows[0].lead if rows else None,
        "risen": sentences.describe_risen(rows, sources, hints),
        "compared_charts": curves.draw_compared(rows, sources),
        "panels": panels,
        "reader": reader,
        "reader_features": name_features(main.views[0], reader.features, hints) if reader else [],
        "topics": read_topic_section(main),
        "families": read_families(main),
        "shaping": [(source.name, charts) for source in sources if (charts := curves.draw_shaping(source))],
        "trainer": curves.draw_trainer_log(main),
        **beside,
        "samples": _place_samples(beside["samples"], main, hints),
        "facts": [(source.name, sentences.list_provenance(source)) for source in sources],
        "definitions": define_columns(main.kind, main.sides, panels[0].head.lead),
        "map_names": MAP_NAMES,
        "name_group": lambda panel, group: name_group(panel.view, group, hints),
        "version": __version__,
        "written": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": Markup(style),
        "script": Markup(script),
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "data": Markup(encode_json(data)),
        "reload_seconds": reload_seconds,
        "served": version is not None,
    }
    context["sections"] = name_sections(context)
    return _make_environment(watched).get_template("report.html.jinja").render(context)


def _place_samples(
    samples: VerifiedSamples | None, main: ReportSource, hints: Mapping[int, str]
) -> dict[str, Any] | None:
    """What `verify` sampled, with the names that the page has for the features and the panel of their dictionary, if it is there."""
    if samples is None:
        return None
    panels = [
        place for place, view in enumerate(main.views) if view.described["identity"] == samples.identity
    ]
    panel = panels[0] if panels else None
    features = samples.reader.features
    names = (
        name_features(main.views[panel], features, hints if panel == 0 else {})
        if panel is not None
        else [(feature, "") for feature in features]
    )
    return {"reader": samples.reader, "names": names, "panel": panel}


def _make_environment(watched: Mapping[str, int]) -> Environment:
    environment = Environment(
        loader=PackageLoader("trl_sae_audit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "sanitize": sanitize_excerpt,
        "number": format_number,
        "link": lambda text, brief=False: link_features(text, watched, brief=brief),
    }
    return environment


def _read_template(name: str) -> str:
    return (resources.files("trl_sae_audit.report") / "templates" / name).read_text(encoding="utf-8")


def _choose_title(sources: list[ReportSource]) -> str:
    if len(sources) > 1:
        return "Side by side: " + ", ".join(source.name for source in sources)
    name = sources[0].name
    return f"What the data of {name} would teach" if sources[0].kind == "audit" else f"What {name} taught"
