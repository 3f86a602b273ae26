"""A transcoder in real trainers: its scores equal a float64 reference at the MLP's output, its activations those at the MLP's input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.reference import Reference, StepRecorder, recorded, relative_error, row_gradients, to_double
from helpers.trainers import KINDS
from helpers.transcoders import make_transcoder, watched
from helpers.worlds import D_SAE, made, make_config, make_model
from sae_lens import SAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import Gemma2Config, Gemma2ForCausalLM, Trainer

from trl_sae_audit import FeatureAttributionCallback, FeatureDictionary, RunRecord, load_dictionary

pytestmark = pytest.mark.newest  # PPO's trainer runs the same hook

GAINLESS = "blocks.1.ln2.hook_normalized"
NO_STEP = {"learning_rate": 0.0, "max_steps": 1}


def gemma(tokenizer: Any, seed: int = 0) -> Gemma2ForCausalLM:
    return made(Gemma2ForCausalLM, make_config(tokenizer, Gemma2Config, head_dim=8), seed)


def build(kind: str, directory: Path, model: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Trainer:
    from dataclasses import replace

    return replace(KINDS[kind], model=model).build(directory, dtype, {**NO_STEP, **more})


def run(trainer: Trainer, directory: Path, dictionary: FeatureDictionary, **options: Any) -> pd.DataFrame:
    trainer.add_callback(
        FeatureAttributionCallback(
            dictionary, directory, top_k=D_SAE, selection_tokens=10**6, health_tokens=10**6, **options
        )
    )
    trainer.train()
    return RunRecord.load(directory).steps()


CASES = [
    ("DPO", make_model, "blocks.1.mlp.hook_in", "model.layers.1.mlp"),
    ("DPO", gemma, GAINLESS, "model.layers.1.post_feedforward_layernorm"),
    ("SFT", gemma, GAINLESS, "model.layers.1.post_feedforward_layernorm"),
    ("GRPO", make_model, "blocks.1.mlp.hook_in", "model.layers.1.mlp"),
]


@pytest.mark.parametrize("checkpointing", [False, True, "reentrant"])
@pytest.mark.parametrize(("kind", "model", "reads", "writes"), CASES)
def test_attribution_is_that_of_the_mlps_output(
    kind: str, model: Any, reads: str, writes: str, checkpointing: Any, tmp_path: Path
) -> None:
    how = {
        "gradient_checkpointing": bool(checkpointing),
        "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing == "reentrant"},
    }
    trainer = build(kind, tmp_path, model, **how)
    recorder = StepRecorder()
    recorder.watch(trainer)
    dictionary = load_dictionary(make_transcoder(reads=reads), transcoder=True)
    steps = run(trainer, tmp_path / "record", dictionary)
    double = build(kind, tmp_path, model, torch.float64, gradient_checkpointing=False)
    double.model.train()
    ((*microbatches,),) = recorder.steps
    double.current_gradient_accumulation_steps = len(microbatches)
    reference = Reference()
    for inputs, kwargs in microbatches:
        doubled = {key: to_double(value) for key, value in inputs.items()}
        scale = 1 if kind in ("SFT", "GRPO") else len(microbatches)
        loss = lambda doubled=doubled, kwargs=kwargs, scale=scale: (  # noqa: E731
            double.compute_loss(double.model, doubled, **kwargs) / scale
        )
        ids = doubled.get("prompt_ids", doubled.get("input_ids"))
        reference.rows.append(row_gradients(double.model, writes, len(ids), loss))
        reference.examples.append(reference.rows[-1])
    expected = reference.scores(dictionary)["attribution"]
    assert relative_error(recorded(steps, 1, "attribution"), expected) <= 1e-5


@pytest.mark.parametrize("kind", ["DPO", "GRPO"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all trained", "trained from layer 2 on"])
def test_what_an_sae_at_either_place_says(kind: str, frozen: bool, tmp_path: Path) -> None:
    """The features' activations, selection and rows: as an SAE with the same encoder at the MLP's input has them."""
    transcoder = make_transcoder()
    metadata = SAEMetadata(hook_name="model.layers.1.post_attention_layernorm")
    settings = {"d_in": transcoder.cfg.d_in, "d_sae": transcoder.cfg.d_sae, "apply_b_dec_to_input": False}
    sae = SAE.from_dict(JumpReLUSAEConfig(**settings, metadata=metadata).to_dict())
    sae.load_state_dict(transcoder.state_dict())
    there = load_dictionary(sae, name="sae")
    raw = FeatureDictionary(transcoder.W_dec, "model.layers.1.mlp", "raw")
    ours = load_dictionary(transcoder, transcoder=True)
    found = {}
    for dictionary in (ours, there, raw):
        trainer = build(kind, tmp_path, make_model)
        if frozen:
            trainer.model.model.embed_tokens.requires_grad_(False)
            for layer in trainer.model.model.layers[:2]:
                layer.requires_grad_(False)
        found[dictionary.name] = run(trainer, tmp_path / dictionary.name, dictionary)
    name = ours.name
    for column in ("selection", "selection_standard_error", "response_activation", "response_frequency"):
        assert recorded(found[name], 1, column).any()
        np.testing.assert_array_equal(recorded(found[name], 1, column), recorded(found["sae"], 1, column))
    for column in ("attribution", "positive", "standard_error", "cosine"):
        if kind == "GRPO" and column == "positive":
            continue
        np.testing.assert_allclose(
            recorded(found[name], 1, column), recorded(found["raw"], 1, column), rtol=1e-5, atol=1e-9
        )


def test_token_scores_and_fit(tmp_path: Path) -> None:
    """Activation attribution and fit of one full batch, written out from hooks of the test's own."""
    trainer = build("DPO", tmp_path, gemma, gradient_accumulation_steps=1, gradient_checkpointing=False)
    recorder = StepRecorder()
    recorder.watch(trainer)
    transcoder = make_transcoder("jumprelu_skip_transcoder", GAINLESS)
    dictionary = load_dictionary(transcoder, transcoder=True)
    run(trainer, tmp_path / "record", dictionary, token_scores=True)
    record = RunRecord.load(tmp_path / "record")
    (((inputs, kwargs),),) = recorder.steps
    double = build("DPO", tmp_path, gemma, torch.float64, gradient_checkpointing=False)
    double.model.train()
    layer = "model.layers.1"
    with watched(
        double.model, f"{layer}.pre_feedforward_layernorm", f"{layer}.post_feedforward_layernorm"
    ) as seen:
        double.compute_loss(
            double.model, {key: to_double(value) for key, value in inputs.items()}, **kwargs
        ).backward()
    before = seen["read"]
    read = before * (before.square().mean(-1, keepdim=True) + double.model.config.rms_norm_eps).rsqrt()
    acts = transcoder.encode(read.float()).detach().double()
    gradient = seen["written"].grad
    counted = torch.zeros_like(inputs["completion_mask"], dtype=torch.bool)
    counted[:, :-1] = inputs["completion_mask"][:, 1:].bool()
    effect = -(acts * (gradient @ transcoder.W_dec.detach().double().T))[counted].sum(0)
    table = record.features().set_index("feature").sort_index()
    assert relative_error(table["activation_attribution"].to_numpy(), effect.numpy()) <= 1e-5

    written = seen["written"].detach()
    reconstructed = transcoder(read.float()).detach().double()
    reached = (gradient != 0).any(-1)
    reached[:, 1:] &= reached[:, :-1].clone()
    reached[:, 0] = False
    lost = (written - reconstructed)[reached].square().sum()
    spread = (written[reached] - written[reached].mean(0)).square().sum()
    (fit,) = record.table("health").to_dict("records")
    assert fit["tokens"] == int(reached.sum())
    assert fit["fvu"] == pytest.approx(float(lost / spread), rel=1e-4)
    assert fit["l0"] == pytest.approx(float((acts[reached] > 0).sum(-1).double().mean()), rel=1e-5)


def test_the_record_says_what_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dictionary = load_dictionary(make_transcoder(), transcoder=True)
    run(build("DPO", tmp_path, make_model), tmp_path / "record", dictionary)
    record = RunRecord.load(tmp_path / "record")
    assert record.dictionaries[0]["reads"] == "blocks.1.mlp.hook_in"
    sentence = "blocks.1.hook_mlp_out (a transcoder: reads blocks.1.mlp.hook_in, writes there; scores are about what this MLP adds)"
    assert sentence in str(record)
    assert (
        "is a transcoder: its encoder reads blocks.1.mlp.hook_in, its decoder writes blocks.1.hook_mlp_out"
        in caplog.text
    )
