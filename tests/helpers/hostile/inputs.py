"""Small valid inputs of the readers, made by the package's own writers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.audit.answers_file import answers_digest, keep_answers
from trl_sae_audit.audit.evidence_files import Context, Evidence
from trl_sae_audit.audit.gradients import PROMPT_TAIL, ExampleArrays
from trl_sae_audit.audit.prompt_states import state_size
from trl_sae_audit.audit.result import Audit
from trl_sae_audit.audit.store import AuditStore, Part
from trl_sae_audit.flags import Flag, FlagSet
from trl_sae_audit.io.manifest import StoredFile, write_manifest
from trl_sae_audit.record.writer import RecordWriter
from trl_sae_audit.saes.dictionary import FeatureDictionary
from trl_sae_audit.shaping.adaptive import AdaptivePenalty
from trl_sae_audit.shaping.penalties import FixedPenalty, Penalty

F, D, STEPS, ROWS = 6, 4, 9, 8


def make_dictionary() -> FeatureDictionary:
    directions = torch.from_numpy(np.random.default_rng(0).standard_normal((F, D)).astype(np.float32))
    return FeatureDictionary(directions, "model.layers.1", "tiny")


def make_totals() -> FeatureTotals:
    totals, rng = FeatureTotals(F, 4), np.random.default_rng(1)
    for _ in range(STEPS):
        values = rng.standard_normal((1, F)).astype(np.float32)
        totals.update(values, values, 0 * values, np.abs(values), np.abs(values) / 10)
    return totals


def write_record(directory: Path) -> None:
    header = {
        "trainer": "DPOTrainer",
        "model": "tiny",
        "dictionaries": [{**asdict(make_dictionary().info), "neuronpedia_id": "gemma/1"}],
        "sides": ["chosen", "rejected"],
        "config": {
            "watch": {"tiny": {"sycophancy": 2}},
            "arguments": {"learning_rate": 1e-5, "loss_type": ["sigmoid"], "beta": 0.1},
        },
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
        columns = ("attribution", "share", "positive", "negative", "standard_error")
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
    writer.close("finished", STEPS, {"tiny": make_totals()})


def write_audit(directory: Path, answers: list[dict[str, Any]] | None = None) -> None:
    """Args: answers: that it was made on, for an audit of a reward."""
    own, rng = make_dictionary(), np.random.default_rng(3)
    header = {
        "loss": {
            "objective": "dpo",
            "beta": 0.1,
            "loss_type": ["sigmoid"],
            "sides": ["chosen", "rejected"],
            **({} if answers is None else {"answers_sha256": answers_digest(answers)}),
        },
        "dictionary": asdict(own.info),
        "model": "tiny",
        "settings": {"part_size": ROWS // 2, "activations": True, "on_bad_row": "set_aside", "seed": 0},
        "versions": {"torch": "2"},
    }
    store = AuditStore.create(directory, header, own, {})
    for number in range(2):
        n = ROWS // 2 - number  # the last row is set aside
        rows = np.arange(n) + number * (ROWS // 2)
        active = rng.integers(0, F, 2 * n * 2).astype(np.int32)
        arrays = ExampleArrays(
            gradient=rng.standard_normal((n, 2, D)).astype(np.float32),
            side=np.tile(np.array([1, -1], np.int8), (n, 1)),
            length=rng.integers(1, 9, (n, 2)).astype(np.int32),
            log_prob=rng.standard_normal((n, 2)).astype(np.float32),
            weight=rng.standard_normal((n, 2)).astype(np.float32),
            residual=rng.standard_normal((n, 2, D)).astype(np.float32),
            indptr=np.arange(0, 4 * n + 1, 2),
            feature=active,
            mean=rng.random(4 * n).astype(np.float32),
            max_activation=rng.random(4 * n).astype(np.float32),
            activation_attribution=rng.standard_normal(4 * n).astype(np.float32),
            selected=rng.standard_normal(4 * n).astype(np.float32),
            peak=rng.integers(0, 3, 4 * n).astype(np.int32),
            active_tokens=rng.integers(1, 3, 4 * n).astype(np.int32),
            token_indptr=np.arange(0, 6 * n + 1, 3),
            token=rng.integers(0, 60, 6 * n).astype(np.int32),
            prompt_tail=rng.integers(-1, 60, (n, 2, PROMPT_TAIL)).astype(np.int32),
            prompt_state=rng.normal(size=(n, state_size(D))).astype(np.float32),
        )
        aside = [(ROWS - 1, "has an empty 'chosen'")] if number else []
        digest = rng.integers(0, 256, (ROWS // 2, 32)).astype(np.uint8)
        store.write_part(number, Part(rows, digest, aside, arrays, {"truncated": 0, "identical": 0}))
    store.finish(2, 1)
    store.write_arrays("lookahead.safetensors", {"predicted_change": rng.standard_normal(F)}, {"steps": 1})
    store.write_arrays("influence.safetensors", {"2": rng.standard_normal(ROWS - 1)}, {})
    if answers is not None:
        keep_answers(store, answers)
    Audit.load(directory).features()


def make_evidence() -> list[Evidence]:
    context = Context("strongest", "chosen", 3, 0.5, "Is it so?", "you", " are", " right")
    return [
        Evidence("tiny", 2, "agrees", 0.5, 0.01, ["yes"], ["no"], [context], "https://x/2", {"lift": 2.0})
    ]


def make_flags() -> FlagSet:
    return FlagSet([Flag("tiny", 2, "sycophancy", "agrees", identity="0" * 64), Flag("tiny", 4, weight=0.5)])


def make_sae(kind: str) -> Any:
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post", neuronpedia_id="a/b")
    torch.manual_seed(0)
    if kind == "topk":
        return TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=2, metadata=metadata))
    return JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F, metadata=metadata))


def make_penalties() -> list[Penalty]:
    fixed, adaptive = FixedPenalty(0.5, warmup=2, clip=1.0), AdaptivePenalty()
    for penalty in (fixed, adaptive):
        penalty.bind(list(make_flags()))
        for seed in range(3):
            torch.manual_seed(seed)
            penalty.begin_batch()
            penalty.end_batch(torch.randn(16, 2), torch.randn(16))
    return [fixed, adaptive]


def pair_rows() -> list[dict[str, Any]]:
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


def conversation_rows() -> list[dict[str, Any]]:
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


def json_lines(rows: Sequence[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_filtered(directory: Path) -> None:
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
        "repeated": 0,
        "set_aside": 0,
        "flags": [flag],
    }
    config = {"strategy": "drop", "score": "attribution", "budget": 2, "threshold": None, "quantile": None}
    decisions = {
        "row": range(8),
        "action": ["drop"] * 2 + ["keep"] * 6,
        "score": np.arange(8.0),
        "weight": np.ones(8),
    }
    frame = pd.DataFrame({**decisions, "reason": ["score"] * 8})
    frame.to_parquet(directory / "decisions.parquet", index=False, write_page_checksum=True)
    dropped = [
        {**row, "audit_row": row["id"], "audit_score": 1.0, "audit_reason": "score"}
        for row in pair_rows()[:2]
    ]
    (directory / "dropped.jsonl").write_bytes(json_lines(dropped))
    stored = [StoredFile.on_disk(directory, name) for name in ("decisions.parquet", "dropped.jsonl")]
    write_manifest(directory, "filtered", {"config": config, "summary": summary}, stored)


def write_verified(directory: Path) -> None:
    figures = {
        "r2": [0.5, 0.4, 0.6],
        "spearman": [0.5, 0.4, 0.6],
        "precision": [0.5, 0.4, 0.6],
        "slope": [1, None, None],
    }
    found = {"kind": "in generations", "prompts": 5, "features": F, "top_k": 2, "ceiling": 0.9}
    scores = {"attribution": figures, "random": figures}
    numbers = np.random.default_rng(4).standard_normal((3, F))
    columns = dict(zip(("measured", "attribution", "random"), numbers, strict=True))
    frame = pd.DataFrame(
        {"feature": range(F), "before": np.ones(F), **columns, "target": ["in generations"] * F}
    )
    frame.to_parquet(directory / "verify.parquet", index=False, write_page_checksum=True)
    body = {"config": {"source": "runs/audit"}, "targets": {"in generations": {**found, "scores": scores}}}
    write_manifest(directory, "verification", body, [StoredFile.on_disk(directory, "verify.parquet")])
