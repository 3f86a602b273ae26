"""PPO of TRL 1.12: exact, harmless, and cleaned up after."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.harmless import failing_at
from helpers.ppo import TEMPERATURE, ppo
from helpers.reference import Reference, recorded, relative_error, row_gradients
from helpers.selection import Tokens, record_of, stepwise
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_model, make_sae_dictionary, make_tokenizer

from trl_sae_audit import FeatureAttributionCallback, RunRecord

pytestmark = pytest.mark.ppo

NEEDED = (
    "mb_advantage",
    "mb_responses",
    "mb_query_responses",
    "mb_logprobs",
    "context_length",
    "padding_mask",
    "micro_batch_inds",
)


class PPORecorder:
    """Copies what PPO's loss was made of, from the running train(), at every call of optimizer.step."""

    def __init__(self, trainer: Any) -> None:
        self.microbatches: list[dict[str, Any]] = []
        self.steps: list[list[dict[str, Any]]] = []
        original = trainer.optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            frame: Any = sys._getframe(1)
            while frame.f_code.co_name != "train":
                frame = frame.f_back
            values = {name: frame.f_locals[name] for name in NEEDED}
            self.microbatches.append(values)
            if trainer.accelerator.sync_gradients:
                self.steps.append(self.microbatches)
                self.microbatches = []
            return original(*args, **kwargs)

        trainer.optimizer.step = step


def policy_log_probs(model: Any, batch: dict[str, Any], pad: int) -> torch.Tensor:
    """Of the responses' tokens, in the model's precision."""
    tokens = batch["mb_query_responses"]
    attention = tokens != pad
    logits = model(
        input_ids=tokens.masked_fill(~attention, 0),
        attention_mask=attention,
        position_ids=attention.cumsum(1) - attention.long(),
    ).logits[:, batch["context_length"] - 1 : -1]
    logps = F.log_softmax(logits / (TEMPERATURE + 1e-7), -1)
    return logps.gather(-1, batch["mb_responses"][..., None]).squeeze(-1)


def policy_loss(logps: torch.Tensor, batch: dict[str, Any], cliprange: float = 0.2) -> torch.Tensor:
    """PPO's clipped objective, written out."""
    padding = batch["padding_mask"][batch["micro_batch_inds"]]
    ratio = torch.exp(logps.masked_fill(padding, 1.0) - batch["mb_logprobs"].double())
    advantage = batch["mb_advantage"].double()
    worst = torch.max(-advantage * ratio, -advantage * ratio.clamp(1 - cliprange, 1 + cliprange))
    return (worst * ~padding).sum() / (~padding).sum()


def test_scores_equal_float64_autograd(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, learning_rate=0.0)
    recorder = PPORecorder(trainer)
    dictionary = make_dictionary()
    trainer.add_callback(FeatureAttributionCallback(dictionary, tmp_path / "record", top_k=D_SAE))
    trainer.train()

    tokenizer = make_tokenizer()
    policy = make_model(tokenizer).double()
    record = RunRecord.load(tmp_path / "record")
    steps = record.steps()
    assert len(recorder.steps) == 8
    assert sorted(steps["step"].unique()) == list(range(1, 9))
    assert sorted(steps["global_step"].unique()) == [1, 2, 3, 4]
    assert record.manifest["sides"] == ["reinforced", "suppressed"]
    for step, microbatches in enumerate(recorder.steps, start=1):
        assert len(microbatches) == 2
        expected = Reference()
        for batch in microbatches:
            rows = row_gradients(
                policy,
                HOOK_POINT,
                2,
                lambda batch=batch: (
                    policy_loss(policy_log_probs(policy, batch, tokenizer.pad_token_id), batch) / 2
                ),
            )
            expected.rows.append(rows)
            expected.examples.append(rows)
        scores = expected.scores(dictionary)
        for column in ("attribution", "cosine", "share", "standard_error"):
            error = relative_error(recorded(steps, step, column), scores[column])
            assert error <= 1e-5, (step, column, error)
        parts = recorded(steps, step, "positive") + recorded(steps, step, "negative")
        assert relative_error(parts, scores["attribution"]) <= 1e-5


def test_selection_is_that_of_every_token(tmp_path: Path) -> None:
    """With weights that move, so that ratios are clipped, and the temperature of the sampling."""
    trainer = ppo(tmp_path, num_ppo_epochs=3, cliprange=0.02)
    recorder = PPORecorder(trainer)
    snapshots: list[dict[str, torch.Tensor]] = []
    stepping = trainer.optimizer.step

    def step(*args: Any, **kwargs: Any) -> Any:
        policy = trainer.accelerator.unwrap_model(trainer.model).policy
        snapshots.append({name: value.clone() for name, value in policy.state_dict().items()})
        return stepping(*args, **kwargs)

    trainer.optimizer.step = step
    original_module = sys.modules[type(trainer).__module__]
    function = original_module.selective_log_softmax
    record = record_of(trainer, tmp_path, watch={"one": 1})
    assert original_module.selective_log_softmax is function
    assert record.features()["selection"].notna().all()

    tokenizer = make_tokenizer()
    policy = make_model(tokenizer).double()
    clipped = 0
    for number in (1, 4, 6):
        tokens, sides = Tokens(policy), []
        for index, batch in enumerate(recorder.steps[number - 1]):
            state = snapshots[2 * (number - 1) + index]
            policy.load_state_dict({name: value.double() for name, value in state.items()})
            logps = policy_log_probs(policy, batch, tokenizer.pad_token_id).detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(policy_loss(logps, batch, 0.02) / 2, logps)
            counted = ~batch["padding_mask"][batch["micro_batch_inds"]]
            clipped += int((counted & (gradient == 0)).sum())
            ids = batch["mb_query_responses"]
            attended = ids != tokenizer.pad_token_id
            with torch.no_grad():
                hidden = policy(
                    input_ids=ids.masked_fill(~attended, 0),
                    attention_mask=attended,
                    position_ids=attended.cumsum(1) - attended.long(),
                    output_hidden_states=True,
                ).hidden_states[2]
            tokens.add(-gradient * counted, counted, hidden[:, batch["context_length"] :])
            sides.append(torch.zeros(len(ids)))
        expected = tokens.scores(sides, paired=False)
        for name in ("selection", "selection_standard_error", "response_activation", "response_frequency"):
            found = stepwise(record, number)[name].to_numpy()
            assert relative_error(found, expected[name]) <= 1e-3, (number, name)
    assert clipped > 0
    logged = [entry for entry in trainer.state.log_history if "sae/one/selection" in entry]
    assert {"sae/one/activation", "sae/one/frequency", "sae/top1/selection"} <= logged[0].keys()


def test_the_side_of_a_response_follows_its_advantage(tmp_path: Path) -> None:
    """With one token a response, the side is the sign of that token's advantage."""
    trainer = ppo(
        tmp_path,
        learning_rate=0.0,
        response_length=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_mini_batches=1,
    )
    recorder = PPORecorder(trainer)
    callback = FeatureAttributionCallback(
        make_dictionary(), tmp_path / "record", watch={"one": 1}, examples=True
    )
    trainer.add_callback(callback)
    trainer.train()
    examples = RunRecord.load(tmp_path / "record").table("examples")
    expected = torch.cat([batch["mb_advantage"] for step in recorder.steps for batch in step]).sign()[:, 0]
    assert set(expected.tolist()) == {-1.0, 1.0}
    assert examples["side"].tolist() == expected.int().tolist()


@pytest.mark.parametrize("checkpointing", [True, False])
def test_weights_are_bit_identical(checkpointing: bool, tmp_path: Path) -> None:
    def train(directory: Path, *callbacks: Any) -> Any:
        trainer = ppo(directory, gradient_checkpointing=checkpointing)
        for callback in callbacks:
            trainer.add_callback(callback)
        np.random.seed(0)  # PPO shuffles with numpy's global generator, which it does not seed
        trainer.train()
        return trainer

    plain = train(tmp_path / "plain")
    audited = train(
        tmp_path / "audited",
        FeatureAttributionCallback(
            make_sae_dictionary(), tmp_path / "record", watch={"one": 1}, probe=["w1 w2"], token_scores=True
        ),
    )
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, audited.model.state_dict()[key]), key
    assert nothing_left(audited)


def test_metrics_are_in_the_trainers_log(tmp_path: Path) -> None:
    trainer = ppo(tmp_path)
    callback = FeatureAttributionCallback(make_dictionary(), tmp_path / "record", watch={"one": 1})
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "sae/one/attribution" in entry]
    assert len(logged) == 4
    assert {"sae/one/reinforced", "sae/one/suppressed", "sae/top1/feature", "objective/kl"} <= logged[
        0
    ].keys()


def test_nothing_is_left_after_an_exception_inside_a_step(tmp_path: Path) -> None:
    trainer: Any = ppo(tmp_path)
    failing = failing_at(3, trainer.accelerator.backward)
    trainer.accelerator.backward = failing
    trainer.add_callback(FeatureAttributionCallback(make_dictionary(), tmp_path / "record"))
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    assert nothing_left(trainer)
    assert RunRecord.load(tmp_path / "record").status == "failed"


def nothing_left(trainer: Any) -> bool:
    hooks = [hook for module in trainer.model.modules() for hook in module._forward_hooks.values()]
    ours = [hook for hook in hooks if hook.__module__.startswith("trl_sae_audit")]
    wrapped = (
        "log" in vars(trainer)
        or "accumulate" in vars(trainer.accelerator)
        or "step" in vars(trainer.optimizer)
    )
    return not ours and not wrapped
