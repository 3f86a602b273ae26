"""Lookahead in float64 against finite differences and real optimizers, full fine-tuning and LoRA."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers.lookaheads import (
    RULES,
    directions,
    look,
    make_gpt2,
    mean_loss,
    moved_by,
    topk,
    with_lora,
)
from helpers.selection import sinks_of
from helpers.worlds import pairs

from trl_sae_audit import AuditError
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.objectives import PreferenceLoss

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


def torch_step(model, tokenizer, rule, reference):
    """Δθ of a real optimizer, by difference."""
    moved = copy.deepcopy(model)
    parameters = [value for value in moved.parameters() if value.requires_grad]
    if rule.kind == "adamw":
        groups = [
            {"params": [value for value in parameters if value.ndim > 1], "weight_decay": rule.weight_decay},
            {"params": [value for value in parameters if value.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=rule.learning_rate, betas=rule.betas, eps=rule.eps)
    else:
        optimizer = torch.optim.SGD(parameters, lr=rule.learning_rate)
    mean_loss(moved, tokenizer, reference).backward()
    if rule.max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, rule.max_grad_norm)
    optimizer.step()
    before = dict(model.named_parameters())
    return {
        name: value.detach() - before[name].detach()
        for name, value in moved.named_parameters()
        if value.requires_grad
    }


def mean_activation(model, tokenizer, encode):
    """ā_f from the model's own hidden states, row by row."""
    loss = PreferenceLoss(tokenizer)
    total, tokens = 0.0, 0
    for example in loss.tokenize(list(enumerate(pairs(4, seed=9)))):
        batch = loss.collate([example])
        states = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[2]
        answer = states[batch["completion_mask"].bool()]
        total, tokens = total + encode(answer).sum(0), tokens + len(answer)
    return total / tokens


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("sae", [directions, topk])
@torch.no_grad()
def test_predicted_change_is_the_derivative_along_the_real_optimizers_step(tokenizer, rule, adapters, sae):
    model, dictionary = make_gpt2(tokenizer), sae()
    if adapters:
        model = with_lora(model)
    reference = make_gpt2(tokenizer, seed=6)
    found = look(model, tokenizer, dictionary, RULES[rule], reference).predicted_change()
    with torch.enable_grad():
        step = torch_step(model, tokenizer, RULES[rule], reference)
    h = 1e-4
    encode = (
        dictionary.encoder.sae.encode
        if sae is topk
        else lambda hidden: hidden @ dictionary.directions.to(hidden).T
    )
    ahead, behind = (mean_activation(moved_by(model, step, sign * h), tokenizer, encode) for sign in (1, -1))
    expected = (ahead - behind) / (2 * h)
    assert expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


def with_sinks(model):
    """Twelve words become attention sinks."""
    with torch.no_grad():
        model.transformer.wte.weight[10:22] *= 100
    return model


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("method", ["forward", "finite_difference"])
@torch.no_grad()
def test_no_feature_is_active_at_an_attention_sink(tokenizer, counted, method):
    """The derivative of the mean activation with 0 at sinks, row by row; one feature's gradient goes along it."""
    model, dictionary = with_sinks(make_gpt2(tokenizer)), topk()
    ahead = look(model, tokenizer, dictionary, RULES["adamw"], method=method, attention_sinks=counted)
    found, step, before = ahead.predicted_change(), ahead.step(), ahead.mean_activations()
    loss, sinks = PreferenceLoss(tokenizer), []

    def mean(model):
        total, tokens = 0.0, 0
        for example in loss.tokenize(list(enumerate(pairs(4, seed=9)))):
            batch = loss.collate([example])
            output = model(
                batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
            )
            for states, answer in zip(output.hidden_states[2], batch["completion_mask"].bool(), strict=True):
                huge = sinks_of(states[answer])
                sinks.append(int(huge.sum()))
                active = dictionary.encoder.sae.encode(states[answer])
                total, tokens = total + active[counted | ~huge].sum(0), tokens + int(answer.sum())
        return total / tokens

    torch.testing.assert_close(before, mean(model))
    assert sum(sinks)
    h = 1e-4
    expected = (mean(moved_by(model, step, h)) - mean(moved_by(model, step, -h))) / (2 * h)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    feature = int(expected.abs().argmax())
    gradient = ahead.activation_gradient(feature)
    along = sum(float((gradient[name] * step[name]).sum()) for name in step)
    assert along == pytest.approx(float(expected[feature]), rel=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_influences_and_the_offset_add_up_to_the_predicted_change(tokenizer, rule, adapters):
    model = make_gpt2(tokenizer)
    if adapters:
        model = with_lora(model)
    lookahead = look(model, tokenizer, topk(), RULES[rule], make_gpt2(tokenizer, seed=6))
    change = lookahead.predicted_change()
    features = change.abs().topk(3).indices.tolist()
    for feature in features:
        influence, offset = lookahead.influence(lookahead.activation_gradient(feature))
        assert len(influence) == 6
        assert float(influence.sum()) + offset == pytest.approx(float(change[feature]), rel=1e-6)
        if RULES[rule].weight_decay == 0:
            assert offset == 0


def test_influence_of_an_example_is_its_own_gradient_through_the_batchs_preconditioner(tokenizer):
    model = make_gpt2(tokenizer)
    lookahead = look(model, tokenizer, directions(), RULES["adamw"])
    influence, _ = lookahead.influence(lookahead.activation_gradient(7))
    update, activation = lookahead.update(), lookahead.activation_gradient(7)
    loss = PreferenceLoss(tokenizer)
    for index, example in enumerate(loss.tokenize(list(enumerate(pairs(6))))):
        own = lookahead.gradients.of_batch(loss.collate([example]))
        expected = -sum(float((update.scale[name] * activation[name] * own[name]).sum()) for name in own) / 6
        assert float(influence[index]) == pytest.approx(expected, rel=1e-6)


def test_one_small_real_step_changes_activations_as_predicted(tokenizer):
    """Not a derivative along a given direction: gradient, optimizer and change, end to end."""
    model, dictionary = make_gpt2(tokenizer), directions()
    rule = UpdateRule("adamw", 1e-6)
    lookahead = look(model, tokenizer, dictionary, rule)
    change, before = lookahead.predicted_change(), lookahead.mean_activations()
    after = look(moved_by(model, torch_step(model, tokenizer, rule, None), 1.0), tokenizer, dictionary, rule)
    measured = after.mean_activations() - before
    assert float((measured - change).abs().max() / change.abs().max()) < 1e-3


@torch.no_grad()
def test_change_along_and_after_any_step(tokenizer):
    """Of a step of one's own: the derivative is linear in it, and the change itself is a moved model's."""
    model, dictionary = make_gpt2(tokenizer), topk()
    ahead = look(model, tokenizer, dictionary, RULES["adamw"])
    generator = torch.Generator().manual_seed(8)
    step = {
        name: 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in ahead.parameters.items()
    }
    found = ahead.change_after(step)
    encode = dictionary.encoder.sae.encode
    moved, still = (mean_activation(moved_by(model, step, factor), tokenizer, encode) for factor in (1, 0))
    torch.testing.assert_close(found, moved - still)
    slope = ahead.change_along(step)
    small = {name: 1e-5 * value for name, value in step.items()}
    torch.testing.assert_close(ahead.change_after(small) / 1e-5, slope, rtol=1e-2, atol=1e-4)
    assert (found - slope).abs().max() > 0.05 * slope.abs().max()
    torch.testing.assert_close(
        ahead.change_along({key: -2 * value for key, value in step.items()}), -2 * slope
    )


def test_the_usual_step_is_the_mean_of_a_real_optimizers_steps(tokenizer):
    """A real AdamW goes round and round three batches, at a learning rate that leaves the gradients as they are."""
    model = make_gpt2(tokenizer)
    reference = make_gpt2(tokenizer, seed=6)
    rule = UpdateRule("adamw", 1e-9, weight_decay=0.1, max_grad_norm=None, batch_size=2)
    step = look(model, tokenizer, directions(), rule, reference).step()
    moved = copy.deepcopy(model)
    parameters = list(moved.parameters())
    gradients = []
    for start in (0, 2, 4):
        moved.zero_grad()
        mean_loss(moved, tokenizer, reference, rows=slice(start, start + 2)).backward()
        gradients.append([value.grad.clone() for value in parameters])
    decayed = [value for value in parameters if value.ndim > 1]
    rest = [value for value in parameters if value.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-9
    )
    for turn in range(400):
        if turn == 399:
            before = {name: value.detach().clone() for name, value in moved.named_parameters()}
        for batch in gradients:
            for value, gradient in zip(parameters, batch, strict=True):
                value.grad = gradient.clone()
            optimizer.step()
    real = {name: (value.detach() - before[name]) / 3 for name, value in moved.named_parameters()}
    one, other = (
        torch.cat([step[name].flatten() for name in real]),
        torch.cat([*map(torch.ravel, real.values())]),
    )
    assert float((one - other).norm() / other.norm()) < 0.02
    first = look(model, tokenizer, directions(), UpdateRule("adamw", 1e-9), reference).step()
    assert float((torch.cat([first[name].flatten() for name in real]) - other).norm() / other.norm()) > 0.3


def test_pieces_of_batches_do_not_matter(tokenizer):
    model, rule = make_gpt2(tokenizer), UpdateRule("adamw", 1e-3, batch_size=3)
    lookahead, again = (look(model, tokenizer, directions(), rule) for _ in range(2))
    examples = [example for batch in again.examples() for example in batch]
    again.examples = lambda: [examples[:1], examples[1:]]
    for name, value in lookahead.step().items():
        torch.testing.assert_close(value, again.step()[name], rtol=1e-9, atol=1e-9)
    change = lookahead.predicted_change()
    influence, offset = lookahead.influence(lookahead.activation_gradient(3))
    assert float(influence.sum()) + offset == pytest.approx(float(change[3]), rel=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_the_next_step_of_a_running_optimizer(tokenizer, kind):
    model = make_gpt2(tokenizer)
    parameters = list(model.parameters())
    optimizer = (
        torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
        if kind == "adamw"
        else torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.05)
    )
    for seed in (1, 2):
        optimizer.zero_grad()
        (mean_loss(model, tokenizer, make_gpt2(tokenizer, seed=6), n=3) * seed).backward()
        optimizer.step()
    optimizer.zero_grad()
    named = dict(model.named_parameters())
    rule = UpdateRule.from_optimizer(optimizer, named)
    lookahead = look(model, tokenizer, topk(), rule, make_gpt2(tokenizer, seed=6))
    step = lookahead.step()
    change = lookahead.predicted_change()
    influence, offset = lookahead.influence(lookahead.activation_gradient(int(change.abs().argmax())))
    assert abs(offset) > 0
    assert float(influence.sum()) + offset == pytest.approx(
        float(change.abs().max() * change[change.abs().argmax()].sign()), rel=1e-6
    )
    before = {name: value.detach().clone() for name, value in named.items()}
    mean_loss(model, tokenizer, make_gpt2(tokenizer, seed=6)).backward()
    optimizer.step()
    for name, value in named.items():
        torch.testing.assert_close(value.detach() - before[name], step[name], rtol=1e-7, atol=1e-13)


def test_finite_differences_are_close_where_forward_derivatives_are_not_to_be_had(tokenizer, monkeypatch):
    model = make_gpt2(tokenizer)
    exact = look(model, tokenizer, directions(), RULES["sgd"]).predicted_change()
    lookahead = look(model, tokenizer, directions(), RULES["sgd"])

    def unsupported(function, direction):
        raise NotImplementedError("Trying to use forward AD with an operation that does not support it")

    monkeypatch.setattr(lookahead.jvp, "_forward", unsupported)
    found = lookahead.predicted_change()
    assert lookahead.jvp.method == "finite_difference"
    np.testing.assert_allclose(found.numpy(), exact.numpy(), atol=float(exact.abs().max()) * 1e-4)
    single = look(
        copy.deepcopy(model).float(),
        tokenizer,
        directions(),
        RULES["sgd"],
        method="finite_difference",
    )
    rough = single.predicted_change().double()
    assert float((rough - exact).abs().max() / exact.abs().max()) < 0.05


def test_the_model_is_left_alone(tokenizer):
    model = make_gpt2(tokenizer).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lookahead = look(model, tokenizer, topk(), RULES["adamw"])
    lookahead.predicted_change()
    lookahead.influence(lookahead.activation_gradient(0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals(tokenizer):
    model = make_gpt2(tokenizer)
    with pytest.raises(AuditError, match="choose one of"):
        look(model, tokenizer, topk(), RULES["sgd"], method="guess")
    with pytest.raises(AuditError, match="'adamw' or 'sgd'"):
        UpdateRule("lion")
    with pytest.raises(AuditError, match="a RMSprop"):
        UpdateRule.from_optimizer(torch.optim.RMSprop(model.parameters()), dict(model.named_parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    with pytest.raises(AuditError, match="nesterov"):
        UpdateRule.from_optimizer(optimizer, dict(model.named_parameters()))
    optimizer = torch.optim.SGD([next(model.parameters())], lr=1e-3)
    with pytest.raises(AuditError, match="does not hold"):
        UpdateRule.from_optimizer(optimizer, dict(model.named_parameters()))
    model.requires_grad_(False)
    with pytest.raises(AuditError, match="No parameter"):
        look(model, tokenizer, topk(), RULES["sgd"])
