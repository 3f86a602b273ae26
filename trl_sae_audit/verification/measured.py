"""Measured change: how much more active each feature is after training, on given answers or on sampled ones.

Two questions that are easily confused:

- *Teacher-forced*: does the trained model represent the same text differently? Both checkpoints read the same held-out
  answers, each with its own weights. This is what a lookahead predicts.
- *Sampled*: does the trained model write different text? Both answer the same prompts, and the frozen model before
  training reads all of it. A feature that rises here is behaviour, which no change of representation can imitate.

An activation is averaged over tokens, `ā_f = Σ a_f[t] / number of answer tokens`, the end of sequence included. At an attention
sink (a token of more than ten times the median norm of its answer's) no feature counts as active, as in what predicts the change.
What is
independent, and so what a bootstrap draws again, is a prompt: its answers are one unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..audit.lookahead.answer_places import AnswerPlaces
from ..audit.objectives import Loss, PreferenceLoss
from ..audit.rewards import AnswerCheck, PolicyGradientLoss, answer_ids
from ..data.opener import DatasetLike, iterate_rows
from ..data.preferences import ANSWERS, PairCheck, as_text
from ..errors import AuditError
from ..models.attention_sinks import silent_tokens
from ..models.batches import answer_batches
from ..models.language_head import causal_model
from ..models.residual_stream import hidden_states
from ..models.sampling import Sampling, sample_ids
from ..models.tokenizers import Processing, text_tokenizer
from ..saes.compatibility import check_dictionary
from ..saes.dictionary import FeatureDictionary

Answered: TypeAlias = tuple[str, list[int], list[int]]
"""A prompt's text, its token ids, and those of an answer to it."""


@dataclass(frozen=True)
class AnswerActivations:
    """Every feature's activation summed over the answers' tokens, unit by unit.

    Attributes:
        sums: [units, d_sae] float32. tokens: how many they were summed over [units]. prompts: of each unit.
        active: whether each feature was active on any token [d_sae].
    """

    sums: np.ndarray
    tokens: np.ndarray
    prompts: tuple[str, ...]
    active: np.ndarray

    def mean(self, counts: np.ndarray | None = None) -> np.ndarray:
        """ā_f with each unit taken as often as `counts` [draws, units] say: [draws, d_sae], or [d_sae] without."""
        weights = np.ones((1, len(self.tokens))) if counts is None else counts
        means = (weights.astype(np.float32) @ self.sums) / (weights @ self.tokens)[:, None]
        return means[0] if counts is None else means


@dataclass(frozen=True)
class MeasuredChange:
    """What training did to the features: activations before and after, on the same prompts.

    Attributes:
        kind: "on given text" or "in generations".
        before, after: the activations.
    """

    kind: str
    before: AnswerActivations
    after: AnswerActivations

    def __post_init__(self) -> None:
        if self.before.prompts != self.after.prompts:
            raise AuditError(
                "The activations before and after are of other prompts; compute both on the same."
            )

    def __len__(self) -> int:
        return len(self.before.tokens)

    @cached_property
    def change(self) -> np.ndarray:
        """Mean activation after less before: [d_sae]."""
        return self.after.mean() - self.before.mean()

    @property
    def active(self) -> np.ndarray:
        """Whether each feature is active in any answer, before or after: [d_sae]. The others have no change to predict."""
        return self.before.active | self.after.active

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """The change with each unit taken as often as `counts` [draws, units] say: [draws, d_sae]."""
        return self.after.mean(counts) - self.before.mean(counts)


def measured_change(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    responses: DatasetLike,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    progress: bool = False,
    attention_sinks: bool = False,
) -> MeasuredChange:
    """On given text: each checkpoint encodes the same held-out answers.

    Args:
        before, after: causal language models, with adapters or without.
        tokenizer: of both, or a processor that has it.
        dictionary: with its hook point in both.
        responses: pairs (`chosen`, `rejected`: both answers count), or rows of `prompt` and `completion`, in any layout
            TRL reads; not from the training data.
        batch_size: rows at a time; changes nothing but speed and memory.
        max_length: tokens at which prompt and answer are cut.
        progress: show a bar.
        attention_sinks: count features as active at attention sinks too.

    Raises:
        AuditError: no rows, or a bad one, by its number; a dictionary that does not fit.
    """
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "max_length": max_length,
        "progress": progress,
        "attention_sinks": attention_sinks,
    }
    return MeasuredChange(
        "on given text",
        answer_activations(before, tokenizer, dictionary, responses, **options),
        answer_activations(after, tokenizer, dictionary, responses, **options),
    )


def sampled_change(
    before: nn.Module,
    after: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    prompts: DatasetLike,
    *,
    reference: nn.Module | None = None,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
    attention_sinks: bool = False,
) -> MeasuredChange:
    """In generations: both checkpoints answer the same prompts, and one frozen model encodes all answers.

    Both sample with the same random numbers, see `sample_ids`, which takes most of the noise out of their difference.

    Args:
        before, after, tokenizer, dictionary: as for `measured_change`.
        prompts: rows with `prompt`; other columns do not matter.
        reference: the model that encodes; by default `before`.
        sampling: one answer a prompt, of at most 128 tokens, at temperature 1, if None.
        batch_size: answers at a time.
        progress: show a bar.
        attention_sinks: count features as active at attention sinks too.

    Raises:
        AuditError: no rows, or one without a prompt; a dictionary that does not fit.
    """
    options: dict[str, Any] = {
        "sampling": sampling,
        "batch_size": batch_size,
        "progress": progress,
        "attention_sinks": attention_sinks,
    }
    reader = before if reference is None else reference
    return MeasuredChange(
        "in generations",
        sampled_activations(before, reader, tokenizer, dictionary, prompts, **options),
        sampled_activations(after, reader, tokenizer, dictionary, prompts, **options),
    )


def sampled_activations(
    model: nn.Module,
    reader: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    prompts: DatasetLike,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
    attention_sinks: bool = False,
) -> AnswerActivations:
    """One checkpoint's half of `sampled_change`, for callers comparing several checkpoints with one baseline: `model` answers, `reader`
    encodes."""
    answered = sample_answers(
        model, tokenizer, prompts, sampling=sampling, batch_size=batch_size, progress=progress
    )
    return read_answers(
        reader,
        tokenizer,
        dictionary,
        answered,
        batch_size=batch_size,
        progress=progress,
        attention_sinks=attention_sinks,
    )


def sample_answers(
    model: nn.Module,
    tokenizer: Processing,
    prompts: DatasetLike,
    *,
    sampling: Sampling | None = None,
    batch_size: int = 32,
    progress: bool = False,
) -> list[Answered]:
    """A model's answers to prompts; see `sampled_change`."""
    asked = [row.columns or {} for row in iterate_rows(prompts)]
    missing = [number for number, row in enumerate(asked) if not row.get("prompt")]
    if missing or not asked:
        problem = f"row {missing[0]} has no 'prompt'" if missing else "there are no rows"
        raise AuditError(f"Answers are sampled at prompts, but {problem}; give rows with a 'prompt'.")
    reader = text_tokenizer(tokenizer, causal_model(model))
    begun = [answer_ids(reader, row["prompt"], "")[0] for row in asked]
    sampling = sampling or Sampling(answers=1)
    answers = sample_ids(model, reader, begun, sampling, batch_size=batch_size, progress=progress)
    return [
        (as_text(row["prompt"]), prompt, answer)
        for row, prompt, several in zip(asked, begun, answers, strict=True)
        for answer in several
    ]


def answer_activations(
    model: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    responses: DatasetLike,
    *,
    batch_size: int = 16,
    max_length: int | None = 1024,
    progress: bool = False,
    attention_sinks: bool = False,
) -> AnswerActivations:
    """One checkpoint's half of `measured_change`, for callers comparing several checkpoints with one baseline."""
    point = check_dictionary(dictionary, model)
    rows = [(row.index, row.columns) for row in _checked(responses)]
    loss = _tokenized_as(tokenizer, rows[0][1], max_length, point.decoder)
    examples = loss.tokenize([(index, {"advantage": 0.0, **columns}) for index, columns in rows])
    prompts = {index: _prompt_of(columns) for index, columns in rows}
    batches = []
    for start in range(0, len(examples), batch_size):
        part = examples[start : start + batch_size]
        batch = loss.collate(part)
        texts = [prompts[example.row] for example in part] * loss.rows_per_example
        batches.append((texts, batch))
    units = [prompts[example.row] for example in examples]
    return _summed(point, dictionary, units, batches, progress, attention_sinks=attention_sinks)


def _checked(responses: DatasetLike) -> list[Any]:
    rows = list(iterate_rows(responses))
    if not rows:
        raise AuditError("There are no responses to compare the models on; give at least one.")
    first = rows[0].columns or {}
    check = PairCheck() if all(name in first for name in ANSWERS) else AnswerCheck()
    if isinstance(check, AnswerCheck) and "completion" not in first:
        raise AuditError(
            f"The responses have the columns {sorted(first)}; give pairs with 'chosen' and 'rejected', or rows with 'prompt' "
            "and 'completion'."
        )
    for row in rows:
        if row.columns is not None and isinstance(check, AnswerCheck):
            row.columns.setdefault("advantage", 0.0)
        problem = check(row)
        if problem:
            raise AuditError(f"Row {row.index} of the responses {problem}; correct or remove it.")
    return rows


def _tokenized_as(
    tokenizer: Processing, row: dict[str, Any], max_length: int | None, decoder: nn.Module
) -> Loss:
    """Pairs as TRL's DPOTrainer cuts and ends them, single answers as a trainer that samples sees them."""
    reader = text_tokenizer(tokenizer, decoder)
    if "chosen" not in row:
        return PolicyGradientLoss(reader, max_length)
    from trl import DPOConfig

    args = DPOConfig("unused", max_length=max_length, bf16=False, report_to="none")
    return PreferenceLoss(reader, args, tokenizer)


def _prompt_of(columns: dict[str, Any]) -> str:
    """Which rows belong to one unit; a pair without a prompt is its own."""
    if columns.get("prompt") is not None:
        return as_text(columns["prompt"])
    return "\n".join(as_text(columns[name]) for name in ANSWERS)


def read_answers(
    model: nn.Module,
    tokenizer: Processing,
    dictionary: FeatureDictionary,
    answered: Sequence[Answered],
    *,
    batch_size: int = 32,
    progress: bool = False,
    found: AnswerPlaces | None = None,
    attention_sinks: bool = False,
) -> AnswerActivations:
    """A model's reading of answers; `found` takes the places where features are most active, if they are wanted."""
    ids = [(prompt, answer) for _, prompt, answer in answered]
    point = check_dictionary(dictionary, model)
    batches = [
        ([answered[place][0] for place in places], batch)
        for places, batch in answer_batches(text_tokenizer(tokenizer, point.decoder), ids, batch_size)
    ]
    units = [text for text, _, _ in answered]
    return _summed(point, dictionary, units, batches, progress, found, attention_sinks=attention_sinks)


@torch.no_grad()
def _summed(
    point: Any,
    dictionary: FeatureDictionary,
    prompts: Iterable[str],
    batches: Sequence[tuple[list[str], dict[str, Tensor]]],
    progress: bool,
    found: AnswerPlaces | None = None,
    *,
    attention_sinks: bool = False,
) -> AnswerActivations:
    device = next(point.decoder.parameters()).device
    dictionary = dictionary.to(device)
    units = {text: unit for unit, text in enumerate(dict.fromkeys(prompts))}
    sums = torch.zeros(len(units), dictionary.d_sae, dtype=torch.float32, device=device)
    tokens = np.zeros(len(units))
    active = torch.zeros(dictionary.d_sae, dtype=torch.bool, device=device)
    width = dictionary.tokens_at_once
    bar = tqdm(batches, desc="Encoding", unit=" batches", disable=None if progress else True)
    for texts, batch in bar:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        counted = batch["completion_mask"].bool()
        owner = torch.tensor([units[text] for text in texts])[:, None].expand(counted.shape)[counted]
        read, answer = hidden_states(point, inputs), counted.to(device)
        nowhere = silent_tokens(read, answer, attention_sinks=attention_sinks)
        np.add.at(tokens, owner.numpy(), 1)
        row, number = counted.nonzero()[:, 0].to(device), (counted.cumsum(1) - 1)[counted].to(device)
        if found is not None:
            found.begin(batch)
        parts = (part.split(width) for part in (read[answer], owner.to(device), row, number, nowhere[answer]))
        for states, owners, rows, numbers, silent in zip(*parts, strict=True):
            activations = dictionary.encode(states, silent)
            if found is not None:
                found.add(activations, rows, numbers)
            sums.index_add_(0, owners, activations)
            active |= (activations != 0).any(0)
        if found is not None:
            found.end()
    return AnswerActivations(sums.cpu().numpy(), tokens, tuple(units), active.cpu().numpy())
