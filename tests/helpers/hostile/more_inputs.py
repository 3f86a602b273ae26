"""Small valid inputs of the readers of contexts and words, sampled answers, drift, directions and foreign SAEs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file

from helpers.hostile.inputs import ROWS, STEPS, D, F, make_dictionary, make_totals, write_audit
from trl_sae_audit.audit.contexts import ACTIVITY, BINS, DATA, GENERATIONS, read_words, write_frame
from trl_sae_audit.audit.store import AuditStore
from trl_sae_audit.record.contexts import CONTEXTS, WORDS, words_table
from trl_sae_audit.record.writer import RecordWriter
from trl_sae_audit.saes.contrast import ContrastDictionary, Separation
from trl_sae_audit.saes.contrast_files import save_directions
from trl_sae_audit.statistics import Interval

N = 2 * F


def _texts() -> dict[str, list[str]]:
    return {"prompt": ["Is it so?"] * N, "before": ["you"] * N, "at": [" are"] * N, "after": [" right"] * N}


def _contexts(source: str) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "feature": np.repeat(np.arange(F), 2),
            "kind": ["strongest", "drawn"] * F,
            "source": [source] * N,
            "row": np.arange(N),
            "token": np.arange(N),
            "activation": np.linspace(2.0, 0.5, N),
            **_texts(),
        }
    )


def write_audit_with_contexts(directory: Path) -> None:
    """With contexts of data and generations, activity and words."""
    write_audit(directory)
    store, rng = AuditStore.open(directory), np.random.default_rng(5)
    write_frame(store, DATA, _contexts("chosen"))
    write_frame(store, GENERATIONS, _contexts("generation"))
    histogram = rng.integers(0, 9, (2, F, BINS)).astype(np.int32)
    store.write_arrays(
        ACTIVITY,
        {"density": rng.random(F), "largest": rng.random(F).astype(np.float32), "histogram": histogram},
        {"bins": BINS},
    )
    read_words(store)


def write_reward_audit(directory: Path) -> None:
    """With the answers that it was made on."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"Is {row} even?",
            "completion": "yes",
            "completion_ids": [row, 2],
            "reward": 1.0 * row,
            "advantage": 0.5 - row % 2,
            "group": row // 2,
        }
        for row in range(ROWS)
    ]
    write_audit(directory, rows)


def write_run_with_contexts(directory: Path) -> None:
    """With contexts, words, and drift in generations at two looks."""
    header = {
        "trainer": "DPOTrainer",
        "model": "tiny",
        "dictionaries": [asdict(make_dictionary().info)],
        "sides": ["chosen", "rejected"],
        "config": {"watch": {"tiny": {}}, "arguments": {}},
    }
    writer, rng = RecordWriter.create(directory, header), np.random.default_rng(6)
    rows: dict[str, Any] = {
        "step": [STEPS] * N,
        "dictionary": ["tiny"] * N,
        "feature": np.repeat(np.arange(F), 2),
        "source": ["chosen", "rejected"] * F,
        "activation": np.linspace(2.0, 0.5, N),
        **_texts(),
    }
    writer.append(CONTEXTS, rows)
    writer.append(WORDS, words_table(pd.DataFrame(rows), STEPS))
    features = {"step": [1] * F, "dictionary": ["tiny"] * F, "feature": range(F)}
    writer.append("generation_features", {**features, "mean": rng.random(F), "spread": rng.random(F)})
    for step in (1, STEPS):
        at = {"step": [step] * F, "global_step": [step] * F, "dictionary": ["tiny"] * F, "feature": range(F)}
        drift = rng.standard_normal(F).astype(np.float32)
        writer.append("generation_drift", {**at, "drift": drift, "low": drift - 1, "high": drift + 1})
        look = {"prompts": [4], "answers": [16], "effective_sample_size": [9.0], "covered_share": [0.9]}
        one = {"step": [step], "global_step": [step]}
        writer.append("generation_looks", {**one, **look, "trusted": [True], "divergence": [0.1]})
    writer.close("finished", STEPS, {"tiny": make_totals()})


def write_directions(directory: Path) -> None:
    matrix = torch.nn.functional.normalize(make_dictionary().directions[:2], dim=1)
    dictionary = ContrastDictionary(matrix, "model.layers.1", "traits", model_name="tiny")
    dictionary.separations = tuple(
        Separation(trait, "model.layers.1", 0.9, Interval(0.9, 0.8, 1.0), 2.0, 12)
        for trait in ("flattery", "hedging")
    )
    save_directions(dictionary, directory, {"traits": ["flattery", "hedging"]})


def _linear() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(7)
    return {
        "encoder.weight": torch.randn(F, D, generator=rng),
        "encoder.bias": torch.zeros(F),
        "b_dec": torch.zeros(D),
    }


def write_sparsify(directory: Path) -> None:
    folder = directory / "layers.1"
    folder.mkdir()
    save_file({**_linear(), "W_dec": torch.randn(F, D)}, folder / "sae.safetensors")
    config = {"k": 2, "d_in": D, "num_latents": F, "signed": False, "normalize_decoder": True}
    (folder / "cfg.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model": "tiny"}))


def write_dictionary_learning(directory: Path) -> None:
    state = {**_linear(), "decoder.weight": torch.randn(D, F), "threshold": torch.tensor(0.1)}
    save_file(state, directory / "ae.safetensors")
    trainer = {
        "dict_class": "BatchTopKSAE",
        "layer": 1,
        "lm_name": "tiny",
        "submodule_name": "resid_post",
        "k": 2,
    }
    (directory / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 16}}))


def write_llama_scope(directory: Path) -> None:
    (directory / "checkpoints").mkdir()
    state = _linear()
    state |= {"decoder.weight": torch.randn(D, F), "decoder.bias": state.pop("b_dec")}
    save_file(state, directory / "checkpoints" / "final.safetensors")
    config = {
        "d_model": D,
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "jump_relu_threshold": 0.5,
        "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
        "sparsity_include_decoder_norm": True,
    }
    (directory / "hyperparams.json").write_text(json.dumps(config))


def write_gemma_scope(directory: Path) -> None:
    folder = directory / "gemma-scope-2b-pt-res" / "layer_1"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(8)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    np.savez(
        folder / "params.npz",
        **{name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()},  # type: ignore[arg-type]
    )
