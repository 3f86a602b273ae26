"""For every trainer, the recorded selection is that of a float64 reference: c by autograd at the log-probabilities, all tokens encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.reference import StepRecorder, record_online_dpo, sequence_logps, to_double
from helpers.selection import EVERY_TOKEN, Tokens, compare, plant_sinks, record_of, sinks_of, stepwise
from helpers.trainers import BUILDERS, build
from torch import Tensor

from trl_sae_audit.errors import AuditError
from trl_sae_audit.trainers import hooks

SCALED_BY_THE_LOSS = ("SFT", "GRPO")


def sides_of(name: str, inputs: dict[str, Any], rows: int) -> Tensor | None:
    if name in ("DPO", "Reward"):
        return torch.tensor([1.0] * (rows // 2) + [-1.0] * (rows // 2))
    if name == "KTO":
        return torch.tensor([1.0 if label else -1.0 for label in inputs["label"]])
    return inputs["advantages"].sign() if name in ("GRPO", "RLOO") else None


@pytest.mark.newest
@pytest.mark.parametrize("way", ["log-probabilities", "last hidden state"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO", "RLOO"])
def test_selection_is_that_of_every_token(
    name: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once with c as the forward shows it, once without, so that it has to be found at the last hidden state."""
    if way == "last hidden state":
        monkeypatch.setattr(hooks, "watch_responses", lambda *args: [])
    check_every_token(name, tmp_path)


@pytest.mark.newest
@pytest.mark.parametrize("way", ["log-probabilities", "last hidden state"])
@pytest.mark.parametrize(("name", "counted"), [("DPO", False), ("DPO", True), ("GRPO", False)])
def test_no_feature_is_active_at_an_attention_sink(
    name: str,
    counted: bool,
    way: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Words that are blown up wherever they stand: 0 in selection, activation and frequency, unless they are asked for."""
    if way == "last hidden state":
        monkeypatch.setattr(hooks, "watch_responses", lambda *args: [])
    with caplog.at_level("INFO", "trl_sae_audit"):
        found = check_every_token(name, tmp_path, sinks=True, attention_sinks=counted)
    assert found
    said = [entry.getMessage() for entry in caplog.records if "attention sinks" in entry.getMessage()]
    assert said == [] if counted else [line.split()[0] for line in said] == [str(found)]


def check_every_token(
    name: str, directory: Path, *, sinks: bool = False, attention_sinks: bool = False
) -> int:
    """Compare a run's record with the reference; the number of response tokens that are attention sinks."""
    options = {"learning_rate": 0.0} | ({"temperature": 0.7} if name in ("GRPO", "RLOO") else {})
    trainer = BUILDERS[name](directory, **options)
    double = BUILDERS[name](directory, torch.float64, gradient_checkpointing=False, **options)
    double.model.train()
    if sinks:
        plant_sinks(trainer.model)
        plant_sinks(double.model)
    recorder = StepRecorder()
    recorder.watch(trainer)
    record = record_of(trainer, directory, attention_sinks=attention_sinks)
    found = 0
    assert len(recorder.steps) == 3
    for step, microbatches in enumerate(recorder.steps, start=1):
        tokens, sides = Tokens(double.model), []
        scale = 1 if name in SCALED_BY_THE_LOSS else len(microbatches)
        double.current_gradient_accumulation_steps = len(microbatches)
        for inputs, kwargs in microbatches:
            doubled = {key: to_double(value) for key, value in inputs.items()}
            tokens.read(
                lambda doubled=doubled, kwargs=kwargs, scale=scale: (
                    double.compute_loss(double.model, doubled, **kwargs) / scale
                )
            )
            side = sides_of(name, inputs, len(tokens.weights[-1]))
            sides += [] if side is None else [side]
        expected = tokens.scores(sides or None, paired=name == "DPO", attention_sinks=attention_sinks)
        compare(record, step, expected)
        found += sum(
            int(sinks_of(hidden[counted]).sum())
            for batch in zip(tokens.hidden, tokens.counted, strict=True)
            for hidden, counted in zip(*batch, strict=True)
        )
    return found


@pytest.mark.parametrize("tokens", [EVERY_TOKEN, 24])
def test_totals_are_the_sums_of_the_steps(tokens: int, tmp_path: Path) -> None:
    record = record_of(BUILDERS["DPO"](tmp_path), tmp_path, selection_tokens=tokens)
    features, steps = record.features().sort_values("feature"), record.steps()
    by_feature = steps.groupby("feature")
    for column in ("selection", "selection_chosen"):
        assert np.allclose(features[column], by_feature[column].sum(), atol=1e-6), column
    variance = by_feature["selection_standard_error"].apply(lambda values: np.square(values).sum())
    assert np.allclose(features["selection_standard_error"], np.sqrt(variance), atol=1e-6)
    assert np.allclose(features["response_activation"], by_feature["response_activation"].mean(), atol=1e-6)
    assert (features["selection"].abs() > 0).any()


def test_dpo_has_the_weights_of_its_formula(tmp_path: Path) -> None:
    """`c = β·σ(−βΔ)/n` on the chosen, its negative on the rejected, whatever the version of TRL."""
    trainer = build("DPO", tmp_path, beta=0.5, learning_rate=0.0)
    recorder = StepRecorder()
    recorder.watch(trainer)
    record = record_of(trainer, tmp_path)
    policy, reference = trainer.model.double(), trainer.ref_model.double()
    microbatches = recorder.steps[0]
    tokens, sides = Tokens(policy), []
    for inputs, _ in microbatches:
        inputs = {key: to_double(value) for key, value in inputs.items()}
        with torch.no_grad():
            log_ratio = sequence_logps(policy, inputs) - sequence_logps(reference, inputs)
            chosen, rejected = log_ratio.chunk(2)
            n = len(chosen) * len(microbatches)
            c = 0.5 * torch.sigmoid(-0.5 * (chosen - rejected)) / n
            hidden = policy(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                output_hidden_states=True,
            ).hidden_states[2]
        counted = inputs["completion_mask"].bool()
        tokens.add(torch.cat([c, -c])[:, None] * counted, counted, hidden)
        sides.append(sides_of("DPO", inputs, len(counted)))
    compare(record, 1, tokens.scores(sides, paired=True))


def test_reward_models_are_weighed_by_their_rewards(tmp_path: Path) -> None:
    """c = −∂L/∂r, spread over the tokens after what the answers of a pair share."""
    trainer = build("Reward", tmp_path, learning_rate=0.0)
    recorder = StepRecorder()
    recorder.watch(trainer)
    record = record_of(trainer, tmp_path)
    tokens, sides = Tokens(trainer.model), []
    for inputs, _ in recorder.steps[0]:
        ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
        with torch.no_grad():
            output = trainer.model(input_ids=ids, attention_mask=attended, output_hidden_states=True)
        rewards = output.logits[:, 0].double().requires_grad_(True)
        half = len(rewards) // 2
        loss = -torch.nn.functional.logsigmoid(rewards[:half] - rewards[half:]).mean() / len(
            recorder.steps[0]
        )
        (gradient,) = torch.autograd.grad(loss, rewards)
        counted = attended.clone()
        for row in range(half):
            shared = next(t for t in range(ids.shape[1]) if ids[row, t] != ids[row + half, t])
            counted[[row, row + half], :shared] = False
        weights = -gradient[:, None] * counted / counted.sum(1, keepdim=True)
        tokens.add(weights, counted, output.hidden_states[2])
        sides.append(sides_of("Reward", inputs, len(ids)))
    compare(record, 1, tokens.scores(sides, paired=True), tolerance=1e-3)


def test_online_dpo(tmp_path: Path) -> None:
    trainer: Any = build("OnlineDPO", tmp_path, learning_rate=0.0, max_steps=1)
    forwards, rewards, original_forward = record_online_dpo(trainer)
    record = record_of(trainer, tmp_path)
    policy, reference = trainer.model.double(), trainer.ref_model.double()
    tokens, sides = Tokens(policy), []
    for (prompt, prompt_mask, completion, mask, *_), reward in zip(forwards, rewards, strict=True):
        half = len(reward) // 2
        better = torch.where(reward[:half] >= reward[half:], 1.0, -1.0).double()
        side = torch.cat([better, -better])
        ids, attended = torch.cat([prompt, completion], 1), torch.cat([prompt_mask, mask], 1)
        with torch.no_grad():
            ratio = sum(
                sign * (original_forward(model, prompt, prompt_mask, completion, mask) * mask).sum(1)
                for model, sign in ((policy, 1), (reference, -1))
            )
            hidden = policy(input_ids=ids, attention_mask=attended, output_hidden_states=True).hidden_states[
                2
            ]
        margin = (ratio * side)[:half] + (ratio * side)[half:]
        c = 0.5 * torch.sigmoid(-0.5 * margin) / half
        counted = torch.cat([torch.zeros_like(prompt_mask), mask], 1).bool()
        tokens.add(torch.cat([c, c])[:, None] * side[:, None] * counted, counted, hidden)
        sides.append(side)
    compare(record, 1, tokens.scores(sides, paired=True))


def test_packed_examples_are_told_apart(tmp_path: Path) -> None:
    """The same examples with a row each and all in one row: the same selection, and the same standard error."""
    options = {"learning_rate": 0.0, "max_steps": 1, "gradient_accumulation_steps": 1}
    apart = record_of(build("SFT", tmp_path / "apart", **options), tmp_path / "apart")
    trainer = build("SFT", tmp_path / "packed", **options, padding_free=True, max_length=None)
    packed = record_of(trainer, tmp_path / "packed")
    for name in ("selection", "selection_standard_error", "response_activation"):
        expected, found = stepwise(apart, 1)[name], stepwise(packed, 1)[name]
        assert np.allclose(found, expected, atol=1e-5 * expected.abs().max()), name


@pytest.mark.newest
def test_an_entropy_bonus_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The selection is the same as without the bonus, and the log says what is missing."""
    options = {"learning_rate": 0.0, "max_steps": 1}
    plain = record_of(build("GRPO", tmp_path / "plain", **options), tmp_path / "plain")
    assert "more than the log-probabilities" not in caplog.text
    bonus = record_of(build("GRPO", tmp_path / "bonus", entropy_coef=3.0, **options), tmp_path / "bonus")
    assert caplog.text.count("more than the log-probabilities") == 1
    assert np.allclose(stepwise(bonus, 1)["selection"], stepwise(plain, 1)["selection"], atol=1e-6)
    assert not np.allclose(stepwise(bonus, 1)["attribution"], stepwise(plain, 1)["attribution"], rtol=0.1)


@pytest.mark.newest
def test_a_loss_of_the_whole_distribution_has_no_selection(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loss on the logits themselves: absent, not zero, and said once."""
    trainer = build("SFT", tmp_path)
    trainer.compute_loss_func = lambda outputs, labels, **kwargs: (outputs.logits - 1).square().mean()
    record = record_of(trainer, tmp_path, watch={"one": 1})
    assert record.features()["selection"].isna().all()
    assert record.steps()["selection"].isna().all()
    assert record.features()["attribution"].notna().all()
    assert caplog.text.count("recorded as absent") == 1
    assert "unexplained" in caplog.text
    assert "sae/one/selection" not in {name for log in trainer.state.log_history for name in log}


def test_it_can_be_left_out(tmp_path: Path) -> None:
    record = record_of(build("DPO", tmp_path, max_steps=1), tmp_path, selection=False)
    assert not [name for name in record.features() if "selection" in name]
    with pytest.raises(AuditError, match="no 'selection' over time"):
        record.curriculum(score="selection")


def test_what_the_log_shows(tmp_path: Path) -> None:
    trainer = build("GRPO", tmp_path, logging_steps=3)
    record = record_of(trainer, tmp_path, watch={"one": 1}, log_top=2)
    log = next(log for log in trainer.state.log_history if "sae/one/selection" in log)
    steps = record.steps()
    one = steps[steps["feature"] == 1]
    assert np.isclose(log["sae/one/selection"], one["selection"].mean(), atol=1e-6)
    assert np.isclose(log["sae/one/activation"], one["response_activation"].mean(), atol=1e-6)
    assert np.isclose(log["sae/one/frequency"], one["response_frequency"].mean(), atol=1e-6)
    first = record.features().iloc[0]
    assert log["sae/top1/feature"] == first["feature"]
    assert np.isclose(log["sae/top1/selection"], first["selection"] / 3, rtol=1e-4)


def test_over_time(tmp_path: Path) -> None:
    """Selection, and in a trainer that samples what the features do in its rollouts, in every step and feature."""
    record = record_of(build("GRPO", tmp_path), tmp_path)
    steps = record.steps()
    for score, column in (
        ("selection", "selection"),
        ("activation", "response_activation"),
        ("frequency", "response_frequency"),
    ):
        table = steps.pivot_table(index="step", columns="feature", values=column)
        assert np.allclose(record.curriculum(score=score), table, atol=1e-6), score
    offline = record_of(build("DPO", tmp_path / "dpo", max_steps=1), tmp_path / "dpo")
    with pytest.raises(AuditError, match="no 'activation' over time"):
        offline.curriculum(score="activation")


def test_a_budget_draws_other_tokens_of_the_same_sum(tmp_path: Path) -> None:
    """Twelve tokens a step instead of all: another estimate of the same thing, drawn anew with another seed."""
    every = record_of(build("DPO", tmp_path / "every", learning_rate=0.0), tmp_path / "every").features()
    estimates = []
    for seed in (7, 8, 9, 10, 11, 12):
        directory = tmp_path / str(seed)
        trainer = build("DPO", directory, learning_rate=0.0, data_seed=7, seed=seed)
        estimates.append(record_of(trainer, directory, selection_tokens=24).features().set_index("feature"))
    truth = every.set_index("feature")["selection"].sort_index()
    values = pd.DataFrame({number: table["selection"] for number, table in enumerate(estimates)}).sort_index()
    assert (values.std(axis=1) > 0).mean() > 0.3
    error = values.std(axis=1) / len(estimates) ** 0.5
    assert np.corrcoef(values.mean(axis=1), truth)[0, 1] > 0.8
    assert ((values.mean(axis=1) - truth).abs() <= 4 * error + 1e-6).mean() > 0.9
