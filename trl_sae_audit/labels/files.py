"""Labels out of a file that somebody has, or out of another audit or run record of the same dictionary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..audit.evidence import read_labels
from ..errors import AuditError
from ..flags import FlagSet
from ..io.feature_labels import FILE, Label, LabelSet, read_label_document, read_label_sets
from ..io.manifest import MANIFEST
from ..saes.info import DictionaryInfo


def load_labels(path: str | Path, dictionary: DictionaryInfo | Any) -> LabelSet:
    """The labels of a dictionary's features in a file, see `read_labels`; in a `flags.yaml`; or beside an audit or a run record.

    Raises:
        AuditError: there is no such file, it cannot be read, or has no label of this dictionary.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise AuditError(f"{path} has no {FILE}; make labels for it first, or give a file of labels.")
        path = path / FILE
    if path.suffix in (".yaml", ".yml"):
        flags = FlagSet.load(path).of(dictionary)
        return LabelSet(dictionary.name, dictionary.identity).updated(
            Label(flag.feature, flag.label, "file", path.name) for flag in flags if flag.label
        )
    if path.name == FILE and (path.parent / MANIFEST).is_file():
        found = read_label_document(path)
        if dictionary.identity not in found:
            names = ", ".join(each.dictionary for each in found.values())
            raise AuditError(
                f"The labels in {path} are of {names}, not of {dictionary.name!r}; give those of the same dictionary."
            )
        return found[dictionary.identity]
    texts = read_labels(path)
    strange = [feature for feature in texts if not 0 <= feature < dictionary.d_sae]
    if strange:
        raise AuditError(
            f"The labels in {path} are of features up to {max(strange)}, and {dictionary.name!r} has features 0 to "
            f"{dictionary.d_sae - 1}; give those of the same dictionary."
        )
    labels = {
        feature: Label(feature, text, "file", path.name) for feature, text in sorted(texts.items()) if text
    }
    return LabelSet(dictionary.name, dictionary.identity, labels)


def label_texts(*paths: str | Path) -> list[str]:
    """All labels in some files or directories, of whatever dictionary; those that are not there have none.

    Raises:
        AuditError: one cannot be read.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if path.suffix in (".yaml", ".yml"):
            found += [flag.label for flag in FlagSet.load(path)]
        elif path.is_dir():
            found += [label.text for labels in read_label_sets(path).values() for label in labels]
        elif path.name == FILE and (path.parent / MANIFEST).is_file():
            found += [label.text for labels in read_label_document(path).values() for label in labels]
        elif path.is_file():
            found += read_labels(path).values()
    return [text for text in found if text]
