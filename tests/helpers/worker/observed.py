"""One training with the callback, and what was seen of it on this process."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
from helpers.reference import StepRecorder
from helpers.worker.collectives import OwnCollectives
from helpers.worlds import D_SAE, make_dictionary, make_sae_dictionary, make_tokenizer
from torch.distributed.tensor import DTensor

from trl_sae_audit import AuditError, FeatureAttributionCallback, FeatureScorer
from trl_sae_audit.record.writer import RecordWriter


def run(
    trainer: Any,
    directory: Path,
    *,
    dictionaries: tuple[Any, ...] = (),
    recorder: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with the callback, and say what was seen on this process."""
    callback = FeatureAttributionCallback(
        dictionaries or make_dictionary(),
        directory / "record",
        watch={"one": ("tiny", 1), "last": ("tiny", D_SAE - 1)},
        top_k=D_SAE,
        **{"examples": True, "selection_tokens": 10**6, **options},
    )
    trainer.add_callback(callback)
    with OwnCollectives() as own:
        trainer.train()
    accelerator = trainer.accelerator
    return {
        "steps": [] if recorder is None else recorder.steps,
        "world_size": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "collectives": own.calls,
        "weights": weights(trainer.model),
        "writes": any(type(thing) is RecordWriter for thing in gc.get_objects()),
        "refusal": refusal(trainer.model),
    }


def run_all(trainer: Any, directory: Path) -> dict[str, Any]:
    """With all that the callback can do: two dictionaries, token scores, examples and, where there may be one, a probe."""
    other = make_sae_dictionary(seed=4, hook_point="model.layers.0", name="lower")
    probe = {"probe": ["w1 w2 w3", "w4 w5"], "probe_steps": 2}
    return run(
        trainer,
        directory,
        dictionaries=(make_dictionary(), other),
        token_scores=True,
        **({} if "zero3" in directory.parent.name else probe),
    )


def refusal(model: Any) -> str | None:
    """What one is told who reads the model outside its training; None where that can be done."""
    try:
        FeatureScorer(model, make_tokenizer(), make_dictionary())
    except AuditError as error:
        return str(error)
    return None


def weights(model: Any) -> list[torch.Tensor]:
    """Of the whole model where it is FSDP's, of this process's part where it is ZeRO-3's."""
    whole = [
        parameter.full_tensor()
        if isinstance(parameter, DTensor)
        else vars(parameter).get("ds_tensor", parameter)
        for parameter in model.parameters()
    ]
    return [parameter.detach().clone() for parameter in whole]


def recorded(trainer: Any) -> StepRecorder:
    recorder = StepRecorder()
    recorder.watch(trainer)
    return recorder
