"""What the callback logs, records, and takes up again after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.reference import StepRecorder, dpo_loss, recorded, relative_error, sequence_logps
from helpers.trainers import dpo, grpo, sft
from helpers.worlds import D_MODEL, D_SAE, HOOK_POINT, make_dictionary, make_model, make_tokenizer
from sae_lens import TopKSAE, TopKSAEConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import IntervalStrategy

from trl_sae_audit import FeatureAttributionCallback, RunRecord, load_dictionary
from trl_sae_audit.callbacks.probe import Probe
from trl_sae_audit.models.hook_points import resolve_hook_point

pytestmark = pytest.mark.newest


def topk_dictionary(name: str = "topk") -> Any:
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=8))
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    return load_dictionary(sae, hook_point=HOOK_POINT, name=name)


def test_metrics_are_in_the_trainers_log_and_its_reporters(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, report_to=["tensorboard"], save_strategy="steps", save_steps=3)
    trainer.eval_dataset = trainer.train_dataset.select(range(4))
    trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 1
    trainer.state.eval_steps = 1
    trainer.add_callback(
        FeatureAttributionCallback(
            topk_dictionary(), tmp_path / "record", watch={"one": 1}, probe=["w1 w2 w3"], probe_steps=1
        )
    )
    trainer.train()
    expected = {
        *(f"sae/one/{name}" for name in ("attribution", "share", "chosen", "rejected", "drift")),
        *(f"sae/top{rank}/{name}" for rank in (1, 2, 3) for name in ("feature", "attribution")),
        *("sae/grad_norm", "sae/coverage", "sae/fvu", "sae/token_fvu", "sae/l0"),
    }
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert expected <= logged[0].keys()
    assert not any("sae/grad_norm" in entry for entry in trainer.state.log_history if "eval_loss" in entry)
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert expected <= saved["log_history"][[("loss" in e) for e in saved["log_history"]].index(True)].keys()

    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    board = EventAccumulator(str(events.parent))
    board.Reload()
    shown = set(board.Tags()["scalars"])
    assert {f"train/{name}" for name in expected} <= shown

    steps = RunRecord.load(tmp_path / "record").steps()
    one = steps[steps["label"] == "one"].set_index("step")
    assert logged[0]["sae/one/attribution"] == pytest.approx(one.loc[[1, 2], "attribution"].mean(), rel=1e-5)
    norms = RunRecord.load(tmp_path / "record").table("gradient")["norm"]
    assert logged[0]["sae/grad_norm"] == pytest.approx(norms[:2].mean(), rel=1e-5)


def test_totals_are_the_sum_of_the_steps(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=7, logging_steps=3)
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record", top_k=D_SAE))
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    steps = record.steps()
    assert sorted(steps["step"].unique()) == [1, 2, 3, 4, 5, 6, 7]
    by_feature = steps.groupby("feature")
    features = record.features().set_index("feature").sort_index()
    for column in ("attribution", "chosen", "rejected"):
        np.testing.assert_allclose(features[column], by_feature[column].sum(), rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(features["share"], by_feature["share"].mean(), rtol=1e-5)
    variance = (steps["standard_error"] ** 2).groupby(steps["feature"]).sum()
    np.testing.assert_allclose(features["standard_error"], np.sqrt(variance), rtol=1e-5)
    np.testing.assert_allclose(features["lift"], features["share"] * D_MODEL, rtol=1e-6)
    curriculum = record.curriculum()
    np.testing.assert_allclose(curriculum.sum(0), features["attribution"], rtol=1e-4, atol=1e-7)


def test_a_resumed_run_has_the_same_totals_as_one_never_stopped(tmp_path: Path) -> None:
    def run(directory: Path, resume: bool = False, **overrides: Any) -> RunRecord:
        trainer = dpo(
            directory,
            save_strategy="steps",
            save_steps=2,
            logging_steps=1,
            lr_scheduler_type="constant",
            **overrides,
        )
        trainer.add_callback(
            FeatureAttributionCallback(
                topk_dictionary(),
                directory / "record",
                watch={f"feature {i}": i for i in range(24)},
                probe=["w1 w2 w3 w4 w5"],
                probe_steps=1,
                selection_tokens=16,
            )
        )
        trainer.train(resume_from_checkpoint=str(directory / "out" / "checkpoint-4") if resume else None)
        return RunRecord.load(directory / "record")

    whole = run(tmp_path / "whole", max_steps=8)
    run(tmp_path / "parts", max_steps=5)  # ends one step beyond the checkpoint it is resumed from
    parts = run(tmp_path / "parts", max_steps=8, resume=True)
    for name, values in whole.totals().state_dict().items():
        assert np.array_equal(values, parts.totals().state_dict()[name]), name
    assert whole.totals().scores["selection"].sums["score"].any()
    assert whole.table("drift")["drift"].abs().max() > 0
    for table in ("steps", "gradient", "drift", "health"):
        pd.testing.assert_frame_equal(whole.table(table), parts.table(table))
    assert parts.manifest["resumed"][0]["step"] == 4


def test_resuming_without_the_callbacks_state_is_refused_or_begins_there(tmp_path: Path) -> None:
    plain = dpo(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    plain.train()
    late = dpo(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    late.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    late.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    record = RunRecord.load(tmp_path / "record")
    assert record.steps()["global_step"].unique().tolist() == [3, 4]


def test_several_dictionaries_in_one_run(tmp_path: Path) -> None:
    below, above = make_dictionary(name="below"), make_dictionary(3, "blocks.2.hook_resid_post", "above")
    trainer = grpo(tmp_path)
    trainer.add_callback(
        FeatureAttributionCallback(
            [below, above], tmp_path / "record", watch={"one": ("below", 1), "two": ("above", 2)}
        )
    )
    trainer.train()
    record = RunRecord.load(tmp_path / "record")
    assert set(record.steps()["dictionary"]) == {"below", "above"}
    assert set(record.steps("above")["label"]) == {"", "two"}
    assert len(record.features("below")) == D_SAE
    logged = trainer.state.log_history[0]
    assert "sae/below/one/attribution" in logged
    assert "sae/above/two/reinforced" in logged


def test_token_scores_equal_brute_force(tmp_path: Path) -> None:
    """Over loss positions only, token by token, with the SAE's own activations and unnormalised decoder."""
    trainer = dpo(tmp_path, learning_rate=0.0, gradient_checkpointing=True)
    recorder = StepRecorder()
    recorder.watch(trainer)
    dictionary = topk_dictionary()
    trainer.add_callback(
        FeatureAttributionCallback(
            dictionary, tmp_path / "record", top_k=D_SAE, token_scores=True, selection_tokens=10**6
        )
    )
    trainer.train()
    steps = RunRecord.load(tmp_path / "record").steps()
    tokenizer = make_tokenizer()
    policy, reference_model = make_model(tokenizer).double(), make_model(tokenizer, seed=5).double()
    sae = dictionary.encoder.sae
    for step, microbatches in enumerate(recorder.steps, start=1):
        squares, norm, effect = torch.zeros(D_SAE).double(), 0.0, torch.zeros(D_SAE).double()
        for inputs, _ in microbatches:
            with torch.no_grad():
                logps = sequence_logps(reference_model, inputs)
            kept = []
            handle = policy.model.layers[1].register_forward_hook(
                lambda module, args, output, kept=kept: kept.append(output)
            )
            loss = dpo_loss(policy, logps, inputs, 0.1) / len(microbatches)
            handle.remove()
            (gradient,) = torch.autograd.grad(loss, kept[0])
            positions = inputs["completion_mask"][:, 1:].bool()
            g, h = gradient[:, :-1][positions], kept[0][:, :-1][positions].detach()
            projected = g @ dictionary.directions.double().T
            squares += projected.square().sum(0)
            norm += float(g.square().sum())
            activations = dictionary.encode(h).double()
            effect -= (activations * (g @ sae.W_dec.detach().double().T)).sum(0)
        assert relative_error(recorded(steps, step, "token_share"), (squares / norm).numpy()) <= 1e-5
        assert relative_error(recorded(steps, step, "activation_attribution"), effect.numpy()) <= 1e-4


def test_drift_is_the_change_of_mean_activation(tmp_path: Path) -> None:
    probe = ["w1 w2 w3 w4", "w5 w6"]
    trainer = sft(tmp_path, max_steps=4)
    dictionary = topk_dictionary()
    trainer.add_callback(
        FeatureAttributionCallback(
            dictionary, tmp_path / "record", watch={"one": 1, "two": 2}, probe=probe, probe_steps=2
        )
    )
    trainer.train()

    def mean_activation(model: Any) -> torch.Tensor:
        model.eval()
        tokens = []
        for text in probe:
            batch = make_tokenizer()(text, return_tensors="pt")
            hidden = model(**batch, output_hidden_states=True).hidden_states[2][0, 1:]
            tokens.append(dictionary.encode(hidden))
        return torch.cat(tokens)[:, [1, 2]].mean(0)

    with torch.no_grad():
        before = mean_activation(sft(tmp_path / "again").model)
        after = mean_activation(trainer.model)
    drift = RunRecord.load(tmp_path / "record").table("drift")
    assert drift["step"].tolist() == [0, 0, 2, 2, 4, 4]
    np.testing.assert_allclose(drift["activation"][:2], before, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drift["drift"][4:], after - before, rtol=1e-3, atol=1e-6)


def test_the_probe_leaves_attention_sinks_out() -> None:
    tokenizer, dictionary = make_tokenizer(), make_dictionary()
    model = make_model(tokenizer).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("w30")] *= 100
    probe = Probe.from_texts(["w30 w3 w30 w5 w6", "w7 w8"], tokenizer)
    features = torch.tensor([1, 2])
    found = probe.mean_activations(resolve_hook_point(model, HOOK_POINT), dictionary, features)
    with torch.no_grad():
        first = model(**tokenizer("w30 w3 w30 w5 w6", return_tensors="pt"), output_hidden_states=True)
        second = model(**tokenizer("w7 w8", return_tensors="pt"), output_hidden_states=True)
    tokens = torch.cat([first.hidden_states[2][0, [1, 3, 4]], second.hidden_states[2][0, 1:]])
    torch.testing.assert_close(found, dictionary.encode(tokens)[:, features].mean(0), rtol=1e-4, atol=1e-4)
    counting = probe.mean_activations(
        resolve_hook_point(model, HOOK_POINT), dictionary, features, attention_sinks=True
    )
    tokens = torch.cat([first.hidden_states[2][0, 1:], second.hidden_states[2][0, 1:]])
    torch.testing.assert_close(counting, dictionary.encode(tokens)[:, features].mean(0), rtol=1e-4, atol=1e-4)


def run_with_fit(directory: Path, dictionaries: Any) -> RunRecord:
    trainer = dpo(directory, logging_steps=1)
    trainer.add_callback(FeatureAttributionCallback(dictionaries, directory / "record"))
    trainer.train()
    return RunRecord.load(directory / "record")


def test_a_run_whose_own_tokens_the_dictionary_does_not_explain_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Both dictionaries are as fitting as the measured token FVU says; random directions explain too little."""
    good = load_dictionary(complete_sae(), hook_point=HOOK_POINT, name="complete")
    with caplog.at_level("WARNING", "trl_sae_audit"):
        record = run_with_fit(tmp_path, [topk_dictionary("random"), good])
    by_name = record.table("health").groupby("dictionary")["token_fvu"]
    assert by_name.get_group("random").min() > 0.5
    assert by_name.get_group("complete").max() < 0.5
    said = [entry.getMessage() for entry in caplog.records if "unexplained" in entry.getMessage()]
    assert len(said) == 1  # three logs
    first = by_name.get_group("random").iloc[0]
    assert said[0].startswith(f"Dictionary 'random' leaves {100 * first:.0f} % of this run's average token")
    assert f"sae/token_fvu {first:.2f}, limit 0.50" in said[0]


def complete_sae() -> TopKSAE:
    """One that rebuilds every hidden state: a feature for each axis and sign, as many active as there are axes."""
    sae = TopKSAE(TopKSAEConfig(d_in=D_MODEL, d_sae=2 * D_MODEL, k=D_MODEL))
    both = torch.cat([torch.eye(D_MODEL), -torch.eye(D_MODEL)])
    sae.W_dec.data, sae.W_enc.data = both, both.T.contiguous()
    return sae


def test_health_is_measured_on_the_runs_own_tokens(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, logging_steps=1)
    trainer.add_callback(FeatureAttributionCallback(topk_dictionary(), tmp_path / "record"))
    trainer.train()
    health = RunRecord.load(tmp_path / "record").table("health")
    assert health["step"].tolist() == [1, 2, 3]
    assert (health["l0"] <= 8).all()
    assert (health["l0"] > 0).all()
    assert (health["fvu"] > 0).all()
    assert health["tokens"].between(1, 64).all()
