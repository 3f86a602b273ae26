"""The sections of a page, for its table of contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def name_sections(context: Mapping[str, Any]) -> dict[str, str]:
    """Id and title of every section that the page has, in its order."""
    main, panels, sources = context["main"], context["panels"], context["sources"]
    found = {"short": "In short"}
    if context["outcomes"]:
        found["outcomes"] = "What the model does"
    if context["compared"]:
        pushed = context["lead"].name == "attribution"
        found["compared"] = f"{'What the losses pushed' if pushed else 'Which features rise'}, side by side"
    for place, panel in enumerate(panels):
        of = f" in {main.name}" if len(sources) > 1 else ""
        of += f", dictionary {panel.view.name}" if len(panels) > 1 else ""
        pushed = panel.head.lead.name == "attribution"
        title = "What the loss pushed" if pushed else "What the run taught"
        found[f"features-{place}"] = (
            "What training on this data would teach" if main.kind == "audit" else title
        ) + of
        if panel.maps:
            found[f"map-{place}"] = f"When it was taught{of}"
        if panel.watched:
            title = "Watched features" if panel.watched_are_chosen else "The largest features over time"
            found[f"curves-{place}"] = title + of
    if context["reader"]:
        found["rollouts"] = "What it writes, before and after"
    for name, title in (
        ("topics", "Where one topic differs"),
        ("families", "Features that go together"),
        ("filtered", "What the filter dropped, and why"),
        ("verified", "Did the scores predict what training did?"),
    ):
        if context[name]:
            found[name] = title
    found["all"] = "All features"
    if context["shaping"]:
        found["shaping"] = "Reward and penalty"
    for place, panel in enumerate(panels):
        if panel.gradient:
            of = f", {panel.view.name}" if len(panels) > 1 else ""
            found[f"fit-{place}"] = f"Gradient and fit of the dictionary{of}"
    if context["trainer"]:
        found["trainer"] = "The trainer's own numbers"
    return found | {"glossary": "What the columns mean", "about": "About this page"}
