"""Running an audit: rows in, parts of the audit's directory out, on one process or several."""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .audit_pass import AuditPass
from .audit_result import PREDICTIONS, Audit
from .audit_store import AuditStore, Part, dictionary_header
from .dictionary import FeatureDictionary
from .errors import AuditError
from .lookahead import Lookahead
from .objectives import Loss, TokenizedExample
from .preferences import PairCheck, Row, Source, iterate_rows, row_digest
from .preflight import check_dictionary, check_whole, model_name
from .rehearsal import Rehearsal
from .rewards import AnswerCheck, answer_ids
from .sampling import Sampling, sampled_batches
from .update_rule import UpdateRule

logger = logging.getLogger(__name__)

RowCheck = PairCheck | AnswerCheck

_SAMPLED_TOGETHER = 8  # batches: sampling keeps no graph


@dataclass(frozen=True)
class RunSettings:
    """See `audit_preferences`."""

    batch_size: int
    part_size: int
    activations: bool
    on_bad_row: str
    seed: int


class AuditRun:
    """One audit from data to directory, on this process's share of the parts."""

    def __init__(
        self,
        model: nn.Module,
        dictionary: FeatureDictionary,
        loss: Loss,
        *,
        reference: nn.Module | None,
        settings: RunSettings,
        progress: bool,
        pass_type: type[AuditPass] = AuditPass,
    ) -> None:
        check_whole(model)
        point = check_dictionary(dictionary, model)
        device = next(point.decoder.parameters()).device
        self.dictionary = dictionary.to(device)
        self.model = model
        self.loss = loss
        self.settings = settings
        self.progress = progress
        self._point, self._reference = point, reference
        self._pass = pass_type(
            model, point, self.dictionary, loss, reference=reference, activations=settings.activations
        )
        self._context = context_length(model)
        self._header = self._describe(point.path, reference)

    def over(self, dataset: Source, check: RowCheck, output_dir: str | Path | None) -> Audit:
        """Audit every row."""
        state = PartialState()
        temporary = output_dir is None
        if temporary and state.num_processes > 1:
            raise AuditError("An audit by several processes needs an output_dir that they share; pass one.")
        directory = Path(tempfile.mkdtemp(prefix="sae-audit-") if output_dir is None else output_dir)
        try:
            if state.is_main_process:
                store = AuditStore.create(directory, self._header, self.dictionary)
            state.wait_for_everyone()
            store = AuditStore.open(directory)
            if not store.finished:
                self._write_parts(store, dataset, check, state)
            else:
                self._check_same_rows(store, dataset)
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

    def look_ahead(
        self,
        audit: Audit,
        dataset: Source,
        probe: Source,
        rule: UpdateRule,
        sampling: Sampling | None,
        rehearsed: tuple[float, int | None] | None,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Add a lookahead to the finished audit of `dataset`; see `audit_preferences`. `rehearsed` are the steps and parts of a
        rehearsal."""
        rows = list(iterate_rows(probe))
        check = PairCheck()
        for row in rows:
            problem = check(row)
            if problem:
                raise AuditError(f"Row {row.index} of the lookahead's probe {problem}; correct or remove it.")
        if sampling is not None:
            _check_sampling(sampling, rows)
        held_out = self.loss.tokenize([(row.index, row.columns) for row in rows if row.columns is not None])
        description = rule.describe() | {
            "probe_sha256": hashlib.sha256(_digests(rows).tobytes()).hexdigest(),
            "sampling": None if sampling is None else asdict(sampling),
            "predictions": list(PREDICTIONS),
        }
        lookahead = Lookahead(
            self.model,
            self._point,
            self.dictionary,
            self.loss,
            rule,
            lambda: self._audited_batches(audit, dataset),
            lambda: batched(held_out, self.settings.batch_size),
            reference=self._reference,
        )
        rehearsal = None if rehearsed is None else Rehearsal(lookahead, *rehearsed)
        description["rehearsal"] = None if rehearsal is None else [rehearsal.steps, rehearsal.parts]
        audit.look_ahead(
            lookahead,
            description,
            rehearsal,
            None if sampling is None else lambda: self._sampled(rows, sampling, tokenizer),
        )

    def _sampled(
        self, rows: Sequence[Row], sampling: Sampling, tokenizer: PreTrainedTokenizerBase
    ) -> Iterator[Mapping[str, Tensor]]:
        """Answers of the model itself at the prompts of some rows, in batches."""
        prompts = [answer_ids(tokenizer, (row.columns or {})["prompt"], "")[0] for row in rows]
        size = self.settings.batch_size
        return sampled_batches(
            self.model,
            tokenizer,
            prompts,
            sampling,
            together=_SAMPLED_TOGETHER * size,
            batch_size=size,
            progress=self.progress,
        )

    def _audited_batches(self, audit: Audit, dataset: Source) -> Iterator[Sequence[TokenizedExample]]:
        audited = set(audit.rows().tolist())
        for rows in _chunks(dataset, self.settings.part_size):
            good = [
                (row.index, row.columns) for row in rows if row.columns is not None and row.index in audited
            ]
            yield from batched(self.loss.tokenize(good), self.settings.batch_size)

    def _write_parts(self, store: AuditStore, dataset: Source, check: RowCheck, state: PartialState) -> None:
        there = store.existing_parts()
        state.wait_for_everyone()
        number = -1
        bar = tqdm(
            desc="Auditing",
            unit=" rows",
            disable=None if self.progress and state.is_main_process else True,
            total=_size(dataset),
        )
        with bar:
            for number, rows in enumerate(_chunks(dataset, self.settings.part_size)):
                problems = [check(row) for row in rows]
                if number in there:
                    _check_digests(store, store.digests(number), rows)
                else:
                    self._write_part(store, number, rows, problems, state)
                bar.update(len(rows))
        state.wait_for_everyone()
        if state.is_main_process:
            store.finish(number + 1, state.num_processes)

    def _write_part(
        self, store: AuditStore, number: int, rows: list[Row], problems: list[str | None], state: PartialState
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
        arrays = self._pass.run(examples, self.settings.batch_size)
        broken = [
            (example.row, "has a loss or gradient that is not finite")
            for example, finite in zip(examples, arrays.finite, strict=True)
            if not finite
        ]
        self._stop_at(broken)
        if broken:
            out = {index for index, _ in broken}
            examples = [example for example in examples if example.row not in out]
            arrays = self._pass.run(examples, self.settings.batch_size)
        part = Part(
            row=np.array([example.row for example in examples], np.int64),
            digest=_digests(rows),
            set_aside=sorted([*aside, *dropped, *too_long, *broken]),
            arrays=arrays,
            notes=self._notes(good, examples),
        )
        store.write_part(number, part)

    def _stop_at(self, bad: list[tuple[int, str]]) -> None:
        if bad and self.settings.on_bad_row == "stop":
            index, reason = min(bad)
            raise AuditError(
                f"Row {index} of the dataset (counted from 0) {reason}; correct or remove it, or pass "
                "on_bad_row='set_aside' to go on without such rows."
            )

    def _beyond_context(self, examples: Sequence[TokenizedExample]) -> list[tuple[int, str]]:
        if self._context is None:
            return []
        cut = self.loss.max_length
        return [
            (
                example.row,
                f"needs {size} tokens, but the model's context has {self._context}; set max_length below it",
            )
            for example in examples
            if (size := min(example.size, cut or example.size)) > self._context
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

    def _check_same_rows(self, store: AuditStore, dataset: Source) -> None:
        number, rows = -1, 0
        for number, chunk in enumerate(_chunks(dataset, self.settings.part_size)):
            if number >= store.manifest["parts"]:
                raise _other_data(store, rows)
            _check_digests(store, store.digests(number), chunk)
            rows += len(chunk)
        if rows != store.manifest["rows"]:
            raise _other_data(store, rows)

    def _describe(self, module: str, reference: nn.Module | None) -> dict[str, Any]:
        settings = self.settings
        return {
            "loss": self.loss.describe() | {"sides": list(self.loss.sides)},
            "dictionary": dictionary_header(self.dictionary),
            "module": module,
            "model": model_name(self.model),
            "model_fingerprint": fingerprint(self.model),
            "reference_fingerprint": None if reference is None else fingerprint(reference),
            "settings": {
                "part_size": settings.part_size,
                "activations": settings.activations,
                "on_bad_row": settings.on_bad_row,
                "seed": settings.seed,
            },
            "versions": {name: version(name) for name in ("trl-sae-audit", "trl", "transformers", "torch")},
        }


def _check_sampling(sampling: Sampling, probe: Sequence[Row]) -> None:
    if sampling.temperature != 1:
        raise AuditError(
            f"The temperature is {sampling.temperature}; a lookahead to sampled answers needs them sampled at temperature 1."
        )
    for row in probe:
        if not (row.columns or {}).get("prompt"):
            raise AuditError(
                f"Row {row.index} of the lookahead's probe has no 'prompt' to sample answers at; add prompts, or leave "
                "sampling= out."
            )


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


def batched(examples: Sequence[TokenizedExample], size: int) -> Iterator[Sequence[TokenizedExample]]:
    """`examples` in their order, `size` at a time."""
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def _chunks(dataset: Source, size: int) -> Iterator[list[Row]]:
    rows = iterate_rows(dataset)
    while chunk := list(islice(rows, size)):
        yield chunk


def _size(dataset: Source) -> int | None:
    return None if isinstance(dataset, (str, Path)) or not hasattr(dataset, "__len__") else len(dataset)


def _digests(rows: Sequence[Row]) -> np.ndarray:
    return np.frombuffer(b"".join(row_digest(row) for row in rows), np.uint8).reshape(-1, 32)


def _check_digests(store: AuditStore, stored: np.ndarray, rows: Sequence[Row]) -> None:
    found = _digests(rows)
    same = len(found) == len(stored) and (found == stored).all(1)
    if not np.all(same):
        first = int(np.argmin(same)) if np.ndim(same) else min(len(found), len(stored))
        raise _other_data(store, rows[0].index + first)


def _other_data(store: AuditStore, row: int) -> AuditError:
    return AuditError(
        f"The audit in {store.directory} is of another dataset: it differs from row {row} on; choose another output_dir, "
        "or delete it."
    )


def _warn(audit: Audit) -> None:
    notes, n = audit.manifest["notes"], audit.manifest["rows"]
    if notes["duplicates"]:
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
