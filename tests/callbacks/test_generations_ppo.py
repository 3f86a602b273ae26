"""The drift in generations in PPO, which makes several optimizer steps between two ends of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.ppo import ppo
from helpers.worlds import make_dictionary
from transformers import Trainer, TrainerCallback

from trl_sae_audit import FeatureAttributionCallback, RunRecord, Sampling
from trl_sae_audit.callbacks.generation_prompts import prompts_for

pytestmark = pytest.mark.ppo

SHORT = Sampling(answers=2, max_new_tokens=5)


def trained(directory: Path, *callbacks: TrainerCallback) -> Trainer:
    trainer = ppo(directory)
    for callback in callbacks:
        trainer.add_callback(callback)
    np.random.seed(0)  # PPO shuffles with numpy's global generator, which it does not seed
    trainer.train()
    return trainer


def test_ppo_is_looked_at_and_its_weights_are_bit_identical(tmp_path: Path) -> None:
    callback = FeatureAttributionCallback(
        make_dictionary(), tmp_path / "record", generations=SHORT, generation_steps=2
    )
    plain, watched = trained(tmp_path / "plain"), trained(tmp_path / "watched", callback)
    state = watched.model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.model.state_dict().items())
    record = RunRecord.load(tmp_path / "record")
    looks = record.table("generation_looks")
    assert looks[["step", "global_step"]].to_numpy().tolist() == [[2, 1], [4, 2], [6, 3], [8, 4]]
    assert (record.drift().abs().max(axis=1) > 0).all()


def test_prompts_are_the_queries(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)
    queries = {tuple(row["input_ids"]) for row in trainer.train_dataset}
    assert set(prompts_for(trainer, None, SHORT)) == queries
