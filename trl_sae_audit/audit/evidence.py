"""Gathering evidence: the examples, tokens and vocabulary that go with a feature."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import AuditError
from ..io.untrusted import parse_json, read_bytes
from ..models.tokenizers import Processing, text_tokenizer
from ..saes.compatibility import check_dictionary
from ..saes.dictionary import FeatureDictionary
from .evidence_files import STATISTICS, Evidence, contexts_in
from .vocabulary import vocabulary_of

if TYPE_CHECKING:
    from .result import Audit

_NEURONPEDIA = "https://www.neuronpedia.org"


def gather_evidence(
    audit: Audit,
    features: Sequence[int],
    model: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    *,
    vocabulary: int = 10,
    labels: Mapping[int, str] | None = None,
) -> list[Evidence]:
    """Evidence for some features of an audit: its contexts, and the vocabulary that the directions raise and lower.

    Args:
        audit: by `model` and `dictionary`.
        features: to look at.
        vocabulary: tokens promoted and suppressed to name.
        labels: feature → label, from `read_labels`; not needed.

    Raises:
        AuditError: the dictionary is not the audit's.
    """
    if dictionary.identity != audit.dictionary.identity:
        raise AuditError(
            f"The audit was made with dictionary {audit.dictionary.name!r}, not with {dictionary.name!r}; pass the same one."
        )
    point = check_dictionary(dictionary, model)
    dictionary = dictionary.to(next(point.decoder.parameters()).device)
    reader = text_tokenizer(tokenizer, point.decoder)
    up, down = vocabulary_of(model, reader, point.decoder, dictionary.rows(features), vocabulary)
    table = audit.features().set_index("feature")
    contexts = audit.contexts(features)
    beyond = set(audit.beyond_chance()["feature"])
    found = []
    for column, feature in enumerate(features):
        figures: dict[Any, Any] = table.loc[[feature]].to_dict("records")[0]
        statistics: dict[str, float] = {name: float(figures[name]) for name in STATISTICS if name in figures}
        statistics["beyond_chance"] = float(feature in beyond)
        found.append(
            Evidence(
                dictionary.name,
                int(feature),
                (labels or {}).get(int(feature), ""),
                float(figures["attribution"]),
                float(figures["q_value"]),
                up[column],
                down[column],
                contexts_in(contexts[contexts["feature"] == feature]),
                neuronpedia_link(dictionary.neuronpedia_id, feature),
                statistics,
                figures["words"],
            )
        )
    return found


def neuronpedia_link(neuronpedia_id: str | None, feature: int) -> str | None:
    """The feature's page, where the dictionary is on Neuronpedia."""
    return None if not neuronpedia_id else f"{_NEURONPEDIA}/{neuronpedia_id}/{feature}"


def read_labels(path: str | Path) -> dict[int, str]:
    """Feature → label from a local file: JSON {"12": "label"}, JSON lines or CSV with columns feature and label.

    Neuronpedia's exports, whose columns are index and description, are read too.

    Raises:
        AuditError: the file is missing, or not of these forms.
    """
    path = Path(path)
    try:
        text = read_bytes(path).decode("utf-8")
        if path.suffix == ".csv":
            return _from_rows(csv.DictReader(text.splitlines(), strict=True))
        if path.suffix == ".jsonl":
            return _from_rows(parse_json(line) for line in text.splitlines() if line.strip())
        content = parse_json(text)
        if isinstance(content, list):
            return _from_rows(content)
        return {int(feature): str(label) for feature, label in content.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, OverflowError, csv.Error) as error:
        raise AuditError(
            f'The labels in {path} cannot be read ({error}); give JSON {{"12": "label"}}, or CSV or JSON lines with '
            "columns feature and label."
        ) from error


def _from_rows(rows: Any) -> dict[int, str]:
    labels = {}
    for row in rows:
        feature = row["feature"] if "feature" in row else row["index"]
        labels[int(feature)] = str(row["label"] if "label" in row else row["description"])
    return labels
