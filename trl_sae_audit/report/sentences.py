"""The report in a few sentences, generated from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..io.dictionaries import describe_place
from .comparison import Difference, FeatureRow, Measure
from .lead import SIGNIFICANT, Lead, known_leads, read_lead
from .sources import ReportSource, View
from .text import format_count, format_number, format_percent, format_probability, format_signed

POOR_FIT, NO_FIT = 0.5, 0.9
"""Unexplained share of a token's variance from which a dictionary is doubtful, and useless; as in `doctor`."""


def describe_source(source: ReportSource) -> str:
    """One line: trainer, steps, model, dictionary."""
    dictionaries = "; ".join(
        f"{view.described['d_sae']:,} features of the dictionary “{view.name}” at {describe_place(view.described)}"
        for view in source.views
    )
    path = str(source.manifest.get("model") or "")
    model = f"model “{path.rstrip('/').rsplit('/', 1)[-1]}”" if path else "a model without a name"
    if source.kind == "audit":
        objective = source.manifest["loss"]["objective"]
        return f"Audit before training ({objective}) of {format_count(source.amount, 'example')}, {model}, {dictionaries}."
    trainer = str(source.manifest.get("trainer", "Training")).removesuffix("Trainer")
    return f"{trainer}, {format_count(source.amount, 'optimizer step')}, {model}, {dictionaries}."


def summarize(
    sources: Sequence[ReportSource],
    measures: Sequence[Measure],
    rows: Sequence[FeatureRow],
    about: Mapping[int, str],
) -> list[str]:
    """Summarize the measured behaviour, the largest features, and how many of them are beyond chance.

    Args:
        sources: the first is the page's subject.
        measures, rows: of `compare_outcomes` and `compare_features`.
        about: feature → a few words about it.
    """
    source, view = sources[0], sources[0].views[0]
    of = f" of {source.name}" if len(sources) > 1 else ""
    largest, beyond = _describe_largest(source, view, about, of), _describe_significance(source, view)
    behaviour, beside = _describe_outcomes(measures, sources), _describe_comparison(rows, sources)
    risen = describe_risen(rows, sources, about)
    if not behaviour and not beside and not risen:
        return [sentence for sentence in (largest, beyond, _describe_trends(source, view)) if sentence]
    return [sentence for sentence in (*behaviour, beside, risen, largest, beyond) if sentence]


def name_feature(feature: int, label: str) -> str:
    """“agreement” (feature 12), or feature 12. A label that contains the number is not followed by it."""
    if not label:
        return f"feature {feature}"
    return f"“{label}”" if str(feature) in label.split() else f"“{label}” (feature {feature})"


_VERBS = {
    "generation_effect_size": (
        "In the model's generations{of} the largest rise is of {up}",
        "the largest fall of {down}",
    ),
    "effect_size": (
        "In the model's own answers a step on these data would strengthen most {up}",
        "and weaken most {down}",
    ),
    "selection": ("The {what}{of} selected most for {up}", "and most against {down}"),
}


def _describe_largest(source: ReportSource, view: View, about: Mapping[int, str], of: str) -> str:
    lead = known_leads(view.features)[0]
    if lead.name == "attribution":
        return _describe_push(source, view, about, of)
    frame = view.features.join(read_lead(view.features, lead).add_prefix("lead_"))
    frame = frame[frame["lead_rank"] >= 0].sort_values("lead_rank", ascending=False, kind="stable")
    first, second = _VERBS[lead.name]
    parts = []
    for sign, text in ((1, first), (-1, second)):
        rows = frame[sign * frame["lead_value"] > 0]
        if len(rows):
            told = f"{_describe_feature(rows.iloc[0], about)} ({_describe_value(rows.iloc[0], lead)})"
            what = "data" if source.kind == "audit" else "run"
            parts.append(text.format(up=told, down=told, of=of, what=what))
    text = ", ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _describe_value(row: pd.Series, lead: Lead) -> str:
    """drift +0.41 ± 0.03, not beyond chance."""
    margin = format_number((row["lead_high"] - row["lead_low"]) / 2, 2)
    doubt = "" if row["lead_clear"] else ", not beyond chance"
    return f"{lead.heading} {format_signed(row['lead_value'])} ± {margin}{doubt}"


def _describe_push(source: ReportSource, view: View, about: Mapping[int, str], of: str) -> str:
    frame = view.features
    up = frame.iloc[int(np.nanargmax(frame["attribution"]))]
    down = frame.iloc[int(np.nanargmin(frame["attribution"]))]
    many = len(frame) > 1 and up["attribution"] > 0 > down["attribution"]
    who = "Training on these examples would push" if source.kind == "audit" else f"The loss{of} pushed"
    first = (
        f"{who} hardest towards {_describe_feature(up, about)}, {_describe_strength(up)}"
        if up["attribution"] > 0
        else "Nothing was pushed up"
    )
    second = (
        f", and hardest away from {_describe_feature(down, about)}, {_describe_strength(down)}"
        if many
        else ""
    )
    return first + second + "."


def _describe_feature(row: pd.Series, about: Mapping[int, str]) -> str:
    feature = int(row["feature"])
    known = "" if row["label"] else about.get(feature, "").split(";")[0]
    return name_feature(feature, row["label"]) + (f", “{known}”" if known else "")


def _describe_strength(row: pd.Series) -> str:
    beyond = "" if row["q_value"] < SIGNIFICANT else ", not beyond chance"
    return f"with {format_number(row['lift'], 2)} times a random direction's share of the gradient (q {format_probability(row['q_value'])}{beyond})"


def _describe_significance(source: ReportSource, view: View) -> str:
    frame = view.features
    lead = known_leads(frame)[0]
    clear = read_lead(frame, lead)["clear"]
    significant = int(clear.sum())
    text = f"{significant:,} of {format_count(len(frame), 'feature')} " + (
        "are" if significant != 1 else "is"
    )
    test = "95% interval" if lead.name == "generation_effect_size" else f"q < {SIGNIFICANT}"
    text += f" beyond chance ({test})"
    if not significant:
        more = "audit more" if source.kind == "audit" else "train on more before you flag a feature"
        text += f": too few {'pairs' if source.kind == 'audit' else 'examples'} to tell; {more}"
    if "length_q_value" in frame and source.kind == "audit":
        equal = int((clear & (frame["length_q_value"] < SIGNIFICANT)).sum())
        text += f", {equal:,} of them also between answers of equal length"
    gradient = view.tables.get("gradient")
    if gradient is not None and len(gradient):
        k = source.manifest.get("config", {}).get("top_k")
        covered, chance = gradient["coverage"].mean(), gradient["coverage_random"].mean()
        text += (
            f"; the {k} largest features of a step span {format_percent(covered)} of its gradient, {k} random directions "
            f"{format_percent(chance)}"
        )
    return text + "."


def _describe_outcomes(measures: Sequence[Measure], sources: Sequence[ReportSource]) -> list[str]:
    """What changed in the models' behaviour: at most three measures, those with a wanted direction first."""
    chosen = sorted(measures, key=lambda measure: not measure.wanted)[:3]
    return [sentence for measure in chosen if (sentence := describe_outcome(measure, sources))]


def describe_outcome(measure: Measure, sources: Sequence[ReportSource]) -> str:
    """“flatters” (less is better) went from 40% to 90% in plain; it ended at 55% in filtered and at 50% in shaped."""
    main, before = measure.after[0], measure.before
    if main is None:
        return ""
    better = {"up": " (more is better)", "down": " (less is better)", "": ""}[measure.wanted]
    others = [
        (f"at {after.text()} in {source.name}", gap)
        for source, after, gap in zip(sources[1:], measure.after[1:], measure.differences[1:], strict=True)
        if after is not None
    ]
    ends = _join_with_doubts(others, f"not clearly different from {sources[0].name}")
    if before is None:
        return f"“{measure.name}”{better} ended at {main.text()} in {sources[0].name}{' and ' + ends if ends else ''}."
    unclear = " (no clear change)" if measure.change is not None and measure.change.unclear else ""
    text = (
        f"“{measure.name}”{better} went from {before.text()} to {main.text()} in {sources[0].name}{unclear}"
    )
    return f"{text}; it ended {ends}." if ends else f"{text}."


def _join_with_doubts(parts: Sequence[tuple[str, Difference | None]], doubt: str) -> str:
    """Join the parts, with the doubt after each part it applies to, or once after all if it applies to all."""
    doubted = [gap is not None and gap.unclear for _, gap in parts]
    if parts and all(doubted):
        return f"{_join_parts([part for part, _ in parts])} ({doubt})"
    return _join_parts(
        [f"{part} ({doubt})" if unclear else part for (part, _), unclear in zip(parts, doubted, strict=True)]
    )


def _join_parts(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _describe_comparison(rows: Sequence[FeatureRow], sources: Sequence[ReportSource]) -> str:
    """How the runs differ in the watched features: for one feature its values, for several how many differ."""
    rows = [row for row in rows if row.label]
    main = sources[0].name
    if not rows:
        return ""
    lead = rows[0].lead
    if len(rows) == 1:
        parts = [
            (f"{format_signed(value.estimate)} in {source.name}", gap)
            for source, value, gap in zip(sources, rows[0].values, rows[0].differences, strict=True)
            if value is not None
        ]
        first, rest = parts[0][0], _join_with_doubts(parts[1:], f"not clearly different from {main}")
        name = name_feature(rows[0].feature, rows[0].label)
        if lead.name == "attribution":
            return f"The loss pushed {name} by {first} and {rest}, on average over the steps."
        mean = ", on average over the steps" if lead.summed else ""
        return f"The {lead.heading} of {name} is {first} and {rest}{mean}."
    counts = []
    for place, source in enumerate(sources[1:], start=1):
        gaps = [row.differences[place] for row in rows]
        clear = sum(gap is not None and gap.clear for gap in gaps)
        counts.append(f"{clear} in {source.name}")
    what = "push" if lead.name == "attribution" else lead.heading
    return (
        f"Among the {len(rows)} watched features the {what} is clearly different from that in {main} for "
        f"{_join_parts(counts)}."
    )


def describe_risen(
    rows: Sequence[FeatureRow], sources: Sequence[ReportSource], about: Mapping[int, str]
) -> str:
    """How many features rise in each run, and which do so more than in the first: where pressure may have moved."""
    if not rows or rows[0].lead.name == "attribution":
        return ""
    lead = rows[0].lead
    counts = [
        f"{sum(value is not None and value.rises for value in (row.values[place] for row in rows))} in {source.name}"
        for place, source in enumerate(sources)
    ]
    verb = "Selected for" if lead.name == "selection" else "Rising in generations"
    text = f"{verb} beyond chance are {_join_parts(counts)}"
    more = [row for row in rows if row.rises_more]
    if not more:
        return f"{text}; none clearly more than in {sources[0].name}."
    named = [
        name_feature(row.feature, row.label)
        + (f", “{about[row.feature].split(';')[0]}”" if row.feature in about and not row.label else "")
        for row in more[:5]
    ]
    rest = f" and {len(more) - 5} others" if len(more) > 5 else ""
    return f"{text}; clearly more than in {sources[0].name}, where pressure may have moved: {'; '.join(named)}{rest}."


def _describe_trends(source: ReportSource, view: View) -> str:
    frame = view.features
    if source.kind == "audit":
        if "predicted_change" in frame:
            row = frame.iloc[int(np.nanargmax(frame["predicted_change"].abs()))]
            return (
                f"One optimizer step on this data would change {name_feature(int(row['feature']), row['label'])} most on the "
                f"held-out examples (mean activation {format_signed(row['predicted_change'])})."
            )
        if known_leads(frame)[0].name == "effect_size":
            return "This is predicted, of one optimizer step before any training. What training does was not measured."
        return "This is what the loss asks for, before any training. The effect of training was not measured."
    rising = int(((frame["trend_q_value"] < SIGNIFICANT) & (frame["trend_tau"] > 0)).sum())
    falling = int(((frame["trend_q_value"] < SIGNIFICANT) & (frame["trend_tau"] < 0)).sum())
    watched = "; ".join(_describe_trend(frame.iloc[feature]) for feature in list(view.watched.values())[:3])
    text = f"Over the run the push rose for {format_count(rising, 'feature')} and fell for {falling:,} (trend q < {SIGNIFICANT})"
    return f"{text}; watched: {watched}." if watched else text + "."


def _describe_trend(row: pd.Series) -> str:
    which = "rising" if row["trend_tau"] > 0 else "falling"
    clear = which if row["trend_q_value"] < SIGNIFICANT else "no clear trend"
    return f"{name_feature(int(row['feature']), row['label'])} {format_signed(row['attribution'])}, {clear}"


def find_warnings(source: ReportSource) -> list[str]:
    """What a reader must know before trusting the rest."""
    sentences = []
    if source.status == "failed":
        sentences.append(
            f"The run failed after {format_count(source.amount, 'optimizer step')}; the figures end there."
        )
    if source.status == "running":
        sentences.append(
            f"The run was still going, or had been killed, when this was written: {format_count(source.amount, 'optimizer step')} "
            "so far."
        )
    for view in source.views:
        sentences += _find_fit_warnings(view, len(source.views) > 1)
        skipped = int((~view.tables["gradient"]["finite"]).sum()) if "gradient" in view.tables else 0
        if skipped:
            sentences.append(
                f"In {format_count(skipped, 'step')} the gradient was not finite; every figure omits them."
            )
    passes = _count_epochs(source)
    if passes > 1.5:
        sentences.append(
            f"The run saw its data about {passes:.0f} times. The intervals and q-values count every repetition as a new "
            "example, so the intervals are too narrow and the q-values too small: read them as lower bounds."
        )
    sentences += _find_skipped_rows(source)
    return sentences


def _find_fit_warnings(view: View, several: bool) -> list[str]:
    health = view.tables.get("health")
    of = f" {view.name}" if several else ""
    if health is None or not np.isfinite(health["token_fvu"]).any():
        return []
    token = float(health["token_fvu"].mean())
    if token >= NO_FIT:
        return [
            f"The dictionary{of} does not fit this model: it leaves {format_percent(token)} of a token's variance unexplained. The "
            "names of its features mean nothing here. `trl-sae-audit doctor` helps to find one that fits."
        ]
    if token >= POOR_FIT:
        return [
            f"The dictionary{of} fits poorly: it leaves {format_percent(token)} of a token's variance unexplained. Behaviours that "
            "it misses cannot appear below."
        ]
    return []


def _count_epochs(source: ReportSource) -> float:
    """How often the run saw each example according to its log; 0 if the log does not say."""
    if source.log is None or not len(source.log):
        return 0.0
    epochs = source.log[source.log["name"] == "epoch"]["value"]
    return float(np.ceil(epochs.max() - 1e-6)) if len(epochs) else 0.0


def _find_skipped_rows(source: ReportSource) -> list[str]:
    rows = source.manifest.get("set_aside", []) if source.kind == "audit" else []
    notes: dict[str, Any] = source.manifest.get("notes", {}) if source.kind == "audit" else {}
    sentences = []
    if rows:
        sentences.append(
            f"{format_count(len(rows), 'row')} of the data could not be audited, e.g. row {rows[0][0]}, which {rows[0][1]}."
        )
    sentences += [
        f"{format_count(count, 'row')} {what}."
        for name, what in (("truncated", "were cut at max_length"), ("duplicates", "are exact duplicates"))
        if (count := notes.get(name, 0))
    ]
    return sentences


def _mapping(value: Any) -> Mapping[str, Any]:
    """Of a manifest that anybody may have written: what is no mapping says nothing."""
    return value if isinstance(value, Mapping) else {}


def list_provenance(source: ReportSource) -> list[tuple[str, str]]:
    """What is needed to repeat the run: versions, settings, directory."""
    manifest = source.manifest
    facts = [("directory", str(Path(source.directory))), ("status", source.status)]
    facts.append(("model", str(manifest.get("model") or "not named")))
    if "created" in manifest:
        facts.append(("started", str(manifest["created"])))
    facts += [(f"{name}", str(value)) for name, value in _mapping(manifest.get("versions")).items()]
    arguments = _mapping(manifest.get("arguments") or manifest.get("loss"))
    names = (
        "learning_rate", "beta", "loss_type", "per_device_train_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "max_steps", "max_length", "seed", "objective",
    )  # fmt: skip
    facts += [(name, str(arguments[name])) for name in names if name in arguments]
    for view in source.views:
        facts.append((f"identity of {view.name}", str(view.described["identity"])))
    return facts
