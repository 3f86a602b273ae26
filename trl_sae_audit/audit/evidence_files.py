"""Evidence: what a feature is about, to read as text and to keep beside an audit or a run record."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import AfterValidator, Field, NonNegativeInt

from ..errors import AuditError
from ..io.atomic import write_durably
from ..io.manifest import document, fit, read_document, reading
from ..statistics import NORMAL_QUANTILE
from ..text import sanitize

if TYPE_CHECKING:
    import pandas as pd

FILE = "evidence.json"
STATISTICS = (
    "effect_size", "effect_size_low", "effect_size_high", "selection", "selection_standard_error", "selection_q_value", "disparity",
    "standard_error", "lift", "length_correlation", "length_q_value",
)  # fmt: skip
"""What is kept of a feature's row in an audit, as far as it is there; besides `beyond_chance`, 1 or 0."""


def _check_size(value: float) -> float:
    if abs(value) > 1e300:
        raise ValueError(f"{value} is not a number to compute with")
    return value


Number: TypeAlias = Annotated[float, AfterValidator(_check_size)]
"""May be NaN, where a statistic is undefined."""


@dataclass(frozen=True)
class Context:
    """A place in an answer where a feature is active, see `Audit.contexts`.

    Attributes:
        kind: "strongest" or "drawn". source: the answer's side, or "generation". row: its number in the data, -1 of a generation.
        activation: of the feature there.
        prompt: the end of the prompt. before, at, after: the text around the place.
    """

    kind: str
    source: str
    row: int
    activation: Number
    prompt: str
    before: str
    at: str
    after: str


def contexts_in(rows: pd.DataFrame) -> list[Context]:
    """Rows of a table of contexts, such as `Audit.contexts`."""
    records: list[dict[Any, Any]] = rows[[each.name for each in fields(Context)]].to_dict("records")
    return [Context(**record) for record in records]


@dataclass(frozen=True)
class Evidence:
    """What there is to look at before a feature is flagged.

    Attributes:
        promotes, suppresses: tokens whose logits the direction raises and lowers most, through the model's own final
            norm and unembedding, as if nothing stood between the hook point and them.
        contexts: where it is active in the answers, the strongest first.
        link: of the feature's page on Neuronpedia, where the dictionary has an id there.
    """

    dictionary: str
    feature: NonNegativeInt
    label: str
    attribution: Number
    q_value: Number
    promotes: list[str]
    suppresses: list[str]
    contexts: list[Context]
    link: Annotated[str, Field(pattern="^https://")] | None = None
    statistics: dict[str, Number] = field(default_factory=dict)
    words: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A section to read; in each context the place is in bold."""
        title = f"## Feature {self.feature}" + (f": {self.label}" if self.label else "")
        lines = [title, "", *([f"{_plain(self.words)}", ""] if self.words else []), *self._figures()]
        if self.link:
            lines.append(f"[Neuronpedia]({self.link})")
        lines += [
            "",
            f"Raises the logits of {_quoted(self.promotes)};",
            f"lowers those of {_quoted(self.suppresses)}.",
            "",
        ]
        for kind, title in (
            ("strongest", "Most active at:"),
            ("drawn", "Drawn at random where it is active:"),
        ):
            shown = [context for context in self.contexts if context.kind == kind]
            lines += [title, "", *map(_line, shown), ""] if shown else []
        return sanitize("\n".join(lines))

    def _figures(self) -> list[str]:
        """What the data would do to generations, then what the loss asks of the layer; ± is half a 95 % interval."""
        known = self.statistics
        parts = []
        if math.isfinite(known.get("effect_size", math.nan)):
            half = (known["effect_size_high"] - known["effect_size_low"]) / 2
            parts.append(f"effect size in generations {known['effect_size']:+.2g} ± {half:.1g}")
        if math.isfinite(known.get("selection", math.nan)):
            half = NORMAL_QUANTILE * known["selection_standard_error"]
            parts.append(
                f"selection {known['selection']:+.2g} ± {half:.1g} (q {known['selection_q_value']:.2g})"
            )
        if "disparity" in known:
            parts.append(f"disparity {known['disparity']:+.2f}")
        half = NORMAL_QUANTILE * known.get("standard_error", math.nan)
        margin = f" ± {half:.1g}" if math.isfinite(half) else ""
        loss = f"Attribution {self.attribution:+.3g}{margin}, q {self.q_value:.2g}: what the loss asks of the layer."
        lines = [f"{', '.join(parts)}.".capitalize(), loss] if parts else [loss]
        if known.get("beyond_chance") == 0:
            lines.append("Not beyond chance: too few pairs to tell; audit more before you flag it.")
        return lines


def write_evidence(directory: str | os.PathLike[str], evidence: Iterable[Evidence]) -> None:
    """Write `evidence.json`, which the report shows, and `evidence.md`, to read, into a directory.

    Raises:
        AuditError: the directory cannot be written.
    """
    found = list(evidence)
    content = document("evidence", {"evidence": [each.to_dict() for each in found]})
    directory = Path(directory)
    try:
        write_durably(directory / FILE, content)
        text = "\n".join(each.to_markdown() for each in found)
        write_durably(directory / "evidence.md", text.encode("utf-8"))
    except OSError as error:
        raise AuditError(
            f"The evidence could not be written to {directory} ({error.strerror}); check the directory."
        ) from error


def read_evidence(directory: str | os.PathLike[str]) -> dict[tuple[str, int], Evidence]:
    """(dictionary, feature) → what `write_evidence` wrote of it; empty where it never did.

    Raises:
        AuditError: the file is damaged, or of an unknown format.
    """
    path = Path(directory) / FILE
    if not path.exists():
        return {}
    content = read_document(path, "evidence")
    with reading(path):
        fit(list[Evidence], content.get("evidence"))
        found = [_evidence(entry) for entry in content["evidence"]]
    return {(each.dictionary, each.feature): each for each in found}


def _evidence(entry: dict[str, Any]) -> Evidence:
    """Texts as they were written, halves of surrogate pairs too, which `fit` replaces."""
    return Evidence(**{**entry, "contexts": [Context(**context) for context in entry["contexts"]]})


def _line(context: Context) -> str:
    where = context.source if context.row < 0 else f"{context.source}, row {context.row}"
    prompt = f"{_short(context.prompt)} ▸ " if context.prompt.strip() else ""
    text = f"{_plain(context.before)}**{_plain(context.at)}**{_plain(context.after)}"
    return f"- {where}, {context.activation:.3g}: {_plain(prompt)}{text}"


def _plain(text: str) -> str:
    return text.replace("\n", "↵").replace("*", "\\*")


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(f"`{text.strip() or repr(text)}`" for text in texts)


def _short(text: str, most: int = 80) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else "…" + flat[1 - most :]
