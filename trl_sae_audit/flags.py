"""Flags: the features someone decided should not be taught, in a file a person can read and edit."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import yaml

from .errors import AuditError
from .io.atomic import write_durably
from .io.untrusted import parse_yaml, read_bytes
from .text import sanitize

if TYPE_CHECKING:
    from torch import Tensor

Scores = TypeVar("Scores", np.ndarray, "Tensor")
VERSION = 1
DIRECTIONS = ("up", "down", "both")
_TOO_MANY = 2**53
_WORDS = "# words"
_HEADER = """\
# Features that should not be taught. One entry a feature, or a family of them:
#   dictionary  name of the SAE, as audits and run records call it
#   feature     its index; or several, as [213, 97], each of which is flagged
#   label       what to call it;  reason: why it is flagged
#   weight      its weight relative to the others (default 1)
#   direction   up: training should not strengthen it (default); down: not weaken it; both
#   identity    content hash of the dictionary, checked when present
#   audit       directory of the audit it was found in, which filter reads
"""


class Named(Protocol):
    """What a flag is checked against: a `FeatureDictionary`, or whatever is described like one."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> str: ...

    @property
    def d_sae(self) -> int: ...


@dataclass(frozen=True)
class Flag:
    """A feature that should not be taught.

    Args:
        dictionary: name of the dictionary it is a feature of.
        feature: its index.
        label: what to call it.
        reason: why it is flagged.
        weight: relative to other flags.
        direction: "up" if training should not strengthen the feature, "down" if it should not weaken it, "both".
        identity: content hash of the dictionary; when given, another dictionary of the same name is refused.
        audit: directory of the audit that it was found in; `trl-sae-audit filter` reads it.
        words: what the feature is active on, see `Audit.features`; a comment in the file.

    Raises:
        AuditError: for a value that cannot be meant.
    """

    dictionary: str
    feature: int
    label: str = ""
    reason: str = ""
    weight: float = 1.0
    direction: str = "up"
    identity: str | None = None
    audit: str | None = None
    words: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.dictionary, str) or not self.dictionary:
            raise AuditError(f"A flag has dictionary {self.dictionary!r}; write the name of its dictionary.")
        if not _is_int(self.feature) or not 0 <= self.feature < _TOO_MANY:
            raise AuditError(
                f"A flag of {self.dictionary!r} has feature {self.feature!r}; write the feature's index."
            )
        where = f"Flag {self.dictionary}/{self.feature}"
        for name in ("label", "reason"):
            if not isinstance(getattr(self, name), str):
                raise AuditError(
                    f"{where} has {name} {getattr(self, name)!r}; write text, in quotes if need be."
                )
        weight = self.weight
        if (
            isinstance(weight, bool)
            or not isinstance(weight, (int, float))
            or not 0 < weight <= sys.float_info.max
        ):
            raise AuditError(f"{where} has weight {weight!r}; write a number above 0.")
        if self.direction not in DIRECTIONS:
            raise AuditError(
                f"{where} has direction {self.direction!r}; write one of {', '.join(DIRECTIONS)}."
            )
        if self.identity is not None and not isinstance(self.identity, str):
            raise AuditError(
                f"{where} has identity {self.identity!r}; write the dictionary's content hash, or none."
            )
        if self.audit is not None and not isinstance(self.audit, str):
            raise AuditError(f"{where} has audit {self.audit!r}; write the audit's directory, or none.")

    @property
    def name(self) -> str:
        """The label, or where there is none the feature's index."""
        return self.label or f"feature {self.feature}"

    def check(self, dictionary: Named) -> None:
        """Refuse a dictionary that this flag was not written for.

        Raises:
            AuditError: of another name or content, or too small.
        """
        if self.dictionary != dictionary.name:
            raise AuditError(
                f"Flag {self.name!r} is of dictionary {self.dictionary!r}, not of {dictionary.name!r}; a feature's number "
                "means nothing in another dictionary."
            )
        if self.identity is not None and self.identity != dictionary.identity:
            raise AuditError(
                f"Flag {self.name!r} was written for another dictionary {self.dictionary!r} (content {self.identity[:12]}…, "
                f"this one has {dictionary.identity[:12]}…); flag the feature again in this one."
            )
        if self.feature >= dictionary.d_sae:
            raise AuditError(
                f"Flag {self.name!r} is feature {self.feature}, but dictionary {dictionary.name!r} has features 0 to "
                f"{dictionary.d_sae - 1}."
            )

    def signed(self, scores: Scores) -> Scores:
        """Scores of this feature turned so that positive is what the flag objects to."""
        return {"up": scores, "down": -scores, "both": abs(scores)}[self.direction]


class FlagSet(Sequence[Flag]):
    """Flags, no feature twice.

    Flags that follow one another and differ in their features only are one entry of the file, if they have a label:
    `feature: [1423, 97]`.

    Example `flags.yaml`:

    ```yaml
    version: 1
    flags:
    - dictionary: gemma-scope-2-270m-pt-res/layer_12_width_16k_l0_small
      feature: 1423
      label: sycophancy
      reason: fires where the answer repeats the user's mistaken belief
      weight: 1.0
      direction: up
    ```

    Raises:
        AuditError: a feature flagged twice.
    """

    def __init__(self, flags: Iterable[Flag] = ()) -> None:
        self._flags = list(flags)
        seen: set[tuple[str, int]] = set()
        for flag in self._flags:
            if not isinstance(flag, Flag):
                raise AuditError(
                    f"A FlagSet holds flags, not a {type(flag).__name__}; make them with Flag(…)."
                )
            if (flag.dictionary, flag.feature) in seen:
                raise AuditError(
                    f"Feature {flag.feature} of {flag.dictionary!r} is flagged twice; keep one of the flags."
                )
            seen.add((flag.dictionary, flag.feature))

    @classmethod
    def load(cls, path: str | Path) -> FlagSet:
        """Read `flags.yaml`.

        Raises:
            AuditError: the file is missing, is not valid YAML, or has an invalid entry, which the message names.
        """
        path = Path(path)
        try:
            text = read_bytes(path).decode("utf-8")
        except (OSError, ValueError) as error:
            raise AuditError(f"The flags in {path} cannot be read ({error}); check the path.") from error
        return cls(_parse(text, path))

    def save(self, path: str | Path) -> None:
        """Write the flags as YAML, the whole file or none of it.

        Raises:
            AuditError: the file cannot be written.
        """
        entries = "\n" + "".join(map(_entry_text, _grouped(self))) if len(self) else " []\n"
        _write(Path(path), f"{_HEADER}{_dump({'version': VERSION})}flags:{entries}")

    def of(self, dictionary: Named) -> list[Flag]:
        """The flags of one dictionary, checked against it.

        Raises:
            AuditError: none is of it, or one does not fit it.
        """
        own = [flag for flag in self if flag.dictionary == dictionary.name]
        if not own:
            names = sorted({flag.dictionary for flag in self})
            raise AuditError(
                f"No flag is of dictionary {dictionary.name!r}"
                + (f": they are of {', '.join(map(repr, names))}" if names else ": there are no flags")
                + "; flag features of this one."
            )
        for flag in own:
            flag.check(dictionary)
        return own

    def __len__(self) -> int:
        return len(self._flags)

    def __iter__(self) -> Iterator[Flag]:
        return iter(self._flags)

    def __getitem__(self, index: Any) -> Any:
        return FlagSet(self._flags[index]) if isinstance(index, slice) else self._flags[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FlagSet) and self._flags == other._flags

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"FlagSet({self._flags!r})"


def append_flag(path: str | Path, *more: Flag) -> FlagSet:
    """Add flags to a file, or begin one; what a person wrote in it, comments too, stays as it is.

    Raises:
        AuditError: the file is not valid, has a feature already, or cannot be written.
    """
    path = Path(path)
    if not path.exists():
        flags = FlagSet(more)
        flags.save(path)
        return flags
    there = FlagSet.load(path)
    known = {(flag.dictionary, flag.feature) for flag in there}
    again = [str(flag.feature) for flag in more if (flag.dictionary, flag.feature) in known]
    if again:
        raise AuditError(
            f"{path} already flags feature{'s' * (len(again) > 1)} {', '.join(again)} of {more[0].dictionary!r}; remove "
            f"{'them' if len(again) > 1 else 'it'} there first, or flag others."
        )
    flags = FlagSet([*there, *more])
    text = path.read_text(encoding="utf-8")
    longer = (
        text.rstrip("\n") + "\n" + "".join(_indented(_entry_text(group), text) for group in _grouped(more))
    )
    try:
        kept = _parse(longer, path)
    except AuditError:
        kept = []
    if FlagSet(kept) == flags:
        _write(path, longer)
    else:  # the list is not at the end of the file, or in YAML's flow style
        flags.save(path)
    return flags


def _parse(text: str, path: Path) -> list[Flag]:
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise AuditError(f"{path} cannot be read: {error}; correct it.") from error
    if not isinstance(content, Mapping) or "flags" not in content:
        raise AuditError(f"{path} has no list 'flags'; begin it with 'version: {VERSION}' and 'flags:'.")
    if content.get("version") != VERSION:
        raise AuditError(
            f"{path} has version {content.get('version')!r}, and this version of trl-sae-audit reads {VERSION}."
        )
    unknown = set(content) - {"version", "flags"}
    if unknown:
        raise AuditError(
            f"{path} has unknown entries {sorted(map(str, unknown))}; it has 'version' and 'flags' only."
        )
    entries = content["flags"] or []
    if not isinstance(entries, list):
        raise AuditError(
            f"The entry 'flags' of {path} is a {type(entries).__name__}; write a list, each entry after a dash."
        )
    groups = [_flags(entry, number, path) for number, entry in enumerate(entries, start=1)]
    words = _words_in(text, len(groups))
    return [
        dataclasses.replace(flag, words=of_entry.get(flag.feature, of_entry.get(None, "")))
        for group, of_entry in zip(groups, words, strict=True)
        for flag in group
    ]


def _words_in(text: str, entries: int) -> list[dict[int | None, str]]:
    """The words in the comments under each entry of a file, by feature where they name it; none where its list is not written one
    entry a dash."""
    words: list[dict[int | None, str]] = []
    indent: str | None = None
    for line in text.splitlines():
        dash = re.match(r"( *)- ", line)
        if dash and indent in (None, dash[1]):
            indent = dash[1]
            words.append({})
        elif words and (comment := re.match(rf" *{re.escape(_WORDS)}(?: (\d{{1,15}}))?:(.*)", line)):
            words[-1][int(comment[1]) if comment[1] else None] = comment[2].strip()
    return words if len(words) == entries else [{} for _ in range(entries)]


def _flags(entry: Any, number: int, path: Path) -> list[Flag]:
    """The flags of an entry, one for each feature that it names."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("feature"), list):
        return [_flag(entry, number, path)]
    if not entry["feature"]:
        raise AuditError(f"Flag {number} in {path} has no feature; write the feature's index, or several.")
    return [_flag({**entry, "feature": feature}, number, path) for feature in entry["feature"]]


def _flag(entry: Any, number: int, path: Path) -> Flag:
    names = [field.name for field in dataclasses.fields(Flag) if field.name != "words"]
    if not isinstance(entry, Mapping):
        raise AuditError(
            f"Flag {number} in {path} is a {type(entry).__name__}; write 'dictionary:', 'feature:' …."
        )
    for name in entry:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(names)}."
            raise AuditError(f"Flag {number} in {path} has an entry {name!r}; {hint}")
    missing = {"dictionary", "feature"} - set(entry)
    if missing:
        raise AuditError(f"Flag {number} in {path} has no {' and no '.join(sorted(missing))}; add it.")
    try:
        return Flag(**entry)
    except AuditError as error:
        raise AuditError(f"Flag {number} in {path}: {error}") from error


def _grouped(flags: Iterable[Flag]) -> list[list[Flag]]:
    """Flags that share an entry of the file, together."""
    groups: list[list[Flag]] = []
    for flag in flags:
        if (
            groups
            and flag.label
            and groups[-1][0] == dataclasses.replace(flag, feature=groups[-1][0].feature)
        ):
            groups[-1].append(flag)
        else:
            groups.append([flag])
    return groups


class _OnOneLine(list):
    """Features of an entry, written `[1, 2]`."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _OnOneLine,
    lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True),
)


def _entry(flags: Sequence[Flag]) -> dict[str, Any]:
    entry = dataclasses.asdict(flags[0])
    del entry["words"]
    if len(flags) > 1:
        entry["feature"] = _OnOneLine(flag.feature for flag in flags)
    return {name: value for name, value in entry.items() if value is not None}


def _entry_text(flags: Sequence[Flag]) -> str:
    """An entry of the list, with the words of its features in comments under it."""
    comments = []
    for flag in flags:
        which = f" {flag.feature}" if len(flags) > 1 else ""
        if words := " ".join(sanitize(flag.words).split()):
            comments.append(f"  {_WORDS}{which}: {words}\n")
    return _dump([_entry(flags)]) + "".join(comments)


def _dump(content: Any) -> str:
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)


def _indented(entry: str, text: str) -> str:
    """A list entry indented like the file's last one."""
    dashes = re.findall(r"^( *)- ", text, flags=re.MULTILINE)
    indent = dashes[-1] if dashes else ""
    return "".join(f"{indent}{line}\n" for line in entry.rstrip("\n").split("\n"))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, text.encode("utf-8"))
    except OSError as error:
        raise AuditError(
            f"The flags cannot be written to {path} ({error.strerror}); choose another path."
        ) from error


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def distinct_names(flags: Sequence[Flag]) -> list[str]:
    names = [flag.name for flag in flags]
    return [
        f"{name} ({flag.feature})" if names.count(name) > 1 else name
        for name, flag in zip(names, flags, strict=True)
    ]
