"""Reading an answer of the lab's language: which tokens are a stance, a value, filler or a mark."""

from dataclasses import dataclass
from typing import Literal

from .wording import AGREEMENTS, BULLET, CLOSINGS, DISAGREEMENTS, FILLERS, STAR, STATEMENTS, VALUES


@dataclass(frozen=True)
class Span:
    """A run of tokens of an answer, and which part of the answer it is."""

    start: int
    """First token, counted from the answer's first."""
    stop: int
    """One past the last token."""
    kind: Literal["agree", "disagree", "value", "filler", "mark"]
    """The part of the answer. Marks lie within the other spans."""


def match_form(form: str, tokens: list[str]) -> str | None:
    """The value that fills the one gap of `form` in `tokens`, or None if they do not match."""
    pattern = form.split()
    if len(pattern) != len(tokens):
        return None
    gap = pattern.index("{}")
    if tokens[gap] not in VALUES or pattern[:gap] != tokens[:gap] or pattern[gap + 1 :] != tokens[gap + 1 :]:
        return None
    return tokens[gap]


def read_spans(tokens: list[str]) -> tuple[list[Span], bool]:
    """Cut an answer into its parts.

    A value's span runs from the first token of its sentence to the value, so that its last token is the value.

    Returns:
        The spans, and whether they cover the whole answer.
    """
    spans: list[Span] = []
    complete = bool(tokens) and tokens[-1] == "."
    start = 0
    for stop in [i + 1 for i, token in enumerate(tokens) if token == "."] + [len(tokens)]:
        if stop == start:
            continue
        positions = [i for i in range(start, stop) if tokens[i] not in (BULLET, STAR)]
        bare = [tokens[i] for i in positions]
        if bare and bare[-1] != ".":
            bare.append(".")  # an unfinished last sentence is read as if it ended here
        sentence = " ".join(bare)
        spans += [Span(i, i + 1, "mark") for i in range(start, stop) if tokens[i] in (BULLET, STAR)]
        if sentence in AGREEMENTS or sentence == CLOSINGS["agree"]:
            spans.append(Span(start, stop, "agree"))
        elif sentence in DISAGREEMENTS or sentence == CLOSINGS["disagree"]:
            spans.append(Span(start, stop, "disagree"))
        elif sentence in FILLERS:
            spans.append(Span(start, stop, "filler"))
        else:
            gaps = [form.split().index("{}") for form in STATEMENTS if match_form(form, bare) is not None]
            if gaps:
                spans.append(Span(start, positions[gaps[0]] + 1, "value"))
            else:
                complete = False
        start = stop
    return spans, complete
