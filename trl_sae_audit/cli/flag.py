"""`trl-sae-audit flag`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..console import single_line
from ..errors import AuditError
from ..flags import Flag, append_flag
from .options import OutputArguments
from .parser import option

if TYPE_CHECKING:
    from ..io.feature_labels import Label

DESCRIPTION = "Mark a feature of an audit, or a family of features, as one that should not be taught, in a file that people read and edit."
EXAMPLE = """\
trl-sae-audit flag runs/audit --feature 1423 --label sycophancy \\
    --reason 'agrees with wrong beliefs'
trl-sae-audit flag runs/audit --family 3 --label sycophancy"""


@dataclass
class FlagArguments:
    """The flag."""

    audit: str = option("Directory of the audit.", positional=True)
    feature: int | None = option("Index of the feature.", None, main=True)
    family: int | None = option(
        "Or a family of features, by the number that the audit's table shows: all of them.", None, main=True
    )
    label: str = option(
        "What to call it; default the label that the audit has of it, if any.", "", main=True, text=True
    )
    reason: str = option("Why it is flagged.", "", main=True, text=True)
    weight: float = option("Its weight relative to the other flags.", 1.0)
    direction: Literal["up", "down", "both"] = option(
        "up: training should not strengthen the feature; down: not weaken it; both.", "up"
    )
    flags: str = option("The file; created if it does not exist.", "flags.yaml")


OPTIONS = (FlagArguments, OutputArguments)
_HALF_WIDTH = 1.96  # as statistics.NORMAL_QUANTILE, which would import torch


def run(arguments: FlagArguments, output: OutputArguments) -> int:
    from ..audit.content import (
        read_dictionary_info,
        read_family,
        read_feature,
        read_feature_label,
        read_feature_words,
    )

    audit = Path(arguments.audit)
    dictionary = read_dictionary_info(audit)
    if (arguments.feature is None) == (arguments.family is None):
        raise AuditError("Name one feature with --feature, or a family with --family.")
    if arguments.family is None:
        assert arguments.feature is not None
        features = [arguments.feature]
    else:
        features = read_family(audit, arguments.family)
    known = None if arguments.label else read_feature_label(audit, dictionary, features[0])
    label = arguments.label if known is None else known.text
    if arguments.family is not None:
        label = label or f"family {arguments.family}"
    added = []
    for feature in features:
        flag = Flag(
            dictionary=dictionary.name,
            feature=feature,
            label=label,
            reason=arguments.reason,
            weight=arguments.weight,
            direction=arguments.direction,
            identity=dictionary.identity,
            audit=str(audit.resolve()),
        )
        flag.check(dictionary)
        added.append(replace(flag, words=read_feature_words(audit, feature)))
    flag, row = added[0], read_feature(audit, features[0])
    flags = append_flag(arguments.flags, *added)
    family = f" and {len(added) - 1} more that move with it" if len(added) > 1 else ""
    output.show(
        {"flags": arguments.flags, "number": len(flags), "flag": flag, "found": row, "features": features},
        f"Flagged {flag.name} ({flag.dictionary}/{flag.feature}{family}): {_describe(row)}.",
        *([f"Its label is {_origin(known)}."] if known is not None else []),
        *_warn_of_direction(flag, row),
        *([f"Words: {flag.words}"] if flag.words else []),
        single_line(f"{arguments.flags} has {len(flags)} {'flag' if len(flags) == 1 else 'flags'}."),
    )
    return 0


def _origin(label: Label) -> str:
    """Where a label is from and how well it does."""
    score = "" if label.detection is None else f"; detection {label.detection}"
    return f"the audit's, {' by '.join(filter(None, ('from ' + label.source, label.explainer)))}{score}"


def _describe(row: Mapping[str, Any]) -> str:
    """What is predicted of generations or selected for, with its 95 % interval, then the attribution."""
    parts = []
    if math.isfinite(row.get("effect_size", math.nan)):
        half = (row["effect_size_high"] - row["effect_size_low"]) / 2
        parts.append(f"effect size {row['effect_size']:+.2g} ± {half:.1g}")
    if "selection" in row:
        half = _HALF_WIDTH * row["selection_standard_error"]
        parts.append(f"selection {row['selection']:+.2g} ± {half:.1g}, q {row['selection_q_value']:.2g}")
    half = _HALF_WIDTH * row["standard_error"]
    parts.append(f"attribution {row['attribution']:+.2g} ± {half:.1g}, q {row['q_value']:.2g}")
    return "; ".join(parts)


def _warn_of_direction(flag: Flag, row: Mapping[str, Any]) -> list[str]:
    low, high = (row.get(f"effect_size_{end}", math.nan) for end in ("low", "high"))
    if flag.direction == "up" and high < 0:
        return [
            "These data weaken it, and filter refuses such a flag: with --direction down it says that the feature should not be weakened."
        ]
    if flag.direction == "down" and low > 0:
        return [
            "These data strengthen it, and filter refuses such a flag: with --direction up it says that it should not be strengthened."
        ]
    return []
