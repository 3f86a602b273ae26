"""Gathering evidence: the examples, tokens and vocabulary that go with a feature."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .audit_pass import AuditPass, frozen
from .dictionary import FeatureDictionary
from .errors import AuditError
from .evidence_files import Evidence, Example, Token
from .language_head import LanguageHead
from .objectives import Loss
from .preferences import Source, as_text, iterate_rows
from .preflight import check_dictionary
from .residual_stream import evaluation_mode
from .untrusted import parse_json, read_bytes

if TYPE_CHECKING:
    from .audit_result import Audit

_NEURONPEDIA = "https://www.neuronpedia.org"
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


def gather_evidence(
    audit: Audit,
    features: Sequence[int],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Source,
    dictionary: FeatureDictionary,
    loss: Loss,
    *,
    examples: int = 4,
    vocabulary: int = 10,
    labels: Mapping[int, str] | None = None,
) -> list[Evidence]:
    """Evidence for some features of an audit; runs the model on their examples again.

    Args:
        audit: of `dataset`, by `model` and `dictionary`.
        features: to look at.
        loss: the audit's own: `PreferenceLoss(tokenizer, args)` for pairs.
        examples: for each feature, half of them up and half down.
        vocabulary: tokens promoted and suppressed to name.
        labels: feature → label, from `read_labels`; not needed.

    Raises:
        AuditError: the dictionary is not the audit's, or the dataset lacks a row of it.
    """
    if dictionary.identity != audit.dictionary.identity:
        raise AuditError(
            f"The audit was made with dictionary {audit.dictionary.name!r}, not with {dictionary.name!r}; pass the same one."
        )
    point = check_dictionary(dictionary, model)
    dictionary = dictionary.to(next(point.decoder.parameters()).device)
    running = AuditPass(model, point, dictionary, loss)
    contributions = audit.contributions(features)
    numbers = audit.rows()
    chosen = [_extremes(contributions[:, column], examples) for column in range(len(features))]
    rows = _rows(dataset, {int(numbers[place]) for places in chosen for place in places})
    up, down = vocabulary_of(model, tokenizer, point.decoder, dictionary.rows(features), vocabulary)
    table = audit.features().set_index("feature")
    found = []
    for column, feature in enumerate(features):
        figures: dict[Any, Any] = table.loc[[feature]].to_dict("records")[0]
        driving = [
            _example(
                running,
                tokenizer,
                int(numbers[place]),
                rows[int(numbers[place])],
                feature,
                float(contributions[place, column]),
            )
            for place in chosen[column]
        ]
        statistics: dict[str, float] = {
            name: float(figures[name])
            for name in ("standard_error", "lift", "length_correlation", "length_q_value", "disparity")
            if name in figures
        }
        found.append(
            Evidence(
                dictionary.name,
                int(feature),
                (labels or {}).get(int(feature), ""),
                float(figures["attribution"]),
                float(figures["q_value"]),
                up[column],
                down[column],
                [example for example in driving if example is not None],
                neuronpedia_link(dictionary.neuronpedia_id, feature),
                statistics,
            )
        )
    return found


@torch.no_grad()
def vocabulary_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoder: nn.Module, directions: Tensor, k: int
) -> tuple[list[list[str]], list[list[str]]]:
    """The k tokens whose logits each direction raises, and lowers, most, beside the average token."""
    logits = LanguageHead(model, decoder).logits(_through_final_norm(decoder, directions))
    logits = logits - logits.mean(1, keepdim=True)
    k = min(k, logits.shape[1])
    return _texts(tokenizer, logits.topk(k).indices), _texts(tokenizer, (-logits).topk(k).indices)


def _through_final_norm(decoder: nn.Module, directions: Tensor) -> Tensor:
    """What the final norm's gain makes of unit directions, each taken as a whole hidden state of unit variance."""
    directions = directions.to(next(decoder.parameters())) * directions.shape[1] ** 0.5
    for name, module in decoder.named_children():
        if name in _FINAL_NORMS:
            return module(directions)
    return directions


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[list[str]]:
    return [[tokenizer.decode([token]) for token in row] for row in ids.tolist()]


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


def _extremes(values: Any, count: int) -> list[int]:
    """Places of the largest and the smallest values, half and half, by size."""
    order = values.argsort(kind="stable")
    low = order[: count // 2]
    high = order[::-1][: count - len(low)]
    return sorted({int(place) for place in [*high, *low]}, key=lambda place: -abs(float(values[place])))


def _rows(dataset: Source, numbers: set[int]) -> dict[int, dict[str, Any]]:
    found = {row.index: row.columns for row in iterate_rows(dataset) if row.index in numbers and row.columns}
    missing = numbers - set(found)
    if missing:
        raise AuditError(
            f"The dataset has no row {min(missing)}, which the audit has; pass the data that was audited."
        )
    return found


def _example(
    running: AuditPass,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    columns: Mapping[str, Any],
    feature: int,
    attribution: float,
) -> Example | None:
    tokenized = running.loss.tokenize([(number, columns)])
    if not tokenized:
        return None
    batch = {
        name: value.to(running.dictionary.device) for name, value in running.loss.collate(tokenized).items()
    }
    with frozen(running.model), evaluation_mode(running.model):
        gradient, hidden, positions, _ = running._differentiate(batch)
    shown = positions | batch["completion_mask"].bool()
    direction = running.dictionary.rows([feature])[0]
    tokens = {}
    for row, side in enumerate(running.loss.sides[: len(shown)]):
        where = shown[row]
        activation = running.dictionary.encode(hidden[row][where])[:, feature].tolist()
        part = (-(gradient[row][where].to(direction) @ direction)).tolist()
        texts = [tokenizer.decode([token]) for token in batch["input_ids"][row][where].tolist()]
        tokens[side] = [Token(*each) for each in zip(texts, activation, part, strict=True)]
    answers = {side: as_text(columns[side]) for side in running.loss.sides if side in columns}
    return Example(number, attribution, as_text(columns.get("prompt")), answers, tokens)
