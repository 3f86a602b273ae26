"""The shield: its projections, what reaches the layers below through real trainers, and that it leaves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.harmless import FailingOnce, nothing_left
from helpers.worlds import D_MODEL, make_dictionary, make_model, make_tokenizer
from scipy.optimize import nnls
from torch import Tensor
from transformers import Trainer, TrainerCallback

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    FeatureShieldCallback,
    Flag,
    FlagSet,
    RunRecord,
)
from trl_sae_audit.callbacks.shield import span_basis, take_out_positive, take_out_span
from trl_sae_audit.trainers.method_wraps import MethodWraps

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length"), Flag("tiny", 7, "lists")])
FLAGGED = [3, 50, 7]


def directions() -> Tensor:
    return make_dictionary().directions[FLAGGED]


def gradients(n: int = 200) -> Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(0))


def build(kind: str, directory: Path, **overrides: Any) -> Trainer:
    if kind == "PPO":
        from helpers.ppo import ppo

        return ppo(directory, **overrides)
    from helpers.trainers import BUILDERS

    return BUILDERS[kind](directory, **overrides)


class Capturing(TrainerCallback):
    """Keeps the gradients that arrive at the output of layer 1, as they are after hooks put there earlier."""

    def __init__(self, trainer: Trainer) -> None:
        self.policy = trainer.policy_model if hasattr(trainer, "policy_model") else trainer.model
        self.gradients: list[Tensor] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        def on_forward(module: Any, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: self.gradients.append(gradient.clone()))

        self.handle = self.policy.model.layers[1].register_forward_hook(on_forward)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.handle.remove()


def test_full_is_the_projection_off_the_span() -> None:
    gradient = gradients()
    basis, _ = torch.linalg.qr(directions().T.double())
    expected = gradient.double() - gradient.double() @ basis @ basis.T
    out = take_out_span(gradient, span_basis(directions()))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-6)
    half = take_out_span(gradient, span_basis(directions()), 0.5)
    torch.testing.assert_close(half, (gradient + out) / 2, rtol=0, atol=1e-6)
    twice = torch.cat([directions(), directions()[:1], -directions()[1:2]])
    torch.testing.assert_close(take_out_span(gradient, span_basis(twice)), out, rtol=0, atol=1e-6)


def test_positive_is_the_projection_onto_the_cone() -> None:
    gradient, rows = gradients(50), directions()
    out = take_out_positive(gradient, rows, torch.zeros(3, dtype=torch.bool))
    for before, after in zip(gradient.double().numpy(), out.double().numpy(), strict=True):
        multipliers, _ = nnls(rows.double().numpy().T, -before)
        np.testing.assert_allclose(after, before + multipliers @ rows.double().numpy(), atol=1e-5)
    assert float((out @ rows.T).min()) > -1e-5
    untouched = ((gradient @ rows.T) >= 0).all(1)
    assert 0 < int(untouched.sum()) < 50
    assert torch.equal(out[untouched], gradient[untouched])


def test_positive_respects_the_directions_of_flags() -> None:
    gradient = gradients()
    for direction, sign in (("up", 1.0), ("down", -1.0)):
        shield = FeatureShieldCallback(
            make_dictionary(), [Flag("tiny", 3, direction=direction)], mode="positive"
        )
        along = sign * (gradient @ directions()[0])
        after = sign * (shield.shield_gradient(gradient) @ directions()[0])
        torch.testing.assert_close(after, along.clamp_min(0), rtol=0, atol=1e-6)
        assert bool((along < -0.1).any())
        assert bool((along > 0.1).any())
    both = [Flag("tiny", feature, direction="both") for feature in FLAGGED]
    shield = FeatureShieldCallback(make_dictionary(), both, mode="positive")
    full = take_out_span(gradient, span_basis(directions()))
    torch.testing.assert_close(shield.shield_gradient(gradient), full, rtol=0, atol=1e-5)


KINDS = [
    *(pytest.param(kind, marks=pytest.mark.newest) for kind in ("DPO", "GRPO", "OnlineDPO")),
    pytest.param("PPO", marks=pytest.mark.ppo),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_below_is_orthogonal_to_the_flagged_directions(kind: str, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path)
    before, after = Capturing(trainer), Capturing(trainer)
    for callback in (before, FeatureShieldCallback(make_dictionary(), FLAGS), after):
        trainer.add_callback(callback)
    trainer.train()
    assert len(before.gradients) == len(after.gradients) >= 3
    basis, _ = torch.linalg.qr(directions().T.double())
    largest = 0.0
    for plain, shielded in zip(before.gradients, after.gradients, strict=True):
        expected = plain.double() - plain.double() @ basis @ basis.T
        size = plain.double().norm()
        assert (shielded.double() - expected).norm() <= 1e-6 * size
        assert (shielded.double() @ directions().double().T).norm() <= 1e-6 * shielded.double().norm()
        if size > 0:  # PPO clips away whole micro-batches, depending on numpy's unseeded shuffle
            largest = max(largest, float((plain.double() @ directions().double().T).norm() / size))
    assert largest > 0.05
    assert not set(vars(trainer)) & {"log", "training_step", "compute_loss", "_run_epoch"}


@pytest.mark.newest
def test_the_parameters_get_the_gradient_of_a_shield_written_by_hand(tmp_path: Path) -> None:
    shielded = build("DPO", tmp_path / "shield")
    shielded.add_callback(FeatureShieldCallback(make_dictionary(), FLAGS))
    shielded.train()
    by_hand = build("DPO", tmp_path / "hand")
    basis, _ = torch.linalg.qr(directions().T)

    def on_forward(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient - gradient @ basis @ basis.T)

    by_hand.model.model.layers[1].register_forward_hook(on_forward)
    by_hand.train()
    plain = build("DPO", tmp_path / "plain")
    plain.train()
    differ = 0
    for (name, one), (_, other), (_, third) in zip(
        shielded.model.named_parameters(),
        by_hand.model.named_parameters(),
        plain.model.named_parameters(),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5, msg=name)
        differ += float((one - third).detach().abs().max()) > 1e-4
    assert differ > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_flag_set_leaves_training_bit_identical(kind: str, tmp_path: Path) -> None:
    plain = build(kind, tmp_path / "plain")
    np.random.seed(0)  # PPO draws its mini-batches from numpy
    plain.train()
    shielded = build(kind, tmp_path / "shielded")
    shielded.add_callback(FeatureShieldCallback(make_dictionary(), FlagSet()))
    np.random.seed(0)
    shielded.train()
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, shielded.model.state_dict()[key]), key
    flagged = build(kind, tmp_path / "flagged")
    flagged.add_callback(FeatureShieldCallback(make_dictionary(), FLAGS))
    np.random.seed(0)
    flagged.train()
    assert any(
        not torch.equal(value, flagged.model.state_dict()[key])
        for key, value in plain.model.state_dict().items()
    )


@pytest.mark.newest
def test_no_strength_is_no_shield(tmp_path: Path) -> None:
    plain, shielded = build("DPO", tmp_path / "plain"), build("DPO", tmp_path / "shielded")
    shielded.add_callback(FeatureShieldCallback(make_dictionary(), FLAGS, strength=0.0))
    plain.train()
    shielded.train()
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, shielded.model.state_dict()[key]), key


@pytest.mark.newest
def test_attribution_before_and_after_is_recorded(tmp_path: Path) -> None:
    trainer = build("DPO", tmp_path, logging_steps=1)
    watch = {flag.label: flag.feature for flag in FLAGS}
    for callback in (
        FeatureAttributionCallback(make_dictionary(), tmp_path / "before", watch=watch),
        FeatureShieldCallback(make_dictionary(), FLAGS),
        FeatureAttributionCallback(make_dictionary(), tmp_path / "after", watch=watch),
    ):
        trainer.add_callback(callback)
    trainer.train()
    tables = {}
    for name in ("before", "after"):
        steps = RunRecord.load(tmp_path / name).steps()
        tables[name] = steps[steps["feature"].isin(FLAGGED)].set_index(["step", "label"])
    logs = [entry for entry in trainer.state.log_history if "shield/flattery/before" in entry]
    assert len(logs) == 3
    for step, entry in enumerate(logs, start=1):
        for label in watch:
            before = tables["before"].loc[(step, label)]
            after = tables["after"].loc[(step, label)]
            assert entry[f"shield/{label}/before"] == pytest.approx(before["attribution"], rel=1e-4, abs=1e-7)
            assert abs(after["attribution"]) < 1e-5 * abs(tables["before"]["attribution"]).max()
            assert abs(entry[f"shield/{label}/after"]) < 1e-5 * abs(tables["before"]["attribution"]).max()
    assert abs(tables["before"]["attribution"]).max() > 1e-3
    assert nothing_left(trainer)


@pytest.mark.newest
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("event", [None, "on_substep_end", "on_step_end"])
def test_nothing_is_left_however_training_ends(first: bool, event: str | None, tmp_path: Path) -> None:
    trainer = build("DPO", tmp_path)
    shield = FeatureShieldCallback(make_dictionary(), FLAGS)
    attribution = FeatureAttributionCallback(make_dictionary(), tmp_path / "record")
    for callback in (shield, attribution) if first else (attribution, shield):
        trainer.add_callback(callback)
    if event is None:
        trainer.train()
    else:
        trainer.add_callback(FailingOnce(event))
        with pytest.raises(RuntimeError, match="planted"):
            trainer.train()
    assert nothing_left(trainer)


@pytest.mark.newest
def test_a_shield_over_nothing_trainable_is_refused(tmp_path: Path) -> None:
    trainer = build("DPO", tmp_path, gradient_checkpointing=False)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_(name.startswith(("model.layers.2", "model.norm", "lm_head")))
    trainer.add_callback(FeatureShieldCallback(make_dictionary(), FLAGS))
    with pytest.raises(AuditError, match="nothing to shield"):
        trainer.train()
    assert nothing_left(trainer)


def test_what_does_not_fit_is_refused() -> None:
    for options, match in (
        ({"mode": "half"}, "full, positive"),
        ({"strength": 1.5}, "strength"),
        ({"strength": -0.1}, "strength"),
    ):
        with pytest.raises(AuditError, match=match):
            FeatureShieldCallback(make_dictionary(), FLAGS, **options)  # type: ignore[arg-type]
    with pytest.raises(AuditError, match="No flag is of dictionary"):
        FeatureShieldCallback(make_dictionary(), [Flag("another", 3)])
    with pytest.raises(AuditError, match="not of dictionary"):
        FeatureShieldCallback(make_dictionary(), [*FLAGS, Flag("another", 3)])
    dictionary = make_dictionary()
    dictionary.norms[3] = 0.0
    with pytest.raises(AuditError, match="direction is zero"):
        FeatureShieldCallback(dictionary, FLAGS)


def test_bfloat16_gradients_stay_bfloat16() -> None:
    shield = FeatureShieldCallback(make_dictionary(), FLAGS)
    gradient = gradients().bfloat16().reshape(4, 50, D_MODEL)
    out = shield.shield_gradient(gradient)
    assert out.dtype == torch.bfloat16
    assert out.shape == gradient.shape
    along = (out.float() @ directions().T).abs().max() / gradient.float().norm(dim=-1).max()
    assert float(along) < 0.01


class Thing:
    def method(self) -> list[str]:
        return ["original"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1)])
def test_wrappers_come_off_in_any_order(own: bool, order: tuple[int, ...]) -> None:
    thing: Any = Thing()
    if own:
        thing.method = lambda: ["own"]
    before = dict(vars(thing))
    wraps = [MethodWraps() for _ in range(3)]
    for index, each in enumerate(wraps):
        each.wrap(thing, "method", lambda original, index=index: [*original(), str(index)])
    active = [0, 1, 2]
    for index in order:
        assert thing.method() == ["own" if own else "original", *map(str, active)]
        wraps[index].undo()
        active.remove(index)
    assert vars(thing) == before


def test_the_model_is_left_alone_until_training() -> None:
    model = make_model(make_tokenizer())
    FeatureShieldCallback(make_dictionary(), FLAGS)
    assert not any(module._forward_hooks for module in model.modules())
