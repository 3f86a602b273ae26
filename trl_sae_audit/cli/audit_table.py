"""What `audit` prints: the features in front, what they rest on, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..console import table
from .audit_next import next_commands, report_command
from .audit_topics import SIGNIFICANT, topic_document, topic_parts
from .options import OutputArguments

if TYPE_CHECKING:
    import pandas as pd

    from ..audit.result import Audit
    from .fail_on import Finding


def show(audit: Audit, top: int, output: OutputArguments, findings: Sequence[Finding] = ()) -> None:
    """Print the features in front, what they rest on, and what to do next."""
    from ..io.feature_labels import caption

    features, beyond = audit.ranking(), audit.beyond_chance()
    sizes = features["family"].value_counts()
    leads = (features["family"] == 0) | ~features["family"].duplicated()
    rows = features[leads].head(top).to_dict("records")
    shown = [column for column in _COLUMNS if column.name in features]
    lead = audit.leads_with()
    if lead == "selection":
        shown.sort(key=lambda column: column.name not in _SELECTION)
    in_topics = topic_parts(audit)
    headings = ("feature", "family", *(column.heading for column in shown))
    output.show(
        {
            "audit": audit.directory,
            "dictionary": audit.dictionary.name,
            "objective": audit.manifest["loss"]["objective"],
            "examples": len(audit),
            "features": len(features),
            "beyond_chance": len(beyond),
            "lookahead": audit.lookahead,
            "top": rows,
            **topic_document(audit),
            "fail_on": findings,
        },
        table(
            f"{_size(audit)}, {len(features)} features of {audit.dictionary.name}{_transcoder(audit)}",
            {**dict.fromkeys(headings, "right"), "words": "left"},
            [
                [
                    str(row["feature"]),
                    f"{row['family']}: +{sizes[row['family']] - 1}" if row["family"] else "",
                    *(column.cell(row) for column in shown),
                    caption(row) or "–",
                ]
                for row in rows
            ],
            words="words",
            optional=[column.heading for column in reversed(shown[2:])],
        ),
        *_explain(audit, features, lead),
        *([_FAMILY] if any(row["family"] for row in rows) else []),
        *(_also_selected(beyond, rows) if lead == "effect_size" else []),
        f"Beyond chance (q < {SIGNIFICANT:g}): {len(beyond)} of {len(features)} features.",
        *in_topics,
        *_next(audit, lead, rows, beyond, bool(in_topics)),
        *map(str, findings),
    )


def _also_selected(beyond: pd.DataFrame, rows: Sequence[Mapping[Hashable, Any]]) -> list[Any]:
    """The features that the data select for most surely, as far as the table by effect size does not have them: what the model
    never says by itself is in no sampled answer, and has no effect there."""
    from ..audit.leading import selection_in_standard_errors
    from ..io.feature_labels import caption

    if "selection" not in beyond:
        return []
    surely = selection_in_standard_errors(beyond).abs().sort_values(ascending=False)
    others = beyond.loc[surely.index]
    found = others[~others["feature"].isin([row["feature"] for row in rows])].head(_ALSO).to_dict("records")
    if not found:
        return []
    columns = [column for column in _COLUMNS if column.name in _SELECTION]
    return [
        table(
            "Also beyond chance, the most certain by selection first",
            {**dict.fromkeys(("feature", *(column.heading for column in columns)), "right"), "words": "left"},
            [
                [str(row["feature"]), *(column.cell(row) for column in columns), caption(row) or "–"]
                for row in found
            ],
            words="words",
        )
    ]


@dataclass(frozen=True)
class _Column:
    """A column of the table: of what, under which heading, in which form, and the half-width of its interval."""

    name: str
    heading: str
    form: str
    around: Callable[[Mapping[Hashable, Any]], float] | None = None

    def cell(self, row: Mapping[Hashable, Any]) -> str:
        value = row[self.name] if self.around is None else self.around(row)
        return format(value, self.form) if math.isfinite(value) else "–"


_COLUMNS = (
    _Column("effect_size", "effect\nsize", "+.1e"),
    _Column("effect_size", "±", ".0e", lambda row: (row["effect_size_high"] - row["effect_size_low"]) / 2),
    _Column("selection", "selection", "+.1e"),
    _Column("selection_q_value", "q", ".2g"),
    _Column("disparity", "disparity", "+.2f"),
    _Column("projection_difference", "projection\ndifference", "+.1e"),
    _Column("attribution", "attri-\nbution", "+.1e"),
    _Column("q_value", "q of it", ".2g"),
)


_ALSO = 5
_SELECTION = ("selection", "selection_q_value")
"""The columns in front where selection leads."""


def _explain(audit: Audit, features: pd.DataFrame, lead: str) -> list[str]:
    lines = []
    loss, about = audit.manifest["loss"], audit.lookahead
    answers, favours = _WORDS[loss["objective"]]
    if "rewards" in loss:
        judged = f"{loss['judged']:,} of {len(audit):,} answers judged"
        mean = "" if loss["mean_reward"] is None else f", mean reward {loss['mean_reward']:.3g}"
        lines.append(
            f"Reward: {' + '.join(loss['rewards'])}; {judged}{mean}; {loss['deciding_prompts']:,} of {loss['prompts']:,} prompts have "
            "answers that are paid differently."
        )
        if not loss["deciding_prompts"]:
            return [*lines, "There is nothing to learn: every advantage is 0, and so is every figure above."]
    if about is not None and about["sampling"] is not None:
        held = "held out of the data" if about["held_out"] else "of the data, too few to hold some out"
        lines.append(
            f"Effect size: what a step on {about['pairs']:,} {answers} does to the feature in the model's own answers, {about['sampling']['answers']} "
            f"to each of {about['prompts']} prompts {held}, in standard deviations over them. ±: 95 % interval."
        )
        if lead == "selection":
            effects = features[["effect_size_low", "effect_size_high"]].dropna()
            clear = int(((effects["effect_size_low"] > 0) | (effects["effect_size_high"] < 0)).sum())
            lines.append(
                f"These effects say nothing: {clear:,} of {len(effects):,} intervals exclude 0, and {len(effects) / 20:,.0f} would by chance. So the "
                "table is ordered by selection in standard errors. More prompts (--lookahead_prompts) tell more, but not of what the model "
                "never says."
            )
    if loss["objective"] == "reward":
        lines.append(
            "Attribution: how much the mean reward rises with the feature. Selection: the feature in the answers that the model pays more "
            "for. Disparity: in the chosen ones."
        )
    else:
        lines.append(
            f"Positive: training on this data makes the feature more frequent. Selection: what {favours}. Attribution: what the loss asks "
            "of the layer, which says little of generations."
        )
    return lines


_FAMILY = "Family: its number and how many more features are in it, active in the same answers and pushed the same way; a family is one line."
_WORDS = {
    "dpo": ("pairs", "the labels favour"),
    "reward": ("pairs", "the reward favours"),
    "policy_gradient": ("answers", "the reward favours among the answers to a prompt"),
}
"""By objective: what a step is taken on, and what selects."""


def _transcoder(audit: Audit) -> str:
    from ..io.dictionaries import describe_place

    return f" at {describe_place(audit.manifest['dictionary'])}" if audit.dictionary.reads else ""


def _size(audit: Audit) -> str:
    loss = audit.manifest["loss"]
    return (
        f"{len(audit)} answers to {loss['prompts']} prompts"
        if "prompts" in loss
        else f"{len(audit)} examples"
    )


def _next(
    audit: Audit, lead: str, rows: list[dict[Hashable, Any]], beyond: pd.DataFrame, in_topics: bool
) -> list[Any]:
    if beyond.empty and not in_topics:
        what = "prompts" if "prompts" in audit.manifest["loss"] else "pairs"
        return [
            f"Too few {what} to tell; audit more. No feature is offered to flag.",
            *report_command(audit.directory),
        ]
    return next_commands(audit.directory, rows, lead, set(beyond["feature"]))
