"""The first screen: one chart of what the model writes more and less of, the sentence that sums it up, and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from ..text import sanitize, sanitize_excerpt
from .axes import Scale, Whisker, find_reach
from .comparison import FeatureRow, Measure
from .curriculum import Group
from .lead import Lead, known_leads, read_lead
from .sentences import NO_FIT, describe_outcome, name_feature
from .sources import ReportSource, View
from .tables import strip_number
from .text import format_count, format_signed

_EACH_WAY = 5
_COMPARED = 6
_WORDS = 90

_TITLES = {
    "generation_effect_size": "What the model writes more (right) and less (left) of than at the start",
    "effect_size": "What the model would write more (right) and less (left) of",
    "selection": "What was selected for (right) and against (left) in the answers",
    "attribution": "What the loss pushed up (right) and down (left)",
}
_MORE = {
    "generation_effect_size": ("the model writes more of {up}", "less of {down}"),
    "effect_size": ("trained on these data, the model would write more of {up}", "less of {down}"),
    "selection": ("answers with {up} were made likelier", "answers with {down} less likely"),
    "attribution": ("the loss pushed towards {up}", "away from {down}; what the model writes was not looked at"),
}  # fmt: skip


@dataclass(frozen=True)
class Bar:
    """One source's value of a feature. `clear`: beyond chance."""

    source: int
    whisker: Whisker
    text: str
    clear: bool


@dataclass(frozen=True)
class FrontRow:
    """A feature on the first screen: its label if it has one, its words, and a bar of each source that has it."""

    feature: int
    label: str
    words: str
    bars: list[Bar]


@dataclass(frozen=True)
class Verdict:
    """What to think of it, in a sentence.

    Attributes:
        kind: "stop" (believe nothing), "open" (nothing can be told), "act" (something should be done), "fine".
        word: before the sentence.
    """

    kind: str
    word: str
    text: str


@dataclass(frozen=True)
class Front:
    """The first screen.

    Attributes:
        sentence: that sums it up.
        rows: those that rise, then those that fall; of several runs the watched ones, then where pressure moved.
        ends: of the common axis, as text.
    """

    sentence: str
    verdict: Verdict
    title: str
    unit: str
    rows: list[FrontRow]
    ends: tuple[str, str]


def build_front(
    sources: Sequence[ReportSource],
    measures: Sequence[Measure],
    compared: Sequence[FeatureRow],
    about: Mapping[int, str],
    labels: Mapping[int, str],
) -> Front:
    """Build the first screen of a page.

    Args:
        sources: the first is the page's subject.
        measures, compared: of `compare_outcomes` and `compare_features`.
        about: feature → a few words about it.
        labels: feature → its label, of those that are not watched.
    """
    view = sources[0].views[0]
    lead = compared[0].lead if compared else known_leads(view.features)[0]
    frame = _ranked(view, lead)
    values = _compared_values(compared) if compared else _leading_values(frame)
    ends = [end for _, _, bars in values for _, *numbers, _ in bars for end in numbers]
    reach = find_reach(ends)
    scale = Scale.of(
        pd.Series([value for _, _, bars in values for _, value, *_ in bars], dtype=float).to_numpy()
    )
    rows = [
        FrontRow(
            feature,
            strip_number(feature, sanitize_excerpt(label or labels.get(feature, ""), 80)),
            sanitize_excerpt(about.get(feature, "").split("; raises")[0], _WORDS),
            [
                Bar(place, Whisker.between((-reach, reach), low, value, high), format_signed(scale(value), 2, padded=True), clear)
                for place, value, low, high, clear in bars
            ],
        )
        for feature, label, bars in values
    ]  # fmt: skip
    return Front(
        _sum_up(sources, measures, frame, lead, about, labels),
        judge(sources, measures, compared),
        _TITLES[lead.name],
        f"{lead.heading}{' per step' if compared and lead.summed else ''}{scale.unit}",
        rows,
        (format_signed(scale(-reach), 2), format_signed(scale(reach), 2)),
    )


_Values = list[tuple[int, str, list[tuple[int, float, float, float, bool]]]]
"""Feature, label, and by source its value, the ends of its interval, and whether it is beyond chance."""


def _ranked(view: View, lead: Lead) -> pd.DataFrame:
    frame = view.features.join(read_lead(view.features, lead).add_prefix("lead_"))
    frame = frame[frame["lead_rank"] >= 0]
    return frame.sort_values("lead_rank", ascending=False, kind="stable")


def _leading_values(frame: pd.DataFrame) -> _Values:
    chosen = [
        frame[sign * frame["lead_value"] > 0].head(_EACH_WAY).sort_values("lead_value", ascending=False)
        for sign in (1, -1)
    ]
    return [
        (
            int(row["feature"]),
            str(row["label"]),
            [(0, row["lead_value"], row["lead_low"], row["lead_high"], bool(row["lead_clear"]))],
        )
        for part in chosen
        for row in part.to_dict("records")
    ]


def _compared_values(compared: Sequence[FeatureRow]) -> _Values:
    return [
        (
            row.feature,
            row.label,
            [
                (place, value.estimate, value.low, value.high, value.clear)
                for place, value in enumerate(row.values)
                if value is not None
            ],
        )
        for row in compared[:_COMPARED]
    ]


def _sum_up(
    sources: Sequence[ReportSource],
    measures: Sequence[Measure],
    frame: pd.DataFrame,
    lead: Lead,
    about: Mapping[int, str],
    labels: Mapping[int, str],
) -> str:
    """What the models do, where it was measured; else the first features beyond chance in each direction, in words."""
    for measure in sorted(measures, key=lambda each: not each.wanted):
        if told := describe_outcome(measure, sources):
            return told
    parts = []
    for sign, (name, text) in zip((1, -1), zip(("up", "down"), _MORE[lead.name], strict=True), strict=True):
        rows = frame[(sign * frame["lead_value"] > 0) & frame["lead_clear"]].head(2).to_dict("records")
        if rows:
            parts.append(text.format(**{name: " and ".join(_quote(row, about, labels) for row in rows)}))
    if not parts:
        return "No feature's change can be told from chance."
    text = ", and ".join(parts)
    if len(sources) > 1:
        text = f"in {sources[0].name} {text}"
    return f"{text[0].upper()}{text[1:]}."


def _quote(row: Mapping, about: Mapping[int, str], labels: Mapping[int, str]) -> str:
    """“agreement: you are right” (feature 12): the label, if there is one, and the first phrase of the words."""
    feature = int(row["feature"])
    label = strip_number(feature, str(row["label"]) or labels.get(feature, ""))
    phrase = about.get(feature, "").split("; raises")[0].split(" · ")[0]
    text = ": ".join(dict.fromkeys(filter(None, (sanitize_excerpt(label, 60), sanitize_excerpt(phrase, 60)))))
    return f"“{text}” (feature {feature})" if text else name_feature(feature, "")


def name_group(view: View, group: Group, about: Mapping[int, str]) -> str:
    """A group of a map in words: the labels or first phrases of its leading features."""
    labels = {feature: label for label, feature in view.watched.items()}
    found = []
    for feature in group.leading:
        phrase = labels.get(feature) or about.get(feature, "").split("; raises")[0].split(" · ")[0]
        if phrase and phrase not in found:
            found.append(phrase)
    text = sanitize(" · ".join(found))
    whole = text[:_WORDS].rpartition(" ")[0].rstrip(" ·") or text[:_WORDS]
    return text if len(text) <= _WORDS else f"{whole} …"


def judge(
    sources: Sequence[ReportSource], measures: Sequence[Measure], compared: Sequence[FeatureRow]
) -> Verdict:
    """Say what to think of it: whether it can be believed, whether anything can be told, and what it asks for."""
    source, view = sources[0], sources[0].views[0]
    health = view.tables.get("health")
    if health is not None and float(health["token_fvu"].mean()) >= NO_FIT:
        return Verdict("stop", "Stop", "The dictionary does not fit this model: believe nothing below.")
    if source.status == "failed":
        return Verdict("stop", "Stop", "The run failed; this is how far it came.")
    if len(sources) > 1:
        return _judge_runs(sources, measures, compared)
    score = read_lead(view.features, known_leads(view.features)[0])
    clear = int(score["clear"].sum())
    of = f"{clear:,} of {format_count(len(view.features), 'feature')} {'is' if clear == 1 else 'are'} beyond chance"
    if not clear:
        more = "audit more pairs" if source.kind == "audit" else "train on more before you flag a feature"
        return Verdict("open", "Open", f"Nothing can be told: no feature is beyond chance; {more}.")
    watched = set(view.watched.values())
    risen = sum(bool(score["clear"][feature] and score["value"][feature] > 0) for feature in watched)
    if risen:
        return Verdict(
            "act", "Look", f"{risen} of {format_count(len(watched), 'watched feature')} rise; {of}."
        )
    if watched:
        return Verdict("fine", "Good", f"No watched feature rises; {of}.")
    wrong = "shape the reward" if source.kind == "run" and not source.sides else "filter or shape"
    return Verdict("act", "Look", f"{of[0].upper()}{of[1:]}. Read their cards; flag what should not be taught, then {wrong}.")  # fmt: skip


def _judge_runs(
    sources: Sequence[ReportSource], measures: Sequence[Measure], compared: Sequence[FeatureRow]
) -> Verdict:
    """Of each later run: in which measures it is clearly better and worse than the first; without measures, in the watched features."""
    told, worse_anywhere = [], False
    for place, source in enumerate(sources[1:], start=1):
        better: list[str] = []
        worse: list[str] = []
        for measure in measures:
            gap = measure.differences[place]
            if gap is not None and gap.clear and measure.wanted:
                improved = (gap.estimate > 0) == (measure.wanted == "up")
                (better if improved else worse).append(f"“{measure.name}”")
        rows = [] if measures else [row for row in compared if row.label]
        for row in rows:
            gap = row.differences[place]
            if gap is not None and gap.clear:
                (better if gap.estimate < 0 else worse).append(name_feature(row.feature, row.label))
        parts = [f"{word} in {' and '.join(names)}" for word, names in (("better", better), ("worse", worse)) if names]  # fmt: skip
        if rows:
            parts = [part.replace("better in", "less of").replace("worse in", "more of") for part in parts]
        told.append(f"{source.name}: {'; '.join(parts) or 'no clear difference'}")
        worse_anywhere |= bool(worse)
    moved = sum(row.rises_more for row in compared)
    end = f" {format_count(moved, 'feature rises', 'features rise')} clearly more than in {sources[0].name}: look at them." if moved else ""  # fmt: skip
    kind, word = ("act", "Look") if worse_anywhere else ("fine", "Better")
    return Verdict(kind, word, f"Against {sources[0].name}, {'; '.join(told)}.{end}")
