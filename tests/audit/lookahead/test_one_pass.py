"""One pass over the pairs of the step: its gradients are those of two, at the hook point and at the parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.audits import by_feature
from helpers.lookaheads import RULES, directions, look, make_gpt2, topk, with_lora
from helpers.worlds import make_model, make_sae_dictionary, pairs

from trl_sae_audit import LookaheadConfig, audit_preferences
from trl_sae_audit.audit.gradients import AuditPass
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.residual_stream import frozen
from trl_sae_audit.models.sampling import Sampling

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_the_hook_points_gradients_are_those_of_a_pass_of_its_own(tokenizer, with_reference, adapters):
    model = make_gpt2(tokenizer)
    model = with_lora(model) if adapters else model
    reference = make_gpt2(tokenizer, seed=6) if with_reference else None
    ahead = look(model, tokenizer, directions(), RULES["adamw"], reference)
    batch = ahead.loss.collate(PreferenceLoss(tokenizer).tokenize(list(enumerate(pairs(5)))))
    own = AuditPass(model, ahead.point, ahead.dictionary, ahead.loss, reference=reference)
    with frozen(model):
        expected = own.differentiate(batch)
    found = ahead.gradients.differentiate(batch, [])
    for name in ("gradient", "hidden", "positions", "log_probs", "weights"):
        torch.testing.assert_close(
            getattr(found, name), getattr(expected, name), check_dtype=False, msg=name, rtol=1e-5, atol=1e-7
        )


def test_gradients_are_added_up_and_the_users_own_are_left(tokenizer):
    model = make_gpt2(tokenizer)
    ahead = look(model, tokenizer, topk(), RULES["sgd"])
    batch = ahead.loss.collate(PreferenceLoss(tokenizer).tokenize(list(enumerate(pairs(3)))))
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    one, other = ahead.gradients.of_batch(batch), ahead.gradients.of_batch(batch)
    sums = [one, other]
    expected = {name: 2 * value for name, value in one.items()}
    ahead.gradients.differentiate(batch, sums)
    for name, value in expected.items():
        torch.testing.assert_close(one[name], value)
        torch.testing.assert_close(other[name], value)
    assert bool((first.grad == 1).all())
    assert all(value.grad is None for value in list(model.parameters())[1:])


def test_gradient_checkpointing_is_honoured_and_changes_nothing(tokenizer):
    model = make_model(tokenizer)
    expected = gradient_of(model, tokenizer)
    read = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *args: read.append(1))
    model.gradient_checkpointing_enable()
    found = gradient_of(model, tokenizer)
    handle.remove()
    assert len(read) == 2  # once forward, once again on the way back
    assert not any("forward" in vars(layer) for layer in model.model.layers)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


def gradient_of(model, tokenizer):
    from helpers.worlds import HOOK_POINT

    from trl_sae_audit.audit.lookahead.lookahead import Lookahead
    from trl_sae_audit.models.hook_points import resolve_hook_point

    loss, dictionary = PreferenceLoss(tokenizer), make_sae_dictionary()
    examples = loss.tokenize(list(enumerate(pairs(3))))
    point = resolve_hook_point(model, [HOOK_POINT])
    ahead = Lookahead(
        model, point, dictionary, loss, UpdateRule("sgd"), lambda: [examples], lambda: [examples]
    )
    return ahead.gradients.of_batch(loss.collate(examples))


def tokens_of(attended):
    """None where the head is run alone."""
    return 0 if attended is None else int(attended.sum())


def test_an_audit_with_lookahead_reads_its_pairs_once_and_finds_the_same(tokenizer):
    model, dictionary, data = make_model(tokenizer), make_sae_dictionary(), pairs(24)
    arguments = (model, tokenizer, data, dictionary)
    plain = by_feature(audit_preferences(*arguments, lookahead=None, progress=False))
    read = []
    handle = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tokens_of(kwargs["attention_mask"])), with_kwargs=True
    )
    ahead = LookaheadConfig(
        [{"prompt": "w1 w2 "}], sampling=Sampling(1, 1), groups=1, optimizer=UpdateRule(batch_size=5)
    )
    both = by_feature(audit_preferences(*arguments, lookahead=ahead, progress=False))
    handle.remove()
    for column in plain.columns.drop("dictionary"):
        if plain[column].dtype.kind == "f":
            np.testing.assert_allclose(both[column], plain[column], rtol=2e-4, atol=1e-6, err_msg=column)
    loss = PreferenceLoss(tokenizer)
    batches = [loss.collate([example]) for example in loss.tokenize(list(enumerate(data)))]
    assert sum(read) < sum(int(batch["attention_mask"].sum()) for batch in batches) + 100
