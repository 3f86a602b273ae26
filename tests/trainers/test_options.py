"""Options, models, adapters and users' own trainers that change the path of a step: exact, or refused with a sentence.

`scripts/sweep_options.py` runs all of tests/helpers/option_cases.py; here are those that take another path through the code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers import vision
from helpers.option_cases import CASES
from helpers.options import outcome
from helpers.trainers import dpo
from helpers.worlds import make_dictionary

from trl_sae_audit import FeatureAttributionCallback, RunRecord
from trl_sae_audit.models.hook_points import resolve_hook_point

pytestmark = pytest.mark.newest

BY_NAME = {case.name: case for case in CASES}
CHOSEN = [
    "DPO: sync_ref_model",
    "KTO: precompute_ref_log_probs",
    "Reward: center_rewards_coefficient",
    "SFT: padding_free",
    "SFT: packing, bfd",
    "SFT: label_smoothing_factor",
    "SFT: compute_loss_func",
    "SFT: neftune_noise_alpha",
    "GRPO: num_iterations=2, importance_sampling_level=sequence",
    "GRPO: beta > 0, sync_ref_model",
    "GRPO: steps_per_generation=4",
    "DPO: Mixtral, router_aux_loss_coef",
    "DPO: vision–language model (LLaVA), pictures",
    "DPO: prompt tuning",
    "SFT: a second forward of the batch in the loss, use_reentrant",
    "DPO: a second forward of the batch in the loss",
    "KTO: forwards beside the loss",
    "KTO: other texts beside the batch",
    "DPO: other texts beside the batch",
    "DPO: a forward for the chosen, one for the rejected, use_reentrant",
    "DPO: preferences turned round",
    "DPO: a second backward in training_step",
    "DPO: _prepare_inputs leaves rows out",
    "GRPO: advantages for every token",
    "DPO: a layer that returns a tuple",
    "ORPO: both answers in one batch",
    "Trainer: transformers' training loop, no sides",
    *(case.name for case in CASES if case.refused),
]


@pytest.mark.parametrize("name", CHOSEN)
def test_exact_or_refused(name: str, tmp_path: Path) -> None:
    good, said = outcome(BY_NAME[name], tmp_path)
    assert good, said


def test_names_of_cases_are_distinct() -> None:
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("steps_before", [0, 2])
def test_out_of_memory_with_auto_find_batch_size(steps_before: int, tmp_path: Path) -> None:
    """The run starts again with half the batch; what was done before is kept in a record of its own."""
    trainer = dpo(tmp_path, gradient_accumulation_steps=1, auto_find_batch_size=True)
    original, calls = trainer.compute_loss, []

    def short_of_memory(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(*args, **kwargs)
        if len(calls) == steps_before + 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 GiB")
        return loss

    trainer.compute_loss = short_of_memory
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    trainer.train()
    directory = tmp_path / ("record-2" if steps_before else "record")
    record = RunRecord.load(directory)
    examples = record.table("gradient")["examples"].tolist()
    assert (record.status, len(examples)) == ("finished", 3)
    assert len(set(examples)) == 1
    assert examples[0] < 4
    if steps_before:
        first = RunRecord.load(tmp_path / "record")
        assert (first.status, first.table("gradient")["examples"].tolist()) == ("failed", [4, 4])


def test_the_layers_of_a_vision_language_model_are_those_of_its_language_model() -> None:
    model = vision.make_llava()
    for name in ("blocks.1.hook_resid_post", vision.VISION_HOOK_POINT):
        assert resolve_hook_point(model, name).path == "model.language_model.layers.1"
