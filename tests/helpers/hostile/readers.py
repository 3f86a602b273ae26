"""Every reader of the package, with a small valid input that it is made to read: what the fuzzer breaks."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars

from helpers.hostile.inputs import (
    STEPS,
    F,
    conversation_rows,
    json_lines,
    make_dictionary,
    make_evidence,
    make_flags,
    make_penalties,
    make_sae,
    make_totals,
    pair_rows,
    write_audit,
    write_filtered,
    write_record,
    write_verified,
)
from helpers.hostile.more_inputs import (
    write_audit_with_contexts,
    write_dictionary_learning,
    write_directions,
    write_gemma_scope,
    write_llama_scope,
    write_reward_audit,
    write_run_with_contexts,
    write_sparsify,
)
from trl_sae_audit.audit.content import read_dictionary_info, read_feature, read_feature_words
from trl_sae_audit.audit.evidence import read_labels
from trl_sae_audit.audit.evidence_files import read_evidence, write_evidence
from trl_sae_audit.audit.result import Audit
from trl_sae_audit.cli.parser import read_config
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.data.preferences import PairCheck, row_digest
from trl_sae_audit.data.texts import read_texts
from trl_sae_audit.flags import Flag, FlagSet
from trl_sae_audit.lab.cache import build_once, check_world
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.record.checkpoint import CallbackState
from trl_sae_audit.record.reader import RunRecord
from trl_sae_audit.report.filtered import read_filtered
from trl_sae_audit.report.page import write_report
from trl_sae_audit.report.verified import read_verified
from trl_sae_audit.saes.loading import load_dictionary
from trl_sae_audit.shaping.calibration import read_calibration, write_calibration
from trl_sae_audit.shaping.files import read_shaping, write_shaping


@dataclass(frozen=True)
class Reader:
    """A reader and what it reads.

    Attributes:
        write: makes a valid input in an empty directory.
        read: reads it; what it returns is compared by its text.
        checked: names of the files (as patterns) whose content a checksum covers: to read another value from them is wrong.
        cost: how many times fewer iterations it gets than the cheapest.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    checked: Sequence[str] = ()
    cost: int = 1


def read_record(directory: Path) -> Any:
    record = RunRecord.load(directory)
    return (
        record.manifest,
        record.features(),
        record.curriculum(),
        record.totals().state_dict(),
        [record.table(name) for name in record.tables],
        record.steps("tiny") if "tiny" in [each["name"] for each in record.dictionaries] else None,
    )


def read_audit(directory: Path) -> Any:
    audit = Audit.load(directory)
    flags = [Flag("tiny", 2)] if audit.dictionary.name == "tiny" else []
    return (
        audit.manifest,
        audit.dictionary.directions,
        audit.features(),
        audit.examples([1, 2]),
        audit.contributions([1]),
        audit.digests(),
        audit.set_aside,
        [audit.influence(flags)] if flags else None,
    )


def _read_contexts(directory: Path) -> Any:
    audit = Audit.load(directory)
    return (
        audit.contexts(range(F)),
        audit.activity([0, 1]),
        audit.features(),
        read_dictionary_info(directory),
        read_feature(directory, 1),
        read_feature_words(directory, 1),
        audit.contexts([1]),
    )


def _read_answers(directory: Path) -> Any:
    audit = Audit.load(directory)
    return audit.answers(), audit.features(), audit.examples([1])


def _read_run_with_contexts(directory: Path) -> Any:
    record = RunRecord.load(directory)
    names = [each["name"] for each in record.dictionaries]
    return (
        [record.contexts(range(F), name) for name in names],
        [record.words(range(F), name) for name in names],
        [record.drift(name) for name in names],
        record.features(),
        str(record).replace(str(directory), ""),
    )


def _read_directions(directory: Path) -> Any:
    found = load_dictionary(directory)
    return (
        found.info,
        found.directions,
        getattr(found, "separations", None),
        found.encode(torch.ones(2, found.d_model)),
    )


def _read_evidence(directory: Path) -> Any:
    found = read_evidence(directory)
    return found, [each.to_markdown() for each in found.values()]


def _write_outcomes(directory: Path) -> None:
    write_outcomes(
        directory, [Outcome("agrees", 0.5, 0.4, 0.6, 100, "agrees", unit="share"), Outcome("right", 0.9)]
    )


def _write_checkpoint(directory: Path) -> None:
    own = make_dictionary()
    CallbackState(STEPS, {"tiny": make_totals()}, {"tiny": torch.ones(1)}, "record").save(directory, [own])


def _read_checkpoint(directory: Path) -> Any:
    state = CallbackState.load(directory, [make_dictionary()])
    return state.step, state.baselines, state.totals["tiny"].state_dict()


def _read_sae(directory: Path) -> Any:
    found = load_dictionary(directory)
    hidden = torch.ones(2, found.d_model)
    return found.info, found.encode(hidden), found.reconstruct(hidden, found.encode(hidden))


def _write_shaping(directory: Path) -> None:
    for number, penalty in enumerate(make_penalties()):
        (directory / str(number)).mkdir()
        write_shaping(directory / str(number), "reward", penalty)


def _read_shaping(directory: Path) -> Any:
    found = [read_shaping(directory / str(number))[1] for number in range(2)]
    for penalty in found:
        if penalty.keys is not None and len(penalty.keys) == 2:
            penalty.bind(list(make_flags()))
    return [(penalty.settings(), penalty.state_dict()) for penalty in found]


def _calibration(directory: Path) -> Path:
    return directory / "calibration.safetensors"


def _write_calibration(directory: Path) -> None:
    state = {"identity": "0" * 64, "pooling": "max", "attention_sinks": False, "calibration_size": 7}
    write_calibration(_calibration(directory), {**state, "mean": torch.ones(F), "deviation": torch.ones(F)})


def read_rows(path: Path) -> Any:
    """Every row, with what is wrong with it."""
    check = PairCheck()
    return [(row.columns, check(row), row_digest(row)) for row in iterate_rows(path)]


class _Plain:
    """As much of a tokenizer as reading texts needs."""

    chat_template = "x"

    def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages)


def _read_texts(path: Path) -> list[str]:
    return read_texts(path, _Plain())


def _write_report(directory: Path) -> None:
    write_record(directory)
    _write_outcomes(directory)
    write_evidence(directory, make_evidence())


def _read_report(directory: Path) -> Any:
    """A page differs in its date, so that only that there is one is compared."""
    return write_report(directory, directory / "report.html").stat().st_size > 0


def _write_audit_report(directory: Path) -> None:
    write_audit(directory)
    write_evidence(directory, make_evidence())


def _write_world(directory: Path) -> None:
    def build(scratch: Path) -> None:
        (scratch / "model.bin").write_bytes(bytes(range(200)))
        (scratch / "report.json").write_text("{}")

    build_once(directory / "world", build)


def write_file(name: str, content: bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content)

    return write


def _in(read: Callable[[Path], Any], name: str) -> Callable[[Path], Any]:
    return lambda directory: read(directory / name)


def _saved(rows: Sequence[dict[str, Any]], name: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        dataset = Dataset.from_list(list(rows))
        disable_progress_bars()
        if name.endswith(".parquet"):
            dataset.to_parquet(str(directory / name))
        else:
            dataset.save_to_disk(str(directory / name))

    return write


def _readers() -> dict[str, Reader]:
    labels = {"2": "agrees", "4": "pads"}
    config = b"output_dir: runs/audit\nloss_type: [sigmoid, hinge]\nbeta: 0.1\ntop: 10\n"
    label_rows = [{"index": 2, "description": "agrees"}, {"index": 4, "description": "pads"}]
    return {
        "flags": Reader(
            lambda directory: make_flags().save(directory / "flags.yaml"), _in(FlagSet.load, "flags.yaml")
        ),
        "config": Reader(
            write_file("config.yaml", config), lambda directory: read_config(str(directory / "config.yaml"))
        ),
        "outcomes": Reader(_write_outcomes, read_outcomes),
        "evidence": Reader(lambda directory: write_evidence(directory, make_evidence()), _read_evidence),
        "labels.json": Reader(
            write_file("labels.json", json.dumps(labels).encode()), _in(read_labels, "labels.json")
        ),
        "labels.jsonl": Reader(
            write_file("labels.jsonl", json_lines(label_rows)), _in(read_labels, "labels.jsonl")
        ),
        "labels.csv": Reader(
            write_file("labels.csv", b"feature,label\n2,agrees\n4,pads\n"), _in(read_labels, "labels.csv")
        ),
        "cached world": Reader(
            _write_world, _in(check_world, "world"), checked=("*/model.bin", "*/report.json")
        ),
        "penalties": Reader(_write_shaping, _read_shaping),
        "calibration": Reader(
            _write_calibration, lambda directory: read_calibration(_calibration(directory)), checked=("*",)
        ),
        "checkpoint": Reader(_write_checkpoint, _read_checkpoint, checked=("totals*",)),
        "pairs.jsonl": Reader(
            write_file("pairs.jsonl", json_lines(pair_rows())), _in(read_rows, "pairs.jsonl")
        ),
        "pairs.jsonl.gz": Reader(
            write_file("pairs.jsonl.gz", gzip.compress(json_lines(pair_rows()), mtime=0)),
            _in(read_rows, "pairs.jsonl.gz"),
        ),
        "pairs.json": Reader(
            write_file("pairs.json", json.dumps(pair_rows(), indent=1).encode()), _in(read_rows, "pairs.json")
        ),
        "pairs.csv": Reader(
            write_file("pairs.csv", pd.DataFrame(pair_rows()).to_csv(index=False).encode()),
            _in(read_rows, "pairs.csv"),
        ),
        "conversations.jsonl": Reader(
            write_file("conversations.jsonl", json_lines(conversation_rows())),
            _in(read_rows, "conversations.jsonl"),
        ),
        "pairs.parquet": Reader(
            _saved(pair_rows(), "pairs.parquet"), _in(read_rows, "pairs.parquet"), cost=2
        ),
        "conversations.parquet": Reader(
            _saved(conversation_rows(), "conversations.parquet"),
            _in(read_rows, "conversations.parquet"),
            cost=2,
        ),
        "texts.jsonl": Reader(
            write_file("texts.jsonl", json_lines(conversation_rows())), _in(_read_texts, "texts.jsonl")
        ),
        "texts.txt": Reader(write_file("texts.txt", b"one text\n\nanother\n"), _in(_read_texts, "texts.txt")),
        "texts.txt.gz": Reader(
            write_file("texts.txt.gz", gzip.compress(b"one text\n\nanother\n", mtime=0)),
            _in(_read_texts, "texts.txt.gz"),
        ),
        "filtered": Reader(write_filtered, read_filtered, cost=2),
        "verified": Reader(write_verified, read_verified, cost=2),
        "saved dataset": Reader(_saved(pair_rows(), "pairs"), _in(read_rows, "pairs"), cost=4),
        "run record": Reader(write_record, read_record, checked=("*.parquet", "*.safetensors"), cost=8),
        "audit": Reader(write_audit, read_audit, checked=("parts/*", "*.safetensors"), cost=8),
        "sae (topk)": Reader(lambda directory: make_sae("topk").save_model(directory), _read_sae, cost=4),
        "sae (jumprelu)": Reader(
            lambda directory: make_sae("jumprelu").save_model(directory), _read_sae, cost=4
        ),
        "directions": Reader(write_directions, _read_directions, checked=("*.safetensors",)),
        "audit of a reward": Reader(write_reward_audit, _read_answers, checked=("answers.jsonl",), cost=8),
        "contexts of an audit": Reader(write_audit_with_contexts, _read_contexts, cost=8),
        "contexts of a run": Reader(
            write_run_with_contexts, _read_run_with_contexts, checked=("*.parquet",), cost=8
        ),
        "sae (sparsify)": Reader(write_sparsify, _in(_read_sae, "layers.1"), cost=4),
        "sae (dictionary_learning)": Reader(write_dictionary_learning, _read_sae, cost=4),
        "sae (llama_scope)": Reader(write_llama_scope, _read_sae, cost=4),
        "sae (gemma_scope)": Reader(
            write_gemma_scope, _in(_read_sae, "gemma-scope-2b-pt-res/layer_1"), cost=4
        ),
        "report of a record": Reader(_write_report, _read_report, cost=20),
        "report of an audit": Reader(_write_audit_report, _read_report, cost=20),
    }


def text_of(value: Any) -> str:
    """What was read, as text: equal where the values are."""
    return "\n".join(_texts(value))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, pd.DataFrame):
        yield repr(value.to_dict("list"))
        yield str(value.dtypes.tolist())
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {value.tolist()!r}"
    elif isinstance(value, torch.Tensor):
        yield from _texts(value.numpy())
    elif isinstance(value, dict):
        for key, each in value.items():
            yield repr(key)
            yield from _texts(each)
    elif isinstance(value, list | tuple) and not hasattr(value, "__dataclass_fields__"):
        yield f"{len(value)}:"
        for each in value:
            yield from _texts(each)
    else:
        yield repr(value)


READERS = _readers()
"""By name, those that take longest at the end."""
