"""Evidence: what a feature is about, to read as text and to keep beside an audit or a run record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import AuditError
from .record_files import write_durably
from .untrusted import read_json
from .visible_text import visible

FILE = "evidence.json"
VERSION = 1


@dataclass(frozen=True)
class Token:
    """A token of an answer: the feature's activation on it, and its part of the example's attribution."""

    text: str
    activation: float
    attribution: float


@dataclass(frozen=True)
class Example:
    """An example that drives a feature.

    Attributes:
        row: its number in the data.
        attribution: its part of the feature's attribution over the dataset.
        prompt, answers: its texts; the answers by side.
        tokens: by side, those of the answer and the one before it, whose logits enter the loss.
    """

    row: int
    attribution: float
    prompt: str
    answers: dict[str, str]
    tokens: dict[str, list[Token]]


@dataclass(frozen=True)
class Evidence:
    """What there is to look at before a feature is flagged.

    Attributes:
        promotes, suppresses: tokens whose logits the direction raises and lowers most, through the model's own final
            norm and unembedding, as if nothing stood between the hook point and them.
        examples: those with the largest attribution, up and down.
        link: of the feature's page on Neuronpedia, where the dictionary has an id there.
    """

    dictionary: str
    feature: int
    label: str
    attribution: float
    q_value: float
    promotes: list[str]
    suppresses: list[str]
    examples: list[Example]
    link: str | None = None
    statistics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_markdown(self) -> str:
        """A section to read; tokens with a large part in the attribution are in bold."""
        title = f"## Feature {self.feature}" + (f": {self.label}" if self.label else "")
        lines = [title, "", f"Attribution {self.attribution:+.3g}, q {self.q_value:.2g}."]
        if self.link:
            lines.append(f"[Neuronpedia]({self.link})")
        lines += [
            "",
            f"Raises the logits of {_quoted(self.promotes)};",
            f"lowers those of {_quoted(self.suppresses)}.",
            "",
        ]
        for example in self.examples:
            lines += [
                f"Row {example.row}, attribution {example.attribution:+.3g}. Prompt: {_short(example.prompt)}",
                "",
            ]
            lines += [f"- {side}: {_marked(tokens)}" for side, tokens in example.tokens.items()]
            lines.append("")
        return visible("\n".join(lines))


def write_evidence(directory: str | os.PathLike[str], evidence: Iterable[Evidence]) -> None:
    """Write `evidence.json`, which the report shows, and `evidence.md`, to read, into a directory.

    Raises:
        AuditError: the directory cannot be written.
    """
    found = list(evidence)
    content = {"version": VERSION, "evidence": [each.to_dict() for each in found]}
    directory = Path(directory)
    try:
        write_durably(directory / FILE, json.dumps(content).encode() + b"\n")
        text = "\n".join(each.to_markdown() for each in found)
        write_durably(directory / "evidence.md", text.encode("utf-8"))
    except OSError as error:
        raise AuditError(
            f"The evidence could not be written to {directory} ({error.strerror}); check the directory."
        ) from error


def read_evidence(directory: str | os.PathLike[str]) -> dict[tuple[str, int], Evidence]:
    """(dictionary, feature) → what `write_evidence` wrote of it; empty where it never did.

    Raises:
        AuditError: the file is damaged, or of an unknown version.
    """
    path = Path(directory) / FILE
    try:
        content = read_json(path)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, and this trl-sae-audit reads {VERSION}")
        found = [_evidence(entry) for entry in content["evidence"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AuditError(
            f"{path} cannot be read ({error}); delete it and gather the evidence again."
        ) from error
    return {(each.dictionary, each.feature): each for each in found}


def _evidence(entry: dict[str, Any]) -> Evidence:
    found = Evidence(**{**entry, "examples": [_example(example) for example in entry["examples"]]})
    _check(found, text=("dictionary", "label"), number=("attribution", "q_value"), count=("feature",))
    texts = [found.promotes, found.suppresses]
    if not all(isinstance(each, list) and all(isinstance(text, str) for text in each) for each in texts):
        raise TypeError(f"the tokens of feature {found.feature} are not texts")
    if found.link is not None and not (isinstance(found.link, str) and found.link.startswith("https://")):
        raise ValueError(f"the link of feature {found.feature} is {found.link!r}")
    if not all(_is_number(value) for value in found.statistics.values()):
        raise TypeError(f"the statistics of feature {found.feature} are not numbers")
    return found


def _example(entry: dict[str, Any]) -> Example:
    tokens = {side: [Token(**token) for token in tokens] for side, tokens in entry["tokens"].items()}
    found = Example(**{**entry, "tokens": tokens})
    _check(found, text=("prompt",), number=("attribution",), count=("row",))
    for token in (token for side in tokens.values() for token in side):
        _check(token, text=("text",), number=("activation", "attribution"))
    if not all(isinstance(text, str) for text in found.answers.values()):
        raise TypeError(f"the answers of row {found.row} are not texts")
    return found


def _check(
    found: Any, text: Sequence[str] = (), number: Sequence[str] = (), count: Sequence[str] = ()
) -> None:
    for name in (*text, *number, *count):
        value = getattr(found, name)
        right = isinstance(value, str) if name in text else _is_number(value)
        if not right or (name in count and not (isinstance(value, int) and 0 <= value < 2**53)):
            raise TypeError(f"{name!r} is {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not abs(value) > 1e300


def _marked(tokens: Sequence[Token], most: int = 40) -> str:
    """Tokens around the one with the largest part, the large parts in bold."""
    if not tokens:
        return ""
    sizes = [abs(token.attribution) for token in tokens]
    centre = sizes.index(max(sizes))
    start = max(0, min(centre - most // 2, len(tokens) - most))
    shown = tokens[start : start + most]
    limit = max(sizes) / 2
    marked = (
        f"**{_plain(token.text)}**" if limit > 0 and abs(token.attribution) >= limit else _plain(token.text)
        for token in shown
    )
    return ("…" if start else "") + "".join(marked) + ("…" if start + most < len(tokens) else "")


def _plain(text: str) -> str:
    return text.replace("\n", "↵").replace("*", "\\*")


def _quoted(texts: Sequence[str]) -> str:
    return ", ".join(f"`{text.strip() or repr(text)}`" for text in texts)


def _short(text: str, most: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= most else flat[: most - 1] + "…"
