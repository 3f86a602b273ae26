"""The report in a few sentences, each made from the numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from .comparison import Difference, FeatureRow, Measure
from .sources import Source, View
from .text import counted, percent, plain, probability, signed

SIGNIFICANT = 0.05
POOR_FIT, NO_FIT = 0.5, 0.9
"""Shares of a token's variance left unexplained from which the dictionary is doubtful, and useless; as in `doctor`."""


def what_was_run(source: Source) -> str:
    """One line: trainer, steps, model, dictionary."""
    dictionaries = "; ".join(
        f"{view.described['d_sae']:,} features of the dictionary “{view.name}” at {view.described['hook_point']}"
        for view in source.views
    )
    path = str(source.manifest.get("model") or "")
    model = f"model “{path.rstrip('/').rsplit('/', 1)[-1]}”" if path else "a model without a name"
    if source.kind == "audit":
        objective = source.manifest["loss"]["objective"]
        return f"Audit before training ({objective}) of {counted(source.amount, 'example')}, {model}, {dictionaries}."
    trainer = str(source.manifest.get("trainer", "Training")).removesuffix("Trainer")
    return f"{trainer}, {counted(source.amount, 'optimizer step')}, {model}, {dictionaries}."


def in_short(
    sources: Sequence[Source],
    measures: Sequence[Measure],
    rows: Sequence[FeatureRow],
    about: Mapping[int, str],
) -> list[str]:
    """What came of it, where it was measured; the largest features; how much of it is beyond chance.

    Args:
        sources: the first is what the page is about.
        measures, rows: of `compare_outcomes` and `compare_features`.
        about: feature → what is known of it, in a few words.
    """
    source, view = sources[0], sources[0].views[0]
    of = f" of {source.name}" if len(sources) > 1 else ""
    largest, beyond = _largest(source, view, about, of), _beyond_chance(source, view)
    behaviour, beside = _outcomes(measures, sources), _side_by_side(rows, sources)
    if not behaviour and not beside:
        return [largest, beyond, _over_time(source, view)]
    return [sentence for sentence in (*behaviour, beside, largest, beyond) if sentence]


def named(feature: int, label: str) -> str:
    """“agreement” (feature 12), or feature 12; a label that has the number in it says it itself."""
    if not label:
        return f"feature {feature}"
    return f"“{label}”" if str(feature) in label.split() else f"“{label}” (feature {feature})"


def _largest(source: Source, view: View, about: Mapping[int, str], of: str) -> str:
    frame = view.features
    up = frame.iloc[int(np.nanargmax(frame["attribution"]))]
    down = frame.iloc[int(np.nanargmin(frame["attribution"]))]
    many = len(frame) > 1 and up["attribution"] > 0 > down["attribution"]
    who = "Trained on, these examples would push" if source.kind == "audit" else f"The loss{of} pushed"
    first = (
        f"{who} hardest towards {_told(up, about)}, {_how_strongly(up)}"
        if up["attribution"] > 0
        else "Nothing was pushed up"
    )
    second = f", and hardest away from {_told(down, about)}, {_how_strongly(down)}" if many else ""
    return first + second + "."


def _told(row: pd.Series, about: Mapping[int, str]) -> str:
    feature = int(row["feature"])
    known = "" if row["label"] else about.get(feature, "").split(";")[0]
    return named(feature, row["label"]) + (f", {known}" if known else "")


def _how_strongly(row: pd.Series) -> str:
    beyond = "" if row["q_value"] < SIGNIFICANT else ", not beyond chance"
    return f"with {plain(row['lift'], 2)} times the share of the gradient that a random direction has (q {probability(row['q_value'])}{beyond})"


def _beyond_chance(source: Source, view: View) -> str:
    frame = view.features
    significant = int((frame["q_value"] < SIGNIFICANT).sum())
    text = f"{significant:,} of {counted(len(frame), 'feature')} " + ("are" if significant != 1 else "is")
    text += f" beyond chance (q < {SIGNIFICANT})"
    if "length_q_value" in frame and source.kind == "audit":
        equal = int(((frame["q_value"] < SIGNIFICANT) & (frame["length_q_value"] < SIGNIFICANT)).sum())
        text += f", {equal:,} of them also between answers of equal length"
    gradient = view.tables.get("gradient")
    if gradient is not None and len(gradient):
        k = source.manifest.get("settings", {}).get("top_k")
        covered, chance = gradient["coverage"].mean(), gradient["coverage_random"].mean()
        text += (
            f"; the {k} largest of a step hold {percent(covered)} of its gradient, where {k} random directions hold "
            f"{percent(chance)}"
        )
    return text + "."


def _outcomes(measures: Sequence[Measure], sources: Sequence[Source]) -> list[str]:
    """What changed in the models' behaviour: of at most three measures, those first that are wanted to move."""
    chosen = sorted(measures, key=lambda measure: not measure.wanted)[:3]
    return [sentence for measure in chosen if (sentence := _outcome(measure, sources))]


def _outcome(measure: Measure, sources: Sequence[Source]) -> str:
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
    ends = _with_doubts(others, f"not clearly different from {sources[0].name}")
    if before is None:
        return f"“{measure.name}”{better} ended at {main.text()} in {sources[0].name}{' and ' + ends if ends else ''}."
    unclear = " (no clear change)" if measure.change is not None and measure.change.unclear else ""
    text = (
        f"“{measure.name}”{better} went from {before.text()} to {main.text()} in {sources[0].name}{unclear}"
    )
    return f"{text}; it ended {ends}." if ends else f"{text}."


def _with_doubts(parts: Sequence[tuple[str, Difference | None]], doubt: str) -> str:
    """The parts as a list, the doubt behind each that has it, or once behind all."""
    doubted = [gap is not None and gap.unclear for _, gap in parts]
    if parts and all(doubted):
        return f"{_listed([part for part, _ in parts])} ({doubt})"
    return _listed(
        [f"{part} ({doubt})" if unclear else part for (part, _), unclear in zip(parts, doubted, strict=True)]
    )


def _listed(parts: Sequence[str]) -> str:
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _side_by_side(rows: Sequence[FeatureRow], sources: Sequence[Source]) -> str:
    """How the runs' push on the watched features differs: of one feature its values, of several how many differ."""
    rows = [row for row in rows if row.label]
    main = sources[0].name
    if len(rows) == 1:
        parts = [
            (f"{signed(value[0])} in {source.name}", gap)
            for source, value, gap in zip(sources, rows[0].values, rows[0].differences, strict=True)
            if value is not None
        ]
        first, rest = parts[0][0], _with_doubts(parts[1:], f"not clearly different from {main}")
        return f"The loss pushed {named(rows[0].feature, rows[0].label)} by {first} and {rest}, on average over the steps."
    counts = []
    for place, source in enumerate(sources[1:], start=1):
        gaps = [row.differences[place] for row in rows]
        clear = sum(gap is not None and gap.clear for gap in gaps)
        counts.append(f"{clear} in {source.name}")
    if not rows:
        return ""
    return (
        f"Among the {len(rows)} watched features the push is clearly different from that in {main} for "
        f"{_listed(counts)}."
    )


def _over_time(source: Source, view: View) -> str:
    frame = view.features
    if source.kind == "audit":
        if "predicted_change" in frame:
            row = frame.iloc[int(np.nanargmax(frame["predicted_change"].abs()))]
            return (
                f"One optimizer step on this data would change {named(int(row['feature']), row['label'])} most on the "
                f"held-out examples (mean activation {signed(row['predicted_change'])})."
            )
        return (
            "This is what the loss asks for, before any training; what training makes of it was not measured."
        )
    rising = int(((frame["trend_q_value"] < SIGNIFICANT) & (frame["trend_tau"] > 0)).sum())
    falling = int(((frame["trend_q_value"] < SIGNIFICANT) & (frame["trend_tau"] < 0)).sum())
    watched = "; ".join(_trend(frame.iloc[feature]) for feature in list(view.watched.values())[:3])
    text = f"Over the run the push rose for {counted(rising, 'feature')} and fell for {falling:,} (trend q < {SIGNIFICANT})"
    return f"{text}; watched: {watched}." if watched else text + "."


def _trend(row: pd.Series) -> str:
    which = "rising" if row["trend_tau"] > 0 else "falling"
    clear = which if row["trend_q_value"] < SIGNIFICANT else "no clear trend"
    return f"{named(int(row['feature']), row['label'])} {signed(row['attribution'])}, {clear}"


def warnings(source: Source) -> list[str]:
    """What a reader must know before believing the rest."""
    found = []
    if source.status == "failed":
        found.append(
            f"The run failed after {counted(source.amount, 'optimizer step')}; the figures end there."
        )
    if source.status == "running":
        found.append(
            f"The run was still going on, or was killed, when this was written: {counted(source.amount, 'optimizer step')} "
            "so far."
        )
    for view in source.views:
        found += _fit_warnings(view, len(source.views) > 1)
        skipped = int((~view.tables["gradient"]["finite"]).sum()) if "gradient" in view.tables else 0
        if skipped:
            found.append(
                f"In {counted(skipped, 'step')} the gradient was not finite; they are left out of every figure."
            )
    passes = _passes(source)
    if passes > 1.5:
        found.append(
            f"The run saw its data about {passes:.0f} times. The intervals and q-values take every example as a new one, so "
            "they are too narrow and too small: read them as bounds."
        )
    found += _set_aside(source)
    return found


def _fit_warnings(view: View, several: bool) -> list[str]:
    health = view.tables.get("health")
    of = f" {view.name}" if several else ""
    if health is None or not np.isfinite(health["token_fvu"]).any():
        return []
    token = float(health["token_fvu"].mean())
    if token >= NO_FIT:
        return [
            f"The dictionary{of} does not fit this model: it leaves {percent(token)} of a token's variance unexplained. What the "
            "features are called says nothing here; `trl-sae-audit doctor` helps to find one that fits."
        ]
    if token >= POOR_FIT:
        return [
            f"The dictionary{of} fits poorly: it leaves {percent(token)} of a token's variance unexplained. Behaviours it "
            "missed cannot show up below."
        ]
    return []


def _passes(source: Source) -> float:
    """How often the run saw each example, as far as its arguments and log say; 0 where they do not."""
    if source.log is None or not len(source.log):
        return 0.0
    epochs = source.log[source.log["name"] == "epoch"]["value"]
    return float(np.ceil(epochs.max() - 1e-6)) if len(epochs) else 0.0


def _set_aside(source: Source) -> list[str]:
    rows = source.manifest.get("set_aside", []) if source.kind == "audit" else []
    notes: dict[str, Any] = source.manifest.get("notes", {}) if source.kind == "audit" else {}
    found = []
    if rows:
        found.append(
            f"{counted(len(rows), 'row')} of the data could not be audited; row {rows[0][0]} because it {rows[0][1]}."
        )
    found += [
        f"{counted(count, 'row')} {what}."
        for name, what in (("truncated", "were cut at max_length"), ("duplicates", "are exact duplicates"))
        if (count := notes.get(name, 0))
    ]
    return found


def provenance(source: Source) -> list[tuple[str, str]]:
    """What it takes to make the run again: versions, settings, where it lies."""
    manifest = source.manifest
    facts = [("directory", str(Path(source.directory))), ("status", source.status)]
    facts.append(("model", str(manifest.get("model") or "not named")))
    if "created" in manifest:
        facts.append(("begun", str(manifest["created"])))
    facts += [(f"{name}", str(value)) for name, value in manifest.get("versions", {}).items()]
    arguments = manifest.get("arguments") or manifest.get("loss") or {}
    names = (
        "learning_rate", "beta", "loss_type", "per_device_train_batch_size", "gradient_accumulation_steps",
        "num_train_epochs", "max_steps", "max_length", "seed", "objective",
    )  # fmt: skip
    facts += [(name, str(arguments[name])) for name in names if name in arguments]
    for view in source.views:
        facts.append((f"identity of {view.name}", str(view.described["identity"])))
    return facts
