"""Evidence: what a feature is about, from the examples, tokens and vocabulary that go with it."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .audit_pass import AuditPass, frozen
from .dictionary import FeatureDictionary
from .errors import AuditError
from .language_head import LanguageHead
from .objectives import Loss
from .preferences import Source, as_text, iterate_rows
from .preflight import check_dictionary
from .residual_stream import evaluation_mode

if TYPE_CHECKING:
    from .audit_result import Audit

_NEURONPEDIA = "https://www.neuronpedia.org"
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


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
        return "\n".join(lines)


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
    up, down = vocabulary_of(
        model, tokenizer, point.decoder, dictionary.directions[list(features)], vocabulary
    )
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
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return _from_rows(csv.DictReader(text.splitlines()))
        if path.suffix == ".jsonl":
            return _from_rows(json.loads(line) for line in text.splitlines() if line.strip())
        content = json.loads(text)
        if isinstance(content, list):
            return _from_rows(content)
        return {int(feature): str(label) for feature, label in content.items()}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, AttributeError, TypeError) as error:
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
    direction = running.dictionary.directions[feature]
    tokens = {}
    for row, side in enumerate(running.loss.sides[: len(shown)]):
        where = shown[row]
        activation = running.dictionary.encode(hidden[row][where])[:, feature].tolist()
        part = (-(gradient[row][where].to(direction) @ direction)).tolist()
        texts = [tokenizer.decode([token]) for token in batch["input_ids"][row][where].tolist()]
        tokens[side] = [Token(*each) for each in zip(texts, activation, part, strict=True)]
    answers = {side: as_text(columns[side]) for side in running.loss.sides if side in columns}
    return Example(number, attribution, as_text(columns.get("prompt")), answers, tokens)


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
