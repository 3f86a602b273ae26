"""Derivatives along a direction: exact, verified, and refused where they are noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.lookaheads import RULES, directions, look, make_gpt2
from helpers.worlds import make_dictionary, make_model, pairs
from torch import library, nn

from trl_sae_audit import AuditError, LookaheadConfig, UpdateRule, audit_preferences
from trl_sae_audit.audit.lookahead.jvp import Jvp
from trl_sae_audit.audit.lookahead.lookahead import Lookahead

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


@library.custom_op("trl_sae_audit_tests::linear", mutates_args=())
def silent_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """A kernel of its own, such as those of quantized layers: without a forward derivative, and without saying so."""
    return x @ weight.T


@silent_linear.register_fake
def _(x, weight):
    return x.new_empty(*x.shape[:-1], len(weight))


def _backward(context, gradient):
    x, weight = context.saved_tensors
    return gradient @ weight, torch.einsum("...i,...j->ij", gradient, x)


silent_linear.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


class Silent(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return silent_linear(x, self.weight)


def silence(model: nn.Module, which: str) -> None:
    """Compute the projections of that name by the silent kernel, with the same weights."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name == which:
                setattr(module, name, Silent(child.weight))


@pytest.mark.parametrize("which", ["down_proj", "q_proj"])
def test_an_operation_that_drops_the_derivative_is_found(tokenizer, which):
    """All of it, or a part (through the queries alone): the same predictions as of a model without such an operation."""

    def audited(model):
        config = LookaheadConfig(pairs(5, seed=7), optimizer=UpdateRule("adamw", 1e-4))
        return audit_preferences(
            model, tokenizer, pairs(8), make_dictionary(), lookahead=config, progress=False
        )

    plain, silent = make_model(tokenizer), make_model(tokenizer)
    silence(silent, which)
    one, other = audited(plain), audited(silent)
    assert one._lookahead.ahead.jvp.method == "auto"
    assert other._lookahead.ahead.jvp.method == "finite_difference"
    for column in ("predicted_change", "predicted_change_in_generations"):
        expected, found = (
            audit.features().set_index("feature").sort_index()[column].to_numpy() for audit in (one, other)
        )
        assert np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


def test_where_only_forward_will_do_it_is_an_error(tokenizer):
    model = make_model(tokenizer)
    silence(model, "down_proj")
    config = LookaheadConfig(pairs(5, seed=7), method="forward")
    with pytest.raises(AuditError, match="cannot be differentiated forward"):
        audit_preferences(model, tokenizer, pairs(8), make_dictionary(), lookahead=config, progress=False)


def test_a_step_that_does_not_reach_the_features_changes_nothing(tokenizer):
    """Above the hook point alone: exactly zero, and no reason to give forward differentiation up."""
    model = make_gpt2(tokenizer)
    model.requires_grad_(False)
    model.transformer.h[2].requires_grad_(True)
    ahead = look(model, tokenizer, directions(), RULES["adamw"])
    assert not bool(ahead.predicted_change().any())
    assert ahead.jvp.method == "auto"


def test_a_model_that_computes_coarsely_is_refused():
    """What it computes jumps with every change of a weight: every difference is noise."""

    class Coarse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(0.1, 1, 50))

        def forward(self) -> torch.Tensor:
            return torch.sin(self.weight * 1e7)

    model = Coarse()
    jvp = Jvp(model, dict(model.named_parameters()), "finite_difference")
    direction = {"weight": torch.randn(50, generator=torch.Generator().manual_seed(0)) * 1e-9}
    with pytest.raises(AuditError, match="computes too coarsely"):
        jvp.derivative(lambda parameters: jvp.at(parameters, lambda: model()), direction)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_what_float32_does(tokenizer, dtype):
    """The usual learning rate, at which Adam's epsilon and the step are below what float16 holds."""
    found = {}
    for each in (torch.float32, dtype):
        model = make_model(tokenizer).to(torch.bfloat16).to(each)  # the same weights in both
        audit = audit_preferences(
            model, tokenizer, pairs(24), make_dictionary(), lookahead=pairs(12, seed=9), progress=False
        )
        found[each] = audit.features().set_index("feature").sort_index()
    one, other = found[torch.float32], found[dtype]
    assert np.isfinite(other["predicted_change"]).all()
    assert np.corrcoef(one["predicted_change"], other["predicted_change"])[0, 1] > 0.9


def test_a_prediction_that_is_not_finite_is_never_a_result(tokenizer, monkeypatch):
    change = Lookahead.predicted_change
    monkeypatch.setattr(Lookahead, "predicted_change", lambda self: change(self) * float("nan"))
    with pytest.raises(AuditError, match=r"predicted_change is not finite in 96 features: .* torch.float32"):
        audit_preferences(
            make_model(tokenizer),
            tokenizer,
            pairs(8),
            make_dictionary(),
            lookahead=pairs(5, seed=7),
            progress=False,
        )
