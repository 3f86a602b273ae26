"""What the columns of the page's tables are: heading, form, and a definition that says what it is, its unit and its sign."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from .lead import LEADS, Lead


@dataclass(frozen=True)
class Column:
    """A column of numbers of every feature.

    Attributes:
        name: in the table of features.
        heading: what a table shows.
        form: how the script writes a number: "signed", "scaled" (attribution), "lead", "plain", "percent" or "probability".
    """

    name: str
    heading: str
    form: str


COLUMNS = (
    Column("lead", "", "lead"),
    Column("lead_margin", "±", "lead_margin"),
    Column("lead_q", "q", "probability"),
    Column("selection", "selection", "signed"),
    Column("disparity", "disparity", "signed"),
    Column("predicted_change", "on given text", "signed"),
    Column("attribution", "attribution", "scaled"),
    Column("margin", "± of it", "scaled_margin"),
    Column("q_value", "q of it", "probability"),
    Column("share", "share", "percent"),
    Column("lift", "lift", "plain"),
    Column("positive", "positive", "scaled"),
    Column("negative", "negative", "scaled"),
    Column("trend_tau", "trend", "signed"),
    Column("trend_q_value", "trend q", "probability"),
    Column("length_correlation", "length corr.", "signed"),
    Column("active_examples", "active in", "plain"),
)
"""In the order of the table of all features; which of them a page has depends on what is known."""


@dataclass(frozen=True)
class MapName:
    """What a map over time shows: its heading, its unit, and what a cell is."""

    heading: str
    unit: str
    meaning: str


MAP_NAMES = {
    "generation_drift": MapName(
        "in what the model writes",
        "standard deviations over answers",
        "The drift in generations after each look, against the start, in standard deviations over the answers.",
    ),
    "selection": MapName(
        "selected for",
        "a step",
        "Mean selection per step in that part of the run: which features the answers have that training made likelier.",
    ),
    "activation": MapName(
        "in the rollouts",
        "mean activation",
        "Mean activation in the answers that the model wrote for training in that part of the run, less that in the first part.",
    ),
    "attribution": MapName(
        "asked by the loss",
        "a step",
        "Mean attribution per step in that part of the run: what the loss asked of the layer, not what came of it.",
    ),
}
"""By the names of `View.over_time`."""

_LEFT_OUT = {
    "attribution": ("attribution", "margin", "q_value"),
    "selection": ("selection",),
    "generation_effect_size": ("lead_q",),
}
"""By the score that leads: columns that are its own once more, and the q-value that a drift does not have."""


def describe_columns(
    known: Container[str], lead: Lead, unit: str, loss_unit: str, sides: tuple[str, str] | None
) -> list[dict[str, str]]:
    """Name, heading and form of each column of a page's table of all features.

    Args:
        known: columns that there are.
        lead: the score that leads; its own columns are shown once.
        unit, loss_unit: the power of ten of that score and of attribution.
        sides: names of the two sides; None leaves their columns out.
    """
    headings = {"lead": f"{lead.heading}{unit}", "attribution": f"attribution{loss_unit}"}
    if sides:
        headings |= {"positive": sides[0], "negative": sides[1]}
    left_out = _LEFT_OUT.get(lead.name, ()) + (() if sides else ("positive", "negative"))
    return [
        {"name": column.name, "heading": headings.get(column.name, column.heading), "form": column.form}
        for column in COLUMNS
        if column.name in known and column.name not in left_out
    ]


def define_columns(kind: str, sides: tuple[str, str] | None, lead: Lead) -> list[tuple[str, str, str]]:
    """Name, heading and definition of everything that stands over a column of the page: what it is, its unit, its sign.

    Args:
        kind: "run" or "audit".
        sides: names of the loss's two sides.
        lead: the score that leads.
    """
    run = kind == "run"
    over_run = " Summed over the run's steps." if run else " Of the mean loss over the examples."
    q = {
        "generation_effect_size": "The drift has no such test: it counts as beyond chance if its 95% interval excludes 0.",
        "effect_size": "From a sign-flip test over the examples, of the selection.",
    }.get(lead.name, "Every example of every step counts as new, so over several epochs it is too small." if run
          else "From a sign-flip test over the examples.")  # fmt: skip
    found = [
        (each.name, each.heading, each.meaning + (over_run if each.summed else "") + " " + each.unit)
        for each in LEADS
    ]
    found += [
        ("words", "words", "The phrases around the places where the feature is most active, most shared first; and what its direction "
         "raises, if evidence was gathered. They describe the feature, they are not its name."),
        ("lead_margin", "±", "Half of the 95% interval, in the unit of the number before it."),
        ("lead_q", "q", "Of the features with q ≤ 0.05, at most one in twenty is expected to be chance. No unit, 0 to 1. Grey: not beyond "
         "chance. " + q),
        ("disparity", "disparity", "Share of chosen answers in which the feature is active, less that of rejected ones: the measure of methods "
         "that look at the data only. A difference of shares, −1 to 1; positive: more in the chosen."),
        ("predicted_change", "on given text", "What one optimizer step on the data does to the feature's mean activation on held-out "
         "answers, to first order. In units of activation; positive: it becomes more active."),
        ("margin", "± of it", "Half of the attribution's 95% interval, in its unit."),
        ("q_value", "q of it", "As q, of the attribution."),
        ("share", "share", f"The part of the gradient's squared norm along the feature{', mean over steps' if run else ''}. Percent, no sign. "
         "Features overlap, so shares do not add up."),
        ("lift", "lift", "The share divided by that of a random direction. A ratio: 1 is chance, 5 is five times as much."),
        ("length_correlation", "length corr.", "Correlation of the examples' contributions with how much longer the chosen answer is, −1 to 1. "
         "Near ±1 the feature may only stand for length. Known where the data were audited."),
        ("active_examples", "active in", "Examples in which the feature is active in any answer. A count."),
        ("interval", "interval", "From the lower to the upper end of the 95% interval, on one axis for the whole table. The thin line is 0; "
         "to the right of it, more."),
    ]  # fmt: skip
    if sides:
        found += [
            ("positive", sides[0], f"The attribution from the {sides[0]} side of the loss only. The two sides add up to it."),
            ("negative", sides[1], f"The attribution from the {sides[1]} side of the loss only."),
        ]  # fmt: skip
    if run:
        found += [
            ("trend_tau", "trend", "Kendall's τ of the attribution against time, from −1, falling, to +1, rising. Grey: not beyond chance."),
            ("trend_q_value", "trend q", "As q, of the trend."),
            ("when", "when", "From the sum over time of what moved the group's features (of a drift: from the drift itself). Early: half of the "
             "final change had come about after a third of the steps. Late: half came in the last third. Comes and goes: it was once "
             "more than twice what is left at the end. Throughout: none of these."),
            ("half_by", "half by step", "The step from which on at least half of the final change is there."),
        ]  # fmt: skip
    return found
