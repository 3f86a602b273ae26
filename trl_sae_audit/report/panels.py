"""One dictionary of the page's subject: its tables and maps, and what the script needs of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import curves
from .charts import Drawing
from .columns import MAP_NAMES, MapName, describe_columns
from .curriculum import Map, draw_curriculum_map
from .packing import build_card, encode_floats, pack_features
from .sources import ReportSource, View
from .tables import HeadTable, build_head_table


@dataclass(frozen=True)
class Panel:
    """One dictionary of the first source."""

    view: View
    head: HeadTable
    maps: dict[str, Map]
    watched: list[Drawing]
    watched_are_chosen: bool
    drift: list[Drawing]
    gradient: list[Drawing]


def build_panel(source: ReportSource, view: View) -> Panel:
    """Draw and tabulate what the page shows of a dictionary."""
    maps = {
        name: drawn
        for name, known in view.over_time.items()
        if (drawn := draw_curriculum_map(known.values, known.bins, view.watched.values(), level=known.level))
    }
    watched = curves.draw_watched(source, view)
    return Panel(
        view,
        build_head_table(source, view),
        maps,
        watched or curves.draw_largest(view),
        bool(watched),
        [
            chart
            for chart in (curves.draw_generation_drift(view), curves.draw_drift(view))
            if chart is not None
        ],
        curves.draw_gradient(view),
    )


def pack_panel(source: ReportSource, panel: Panel) -> dict[str, Any]:
    """What the page's script needs of a dictionary, for JSON."""
    view, head = panel.view, panel.head
    packed = pack_features(view.features)
    shown = describe_columns(
        packed["columns"], head.lead, head.scale.unit, head.loss_scale.unit, source.sides
    )
    used = {"clear", *(column["name"] for column in shown)}
    packed["columns"] = {name: values for name, values in packed["columns"].items() if name in used}
    return {
        "name": view.name,
        "identity": view.described["identity"],
        "neuronpedia": view.described.get("neuronpedia_id"),
        "size": len(view.features),
        "lead": head.lead.name,
        "heading": head.lead.heading,
        "unit": head.scale.unit,
        "factor": head.scale.factor,
        "loss_factor": head.loss_scale.factor,
        "shown": shown,
        **packed,
        "evidence": {
            str(feature): build_card(
                source.evidence.get((view.name, feature)), source.contexts.get((view.name, feature))
            )
            for dictionary, feature in {**source.contexts, **source.evidence}
            if dictionary == view.name
        },
        "maps": {name: _pack_map(drawn, MAP_NAMES[name]) for name, drawn in panel.maps.items()},
    }


def _pack_map(drawn: Map, named: MapName) -> dict[str, Any]:
    return {
        "heading": named.heading,
        "unit": named.unit,
        "features": drawn.features,
        "bins": drawn.bins.tolist(),
        "values": encode_floats(drawn.values),
        "starts": [group.start for group in drawn.groups],
        "rows": [group.rows for group in drawn.groups],
        "names": [group.name for group in drawn.groups],
        "height": drawn.height,
    }
