"""What DPO runs in a world of the lab change: measured once, and kept on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RAW
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback

from trl_sae_audit import FeatureDictionary, load_dictionary
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.pretraining import plain_texts
from trl_sae_audit.lab.sparse_coding import hook_point, token_activations, train_dictionary
from trl_sae_audit.lab.training import dpo_arguments, train_dpo
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.measured import (
    AnswerActivations,
    MeasuredChange,
    answer_activations,
    sampled_activations,
)

STEPS = 40
HELD_OUT_PAIRS, HELD_OUT_PROMPTS = 250, 500
SAMPLING = Sampling(answers=4, max_new_tokens=56, seed=2)
GIVEN_TEXT, GENERATIONS = "on given text", "in generations"
AS_IT_IS, LORA = "as it is", "LoRA of rank 8"
FINELY, GENTLY = f"{LORA}, unrolled in {STEPS // 2} segments", f"{LORA}, a third of the learning rate"
LAYERS = {"dictionary at layer 0": 0, "dictionary at layer 2": 2}
"""Variants tried in some worlds. The world's own dictionary reads the middle one of the three layers."""
LORA_LEARNING_RATE = 3e-3
BATCH = 64


def agreement(changes: Sequence[MeasuredChange]) -> float:
    """The mean correlation of the changes that different runs make, over the features.

    If a run's change is what all runs have in common plus what is its own, this is the part of its variance that is
    common: the R² of the common part with the change in one run. Of the mean of n runs it is, by Spearman and Brown, n·r / (1 + (n − 1)·r).
    """
    counted = np.any([change.active for change in changes], axis=0)
    table = np.corrcoef([change.change[counted] for change in changes])
    return float(table[np.triu_indices(len(changes), 1)].mean())


def mean_change(changes: Sequence[MeasuredChange]) -> MeasuredChange:
    """The change of the runs taken together: all that they write, or read, after training."""
    after = [change.after for change in changes]
    return MeasuredChange(
        changes[0].kind,
        changes[0].before,
        AnswerActivations(
            np.sum([each.sums for each in after], axis=0),
            np.sum([each.tokens for each in after], axis=0),
            after[0].prompts,
            np.any([each.active for each in after], axis=0),
        ),
    )


@lru_cache(maxsize=1)
def meter_of(seed: int, variant: str) -> Meter:
    return Meter(build_world(seed, progress=False), variant)


def dictionary_at(world: World, layer: int) -> FeatureDictionary:
    """A dictionary like the world's own, of another layer; trained once."""
    directory = RAW / "dictionaries" / f"{world.config.seed}-{layer}"
    if not directory.exists():
        config = replace(world.config.dictionary, layer=layer)
        texts = plain_texts(world.language, config.texts, world.config.seed + 1)
        activations, _ = token_activations(world.model(), world.tokenizer, hook_point(layer), *texts)
        train_dictionary(config, activations, world.config.seed, directory)
    return load_dictionary(directory)


class Meter:
    """Measures what runs in a world change; what the model before does is measured once."""

    def __init__(self, world: World, variant: str = AS_IT_IS) -> None:
        self.world = world
        self.suffix = "" if variant == AS_IT_IS else "-" + variant.replace(",", "").replace(" ", "-")
        self.lora = variant.startswith(LORA)
        rate = LORA_LEARNING_RATE / (3 if variant == GENTLY else 1)
        self.arguments = {"learning_rate": rate} if self.lora else {}
        self.segments = STEPS // 2 if variant == FINELY else None
        self.dictionary = (
            dictionary_at(world, LAYERS[variant])
            if variant in LAYERS
            else load_dictionary(world.dictionary_path)
        )
        self.before = world.model()
        seed = world.config.seed
        self.pairs = world.preferences({}, HELD_OUT_PAIRS, 300 + seed, split="heldout")
        self.prompts = world.prompts(HELD_OUT_PROMPTS, 400 + seed, split="heldout")
        self.given_text_before = self._on_given_text(self.before)
        self.generations_before = self._in_generations(self.before)

    def model(self) -> Any:
        """What a run trains: the world's model, or a new adapter on it."""
        if not self.lora:
            return self.world.model()
        torch.manual_seed(self.world.config.seed)
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.world.model(), adapter)

    def changes(
        self, pairs: Any, name: str, lengths: list[int], order: int
    ) -> dict[int, list[MeasuredChange]]:
        """One run as long as the longest of `lengths`, looked at after each: on given text and in generations.

        What a run does is kept in `runs/studies/changes`; asked for again, it costs nothing.
        """
        start = f"{name}-{self.world.config.seed}-{order}"
        places = {steps: RAW / "changes" / f"{start}-{steps}.safetensors" for steps in lengths}
        if not all(place.exists() for place in places.values()):
            kept = _Snapshots(lengths)
            with tempfile.TemporaryDirectory() as scratch:
                args = dpo_arguments(scratch, max(lengths), order, **self.arguments)
                train_dpo(self.world, pairs, args, callbacks=[kept], model=self.model())
            for steps, place in places.items():
                after = self.model()
                # of LoRA the trainer keeps a second adapter, its reference
                after.load_state_dict({key: kept.states[steps][key] for key in after.state_dict()})
                after.eval()
                keep(
                    place, {GIVEN_TEXT: self._on_given_text(after), GENERATIONS: self._in_generations(after)}
                )
        before = {GIVEN_TEXT: self.given_text_before, GENERATIONS: self.generations_before}
        return {
            steps: [
                MeasuredChange(kind, before[kind], after) for kind, after in kept_at(place, before).items()
            ]
            for steps, place in places.items()
        }

    def _on_given_text(self, model: Any) -> AnswerActivations:
        return answer_activations(model, self.world.tokenizer, self.dictionary, self.pairs, batch_size=BATCH)

    def _in_generations(self, model: Any) -> AnswerActivations:
        return sampled_activations(
            model,
            self.before,
            self.world.tokenizer,
            self.dictionary,
            self.prompts,
            sampling=SAMPLING,
            batch_size=250,
        )


def keep(place: Path, found: dict[str, AnswerActivations]) -> None:
    """Write activations, by name, to a file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    parts = ("sums", "tokens", "active")
    save_file(
        {f"{kind} {part}": getattr(each, part) for kind, each in found.items() for part in parts}, place
    )


def kept_at(place: Path, before: dict[str, AnswerActivations]) -> dict[str, AnswerActivations]:
    """What `keep` wrote there; of the same prompts as `before`."""
    arrays = load_file(place)
    return {
        kind: AnswerActivations(
            arrays[f"{kind} sums"], arrays[f"{kind} tokens"], each.prompts, arrays[f"{kind} active"]
        )
        for kind, each in before.items()
    }


class _Snapshots(TrainerCallback):
    """Keeps the weights after some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.states[state.global_step] = {
                name: value.detach().clone() for name, value in model.state_dict().items()
            }
