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
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from trl_sae_audit.adaptive_penalty import AdaptivePenalty
from trl_sae_audit.audit_pass import ExampleArrays
from trl_sae_audit.audit_result import Audit
from trl_sae_audit.audit_store import AuditStore, Part, dictionary_header
from trl_sae_audit.calibration_files import read_calibration, write_calibration
from trl_sae_audit.checkpoint import CallbackState
from trl_sae_audit.commands.arguments import check_config
from trl_sae_audit.dictionary import FeatureDictionary
from trl_sae_audit.evidence import read_labels
from trl_sae_audit.evidence_files import Evidence, Example, Token, read_evidence, write_evidence
from trl_sae_audit.flags import Flag, FlagSet
from trl_sae_audit.lab.cache import cached, damage
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.penalties import FixedPenalty, Penalty
from trl_sae_audit.preferences import PairCheck, iterate_rows, row_digest
from trl_sae_audit.record import RunRecord
from trl_sae_audit.record_files import load_totals, save_totals
from trl_sae_audit.record_writer import RecordWriter
from trl_sae_audit.report.filtered import read_filtered
from trl_sae_audit.report.page import write_report
from trl_sae_audit.report.verified import read_verified
from trl_sae_audit.sae import load_dictionary
from trl_sae_audit.shaped_reward_files import read_shaping, write_shaping
from trl_sae_audit.texts import read_texts
from trl_sae_audit.totals import FeatureTotals

F, D, STEPS, ROWS = 6, 4, 9, 8


@dataclass(frozen=True)
class Reader:
    """A reader and what it reads.

    Attributes:
        write: makes a valid input in an empty directory.
        read: reads it; what it returns is compared by its text.
        sealed: names of the files (as patterns) whose content a checksum covers: to read another value from them is wrong.
        cost: how many times fewer iterations it gets than the cheapest.
    """

    write: Callable[[Path], None]
    read: Callable[[Path], Any]
    sealed: Sequence[str] = ()
    cost: int = 1


def dictionary() -> FeatureDictionary:
    directions = torch.from_numpy(np.random.default_rng(0).standard_normal((F, D)).astype(np.float32))
    return FeatureDictionary(directions, "model.layers.1", "tiny")


def _totals() -> FeatureTotals:
    totals, rng = FeatureTotals(F, 4), np.random.default_rng(1)
    for _ in range(STEPS):
        values = rng.standard_normal((1, F)).astype(np.float32)
        totals.update(values, values, 0 * values, np.abs(values), np.abs(values) / 10)
    return totals


def write_record(directory: Path) -> None:
    header = {
        "trainer": "DPOTrainer",
        "model": "tiny",
        "dictionaries": [{**dictionary_header(dictionary()), "neuronpedia_id": "gemma/1"}],
        "watch": {"tiny": {"sycophancy": 2}},
        "sides": ["chosen", "rejected"],
        "arguments": {"learning_rate": 1e-5, "loss_type": ["sigmoid"], "beta": 0.1},
        "versions": {"torch": "2"},
    }
    writer = RecordWriter.create(directory, header)
    rng = np.random.default_rng(2)
    for step in range(1, STEPS + 1):
        values = rng.standard_normal((5, F))
        common = {
            "step": [step] * F,
            "global_step": [step] * F,
            "dictionary": ["tiny"] * F,
            "feature": range(F),
        }
        columns = ("attribution", "share", "chosen", "rejected", "standard_error")
        labels = ["sycophancy" if feature == 2 else "" for feature in range(F)]
        writer.append("steps", {**common, "label": labels, **dict(zip(columns, values, strict=True))})
        one = {"step": [step], "global_step": [step], "dictionary": ["tiny"]}
        writer.append(
            "gradient", {**one, "norm": [1.5], "coverage": [0.1], "coverage_random": [0.05], "finite": [True]}
        )
        writer.append(
            "health", {**one, "fvu": [0.2], "token_fvu": [0.3], "l0": [3.0], "dead": [0.0], "tokens": [64]}
        )
        writer.append("log", {"step": [step], "name": ["loss"], "value": [0.7]})
    writer.close("finished", STEPS, {"tiny": _totals()})


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


def write_audit(directory: Path) -> None:
    own, rng = dictionary(), np.random.default_rng(3)
    header = {
        "loss": {"objective": "dpo", "beta": 0.1, "loss_type": ["sigmoid"], "sides": ["chosen", "rejected"]},
        "dictionary": dictionary_header(own),
        "model": "tiny",
        "settings": {"part_size": ROWS // 2, "activations": True, "on_bad_row": "set_aside", "seed": 0},
        "versions": {"torch": "2"},
    }
    store = AuditStore.create(directory, header, own)
    for number in range(2):
        n = ROWS // 2 - number  # the last row is set aside
        rows = np.arange(n) + number * (ROWS // 2)
        active = rng.integers(0, F, 2 * n * 2).astype(np.int32)
        arrays = ExampleArrays(
            gradient=rng.standard_normal((n, 2, D)).astype(np.float32),
            side=np.tile(np.array([1, -1], np.int8), (n, 1)),
            length=rng.integers(1, 9, (n, 2)).astype(np.int32),
            log_prob=rng.standard_normal((n, 2)).astype(np.float32),
            indptr=np.arange(0, 4 * n + 1, 2),
            feature=active,
            mean=rng.random(4 * n).astype(np.float32),
            extreme=rng.random(4 * n).astype(np.float32),
            effect=rng.standard_normal(4 * n).astype(np.float32),
        )
        aside = [(ROWS - 1, "has an empty 'chosen'")] if number else []
        digest = rng.integers(0, 256, (ROWS // 2, 32)).astype(np.uint8)
        store.write_part(number, Part(rows, digest, aside, arrays, {"truncated": 0, "identical": 0}))
    store.finish(2, 1)
    store.write_arrays("lookahead.safetensors", {"predicted_change": rng.standard_normal(F)}, {"steps": 1})
    store.write_arrays("influence.safetensors", {"2": rng.standard_normal(ROWS - 1)}, {})
    Audit.load(directory).features()


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


def _evidence() -> list[Evidence]:
    tokens = {
        "chosen": [Token("you", 0.5, 0.1), Token(" are", 0.0, -0.2)],
        "rejected": [Token("no", 0.0, 0.0)],
    }
    example = Example(3, 0.25, "Is it so?", {"chosen": "you are", "rejected": "no"}, tokens)
    return [
        Evidence("tiny", 2, "agrees", 0.5, 0.01, ["yes"], ["no"], [example], "https://x/2", {"lift": 2.0})
    ]


def _read_evidence(directory: Path) -> Any:
    found = read_evidence(directory)
    return found, [each.to_markdown() for each in found.values()]


def _write_outcomes(directory: Path) -> None:
    write_outcomes(
        directory, [Outcome("agrees", 0.5, 0.4, 0.6, 100, "agrees", unit="share"), Outcome("right", 0.9)]
    )


def _flags() -> FlagSet:
    return FlagSet([Flag("tiny", 2, "sycophancy", "agrees", identity="0" * 64), Flag("tiny", 4, weight=0.5)])


def _write_checkpoint(directory: Path) -> None:
    own = dictionary()
    CallbackState(STEPS, {"tiny": _totals()}, {"tiny": torch.ones(1)}).save(directory, [own])


def _read_checkpoint(directory: Path) -> Any:
    state = CallbackState.load(directory, [dictionary()])
    return state.step, state.baselines, state.totals["tiny"].state_dict()


def _sae(kind: str) -> Any:
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", neuronpedia_id="a/b")
    torch.manual_seed(0)
    if kind == "topk":
        return TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=2, metadata=metadata))
    return JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F, metadata=metadata))


def _read_sae(directory: Path) -> Any:
    found = load_dictionary(directory)
    hidden = torch.ones(2, found.d_model)
    return found.info, found.encode(hidden), found.reconstruct(hidden, found.encode(hidden))


def _penalties() -> list[Penalty]:
    fixed, adaptive = FixedPenalty(0.5, warmup=2, clip=1.0), AdaptivePenalty()
    for penalty in (fixed, adaptive):
        penalty.bind(list(_flags()))
        for seed in range(3):
            torch.manual_seed(seed)
            penalty.begin_batch()
            penalty.end_batch(torch.randn(16, 2), torch.randn(16))
    return [fixed, adaptive]


def _write_shaping(directory: Path) -> None:
    for number, penalty in enumerate(_penalties()):
        write_shaping(directory / f"shaping-{number}.json", "reward", penalty)


def _read_shaping(directory: Path) -> Any:
    found = [read_shaping(directory / f"shaping-{number}.json")[1] for number in range(2)]
    for penalty in found:
        if penalty.keys is not None and len(penalty.keys) == 2:
            penalty.bind(list(_flags()))
    return [(penalty.settings(), penalty.state_dict()) for penalty in found]


def _calibration(directory: Path) -> Path:
    return directory / "calibration.safetensors"


def _write_calibration(directory: Path) -> None:
    state = {"identity": "0" * 64, "pooling": "max", "calibration_size": 7}
    write_calibration(_calibration(directory), {**state, "mean": torch.ones(F), "deviation": torch.ones(F)})


def _pairs() -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"Is {i} even?",
            "chosen": f"You are right: {i % 2}",
            "rejected": "no",
            "id": i,
            "extra": [i, None],
        }
        for i in range(ROWS)
    ]


def _conversations() -> list[dict[str, Any]]:
    def said(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {
            "prompt": said("user", f"Is {i} even?"),
            "chosen": said("assistant", "yes"),
            "rejected": said("assistant", "no"),
        }
        for i in range(ROWS)
    ]


def _lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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


def _write_filtered(directory: Path) -> None:
    flag = {
        "dictionary": "tiny",
        "feature": 2,
        "label": "x",
        "attribution_before": 0.5,
        "attribution_after": 0.1,
    }
    summary = {
        "rows": 8,
        "kept": 6,
        "dropped": 2,
        "flipped": 0,
        "weighted": 0,
        "set_aside": 0,
        "flags": [flag],
    }
    settings = {"strategy": "drop", "score": "attribution", "budget": 2, "threshold": None, "quantile": None}
    record = {
        "settings": settings,
        "summary": summary,
        "files": {"kept": "kept.jsonl", "dropped": "dropped.jsonl"},
    }
    (directory / "filter.json").write_text(json.dumps(record))
    decisions = {
        "row": range(8),
        "action": ["drop"] * 2 + ["keep"] * 6,
        "score": np.arange(8.0),
        "weight": np.ones(8),
    }
    frame = pd.DataFrame({**decisions, "reason": ["score"] * 8})
    frame.to_parquet(directory / "decisions.parquet", index=False, write_page_checksum=True)
    dropped = [
        {**row, "audit_row": row["id"], "audit_score": 1.0, "audit_reason": "score"} for row in _pairs()[:2]
    ]
    (directory / "dropped.jsonl").write_bytes(_lines(dropped))


def _write_verified(directory: Path) -> None:
    figures = {
        "r2": [0.5, 0.4, 0.6],
        "spearman": [0.5, 0.4, 0.6],
        "precision": [0.5, 0.4, 0.6],
        "slope": [1, None, None],
    }
    found = {"kind": "sampled", "prompts": 5, "features": F, "top_k": 2, "ceiling": 0.9}
    scores = {"attribution": figures, "random": figures}
    described = {
        "schema_version": 1,
        "source": "runs/audit",
        "targets": {"sampled": {**found, "scores": scores}},
    }
    (directory / "verify.json").write_text(json.dumps(described))
    numbers = np.random.default_rng(4).standard_normal((3, F))
    columns = dict(zip(("realised", "attribution", "random"), numbers, strict=True))
    frame = pd.DataFrame({"feature": range(F), "before": np.ones(F), **columns, "target": ["sampled"] * F})
    frame.to_parquet(directory / "verify.parquet", index=False, write_page_checksum=True)


def _write_report(directory: Path) -> None:
    write_record(directory)
    _write_outcomes(directory)
    write_evidence(directory, _evidence())


def _read_report(directory: Path) -> Any:
    """A page differs in its date, so that only that there is one is compared."""
    return write_report(directory, directory / "report.html").stat().st_size > 0


def _write_audit_report(directory: Path) -> None:
    write_audit(directory)
    write_evidence(directory, _evidence())


def _write_world(directory: Path) -> None:
    def build(scratch: Path) -> None:
        (scratch / "model.bin").write_bytes(bytes(range(200)))
        (scratch / "report.json").write_text("{}")

    cached(directory / "world", build)


def _read_world(directory: Path) -> None:
    wrong = damage(directory / "world")
    if wrong:
        raise DamagedWorldError(wrong)


class DamagedWorldError(Exception):
    """The cache's way of saying that a world is damaged; it is then built anew."""


def _file(name: str, content: bytes) -> Callable[[Path], None]:
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


def readers() -> dict[str, Reader]:
    """By name. Those that take longest stand last."""
    labels = {"2": "agrees", "4": "pads"}
    config = b"output_dir: runs/audit\nloss_type: [sigmoid, hinge]\nbeta: 0.1\ntop: 10\n"
    label_rows = [{"index": 2, "description": "agrees"}, {"index": 4, "description": "pads"}]
    return {
        "flags": Reader(
            lambda directory: _flags().save(directory / "flags.yaml"), _in(FlagSet.load, "flags.yaml")
        ),
        "config": Reader(
            _file("config.yaml", config), lambda directory: check_config(str(directory / "config.yaml"))
        ),
        "outcomes": Reader(_write_outcomes, read_outcomes),
        "evidence": Reader(lambda directory: write_evidence(directory, _evidence()), _read_evidence),
        "labels.json": Reader(
            _file("labels.json", json.dumps(labels).encode()), _in(read_labels, "labels.json")
        ),
        "labels.jsonl": Reader(_file("labels.jsonl", _lines(label_rows)), _in(read_labels, "labels.jsonl")),
        "labels.csv": Reader(
            _file("labels.csv", b"feature,label\n2,agrees\n4,pads\n"), _in(read_labels, "labels.csv")
        ),
        "cached world": Reader(_write_world, _read_world, sealed=("*/model.bin", "*/report.json")),
        "penalties": Reader(_write_shaping, _read_shaping),
        "calibration": Reader(
            _write_calibration, lambda directory: read_calibration(_calibration(directory)), sealed=("*",)
        ),
        "totals": Reader(
            lambda directory: save_totals(directory / "totals.safetensors", _totals()),
            lambda directory: load_totals(directory / "totals.safetensors").state_dict(),
            sealed=("*",),
        ),
        "checkpoint": Reader(_write_checkpoint, _read_checkpoint, sealed=("totals*",)),
        "pairs.jsonl": Reader(_file("pairs.jsonl", _lines(_pairs())), _in(read_rows, "pairs.jsonl")),
        "pairs.jsonl.gz": Reader(
            _file("pairs.jsonl.gz", gzip.compress(_lines(_pairs()), mtime=0)),
            _in(read_rows, "pairs.jsonl.gz"),
        ),
        "conversations.jsonl": Reader(
            _file("conversations.jsonl", _lines(_conversations())), _in(read_rows, "conversations.jsonl")
        ),
        "pairs.parquet": Reader(_saved(_pairs(), "pairs.parquet"), _in(read_rows, "pairs.parquet"), cost=2),
        "conversations.parquet": Reader(
            _saved(_conversations(), "conversations.parquet"), _in(read_rows, "conversations.parquet"), cost=2
        ),
        "texts.jsonl": Reader(
            _file("texts.jsonl", _lines(_conversations())), _in(_read_texts, "texts.jsonl")
        ),
        "texts.txt": Reader(_file("texts.txt", b"one text\n\nanother\n"), _in(_read_texts, "texts.txt")),
        "texts.txt.gz": Reader(
            _file("texts.txt.gz", gzip.compress(b"one text\n\nanother\n", mtime=0)),
            _in(_read_texts, "texts.txt.gz"),
        ),
        "filtered": Reader(_write_filtered, read_filtered, cost=2),
        "verified": Reader(_write_verified, read_verified, cost=2),
        "saved dataset": Reader(_saved(_pairs(), "pairs"), _in(read_rows, "pairs"), cost=4),
        "run record": Reader(write_record, read_record, sealed=("*.parquet", "*.safetensors"), cost=8),
        "audit": Reader(write_audit, read_audit, sealed=("parts/*", "*.safetensors"), cost=8),
        "sae (topk)": Reader(lambda directory: _sae("topk").save_model(directory), _read_sae, cost=4),
        "sae (jumprelu)": Reader(lambda directory: _sae("jumprelu").save_model(directory), _read_sae, cost=4),
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
