"""Running an audit: rows in, parts of the audit's directory out, on one process or several."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.opener import DatasetLike, Row, only_split
from ..data.preferences import PairCheck
from ..errors import AuditError, DirectoryTakenError
from ..io.manifest import MANIFEST
from ..saes.compatibility import check_dictionary, check_whole, model_name
from ..saes.dictionary import FeatureDictionary
from .batches import chunks, digests
from .contexts import DATA, gather_contexts
from .gradients import AuditPass, Scores
from .objectives import Loss, TokenizedExample
from .result import Audit
from .rewards import AnswerCheck
from .store import AuditStore, Part

logger = logging.getLogger(__name__)

_MOST_ENTRIES = 2**16 // 28
"""Features of an example whose figures are kept, where all of them are active: 28 bytes each, 64 KiB in all."""

RowCheck = PairCheck | AnswerCheck
Step = Callable[[AuditPass, Callable[[int], bool]], dict[int, Scores]]
"""Differentiates examples; returns the scores of those rows for which the second argument is true."""


@dataclass(frozen=True)
class AuditConfig:
    """See `audit_preferences`."""

    batch_size: int
    part_size: int
    activations: bool
    on_bad_row: Literal["stop", "set_aside"]
    seed: int
    options: Mapping[str, Any]
    """What the manifest keeps as its `config`."""
    attention_sinks: bool = False


class AuditRun:
    """One audit from data to directory, on this process's share of the parts."""

    def __init__(
        self,
        model: nn.Module,
        dictionary: FeatureDictionary,
        loss: Loss,
        *,
        reference: nn.Module | None,
        config: AuditConfig,
        progress: bool,
        tokenizer: PreTrainedTokenizerBase,
        pass_type: type[AuditPass] = AuditPass,
    ) -> None:
        check_whole(model)
        point = check_dictionary(dictionary, model)
        device = next(point.decoder.parameters()).device
        self.dictionary = dictionary.to(device)
        self.model = model
        self.device = device
        self.loss = loss
        if config.activations and _entries(dictionary, loss) > _MOST_ENTRIES:
            logger.warning(
                "Dictionary %r has no encoder, so that all of its %d features are active in every answer: the audit keeps sums over "
                "answers alone, which give no disparity, selection or largest activation. projection_difference is the difference "
                "of mean activations.",
                *(dictionary.name, dictionary.d_sae),
            )
            config = replace(config, activations=False)
        self.config = config
        self.progress = progress
        self.tokenizer = tokenizer
        self.point, self.reference = point, reference
        self._pass = pass_type(
            model,
            point,
            self.dictionary,
            loss,
            reference=reference,
            activations=config.activations,
            attention_sinks=config.attention_sinks,
        )
        self.context = context_length(model)
        self._header = self._describe(point.path, reference)

    def is_finished(self, output_dir: str | Path | None) -> bool:
        """Whether the directory holds an audit that only has to be read."""
        directory = None if output_dir is None else Path(output_dir)
        return (
            directory is not None and (directory / MANIFEST).exists() and AuditStore.open(directory).finished
        )

    def good_rows(self, dataset: DatasetLike, check: RowCheck) -> np.ndarray:
        """Numbers of the rows that are examples, as far as can be told without a tokenizer.

        Raises:
            AuditError: a row that is none, if the audit is to stop at one.
        """
        good = []
        for rows in chunks(dataset, self.config.part_size):
            problems = [check(row) for row in rows]
            self._stop_at([(row.index, reason) for row, reason in zip(rows, problems, strict=True) if reason])
            good += [row.index for row, reason in zip(rows, problems, strict=True) if not reason]
        return np.array(good, np.int64)

    def tokenized(self, dataset: DatasetLike, wanted: Container[int]) -> Iterator[list[TokenizedExample]]:
        """The examples of those rows of the dataset that fit the model's context, a part at a time."""
        for rows in chunks(dataset, self.config.part_size):
            columns = [
                (row.index, row.columns) for row in rows if row.columns is not None and row.index in wanted
            ]
            examples = self.loss.tokenize(columns)
            too_long = self._beyond_context(examples)
            self._stop_at(too_long)
            out = {index for index, _ in too_long}
            yield [example for example in examples if example.row not in out]

    def over(
        self,
        dataset: DatasetLike,
        check: RowCheck,
        output_dir: str | Path | None,
        step: Step | None = None,
    ) -> Audit:
        """Audit every row.

        Args:
            dataset: the rows.
            check: says what is wrong with one.
            output_dir: where the audit is written.
            step: differentiates some of the examples as far as the parameters, so that they need no pass of their own.
        """
        state = PartialState()
        temporary = output_dir is None
        if temporary and state.num_processes > 1:
            raise AuditError("An audit by several processes needs an output_dir that they share; pass one.")
        directory = Path(
            tempfile.mkdtemp(prefix="sae-audit-") if output_dir is None else output_dir
        ).absolute()
        try:
            if state.is_main_process:
                store = AuditStore.create(directory, self._header, self.dictionary, self.config.options)
            state.wait_for_everyone()
            store = AuditStore.open(directory)
            if not store.finished:
                self._write_parts(store, dataset, check, state, step)
            else:
                self._check_same_rows(store, dataset)
            if state.is_main_process and self.config.activations and not store.has(DATA):
                gather_contexts(store, self.tokenizer)
            state.wait_for_everyone()
            audit = Audit(AuditStore.open(directory))
        except BaseException:
            if temporary:
                shutil.rmtree(directory, ignore_errors=True)
            raise
        if temporary:
            weakref.finalize(audit, shutil.rmtree, directory, ignore_errors=True)
        _warn(audit)
        return audit

    def _write_parts(
        self,
        store: AuditStore,
        dataset: DatasetLike,
        check: RowCheck,
        state: PartialState,
        step: Step | None,
    ) -> None:
        there = store.existing_parts()
        state.wait_for_everyone()
        size = self.config.part_size
        scored = {} if step is None else step(self._pass, lambda row: row // size not in there)
        number, read = -1, 0
        bar = tqdm(
            desc="Auditing",
            unit=" rows",
            disable=None if self.progress and state.is_main_process else True,
            total=_size(dataset),
        )
        with bar:
            for number, rows in enumerate(chunks(dataset, self.config.part_size)):
                problems = [check(row) for row in rows]
                if number in there:
                    _check_digests(store, store.digests(number), rows)
                else:
                    self._write_part(store, number, rows, problems, state, scored, bar.update)
                read += len(rows)
                bar.update(read - bar.n)
        if self._pass.sinks:
            logger.info(
                "%d tokens of answers are attention sinks (more than ten times the median norm) and left out of the activations; "
                "attention_sinks=True counts them.",
                self._pass.sinks,
            )
        state.wait_for_everyone()
        if state.is_main_process:
            store.finish(number + 1, state.num_processes)

    def _write_part(
        self,
        store: AuditStore,
        number: int,
        rows: list[Row],
        problems: list[str | None],
        state: PartialState,
        scored: dict[int, Scores],
        advance: Callable[[int], object],
    ) -> None:
        """Every process tokenizes every part, since TRL's preparation waits for all; one of them runs the model."""
        aside = [(row.index, reason) for row, reason in zip(rows, problems, strict=True) if reason]
        self._stop_at(aside)
        good = [
            (row.index, row.columns)
            for row, reason in zip(rows, problems, strict=True)
            if not reason and row.columns is not None
        ]
        examples = self.loss.tokenize(good)
        if number % state.num_processes != state.process_index:
            return
        kept = {example.row for example in examples}
        dropped = [
            (index, "has a prompt that alone fills max_length, so TRL drops it")
            for index, _ in good
            if index not in kept
        ]
        too_long = self._beyond_context(examples)
        self._stop_at(too_long)
        out = {index for index, _ in too_long}
        examples = [example for example in examples if example.row not in out]
        arrays = self._pass.run(examples, self.config.batch_size, scored, advance)
        broken = [
            (example.row, "has a loss or gradient that is not finite")
            for example, finite in zip(examples, arrays.finite, strict=True)
            if not finite
        ]
        self._stop_at(broken)
        if broken:
            out = {index for index, _ in broken}
            examples = [example for example in examples if example.row not in out]
            arrays = self._pass.run(examples, self.config.batch_size, scored)
        for example in examples:
            scored.pop(example.row, None)
        part = Part(
            row=np.array([example.row for example in examples], np.int64),
            digest=digests(rows),
            set_aside=sorted([*aside, *dropped, *too_long, *broken]),
            arrays=arrays,
            notes=self._notes(good, examples),
        )
        store.write_part(number, part)

    def _stop_at(self, bad: list[tuple[int, str]]) -> None:
        if bad and self.config.on_bad_row == "stop":
            index, reason = min(bad)
            raise AuditError(
                f"Row {index} of the dataset (counted from 0) {reason}; correct or remove it, or pass "
                "on_bad_row='set_aside' to go on without such rows."
            )

    def _beyond_context(self, examples: Sequence[TokenizedExample]) -> list[tuple[int, str]]:
        if self.context is None:
            return []
        cut = self.loss.max_length
        return [
            (
                example.row,
                f"needs {size} tokens, but the model's context has {self.context}; set max_length below it",
            )
            for example in examples
            if (size := min(example.size, cut or example.size)) > self.context
        ]

    def _notes(
        self, good: Sequence[tuple[int, Mapping[str, Any]]], examples: Sequence[TokenizedExample]
    ) -> dict[str, int]:
        cut = self.loss.max_length
        return {
            "truncated": sum(cut is not None and example.size > cut for example in examples),
            "identical": sum(columns.get("chosen") == columns.get("rejected") for _, columns in good)
            if self.loss.rows_per_example == 2
            else 0,
        }

    def _check_same_rows(self, store: AuditStore, dataset: DatasetLike) -> None:
        number, rows = -1, 0
        for number, chunk in enumerate(chunks(dataset, self.config.part_size)):
            if number >= store.manifest["parts"]:
                raise _other_data(store, rows)
            _check_digests(store, store.digests(number), chunk)
            rows += len(chunk)
        if rows != store.manifest["rows"]:
            raise _other_data(store, rows)

    def _describe(self, module: str, reference: nn.Module | None) -> dict[str, Any]:
        config = self.config
        return {
            "loss": self.loss.describe() | {"sides": list(self.loss.sides)},
            "dictionary": asdict(self.dictionary.info),
            "module": module,
            "model": model_name(self.model),
            "model_fingerprint": fingerprint(self.model),
            "reference_fingerprint": None if reference is None else fingerprint(reference),
            "settings": {
                "part_size": config.part_size,
                "activations": config.activations,
                "attention_sinks": config.attention_sinks,
                "on_bad_row": config.on_bad_row,
                "seed": config.seed,
            },
        }


def _entries(dictionary: FeatureDictionary, loss: Loss) -> int:
    """Figures of an example that the audit would keep although they are sums already."""
    return 0 if dictionary.encoder is not None else dictionary.d_sae * loss.rows_per_example


def context_length(model: nn.Module) -> int | None:
    """Most tokens the model has positions for; None if it does not say."""
    config = next(
        part for part in model.modules() if isinstance(part, PreTrainedModel)
    ).config.get_text_config()
    return config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names, shapes and some values of every weight: tells models apart, at no cost."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = torch.cat([flat[:8], flat[len(flat) // 2 :][:8], flat[-8:]]).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()


def _size(dataset: DatasetLike) -> int | None:
    rows = only_split(dataset)
    return len(rows) if isinstance(rows, Sized) and not isinstance(rows, (str, Path)) else None


def _check_digests(store: AuditStore, stored: np.ndarray, rows: Sequence[Row]) -> None:
    found = digests(rows)
    same = len(found) == len(stored) and (found == stored).all(1)
    if not np.all(same):
        first = int(np.argmin(same)) if np.ndim(same) else min(len(found), len(stored))
        raise _other_data(store, rows[0].index + first)


def _other_data(store: AuditStore, row: int) -> DirectoryTakenError:
    return DirectoryTakenError(
        f"The audit in {store.directory} is of another dataset: it differs from row {row} on; choose another output_dir, "
        "or delete it."
    )


def _warn(audit: Audit) -> None:
    notes, n = audit.manifest["notes"], audit.manifest["rows"]
    sampled = audit.manifest["loss"].get("answers_sampled")  # the same answer may come twice
    if notes["duplicates"] and not sampled:
        logger.warning(
            "%d of %d rows are exact duplicates of others: they count double here and in training, and p-values take "
            "them for independent; deduplicate the data.",
            notes["duplicates"],
            n,
        )
    if notes.get("identical"):
        logger.warning(
            "%d of %d rows have the same text as chosen and rejected: they teach nothing under the first step's "
            "loss; remove them.",
            notes["identical"],
            n,
        )
    if notes.get("truncated"):
        logger.warning(
            "%d of %d rows are longer than max_length and are cut there, as in training; their answers' ends are not "
            "audited. Raise max_length in the DPOConfig if the model's context allows.",
            notes["truncated"],
            n,
        )
    if audit.set_aside:
        row, reason = audit.set_aside[0]
        logger.warning(
            "%d of %d rows were set aside, the first because row %d %s.", len(audit.set_aside), n, row, reason
        )
