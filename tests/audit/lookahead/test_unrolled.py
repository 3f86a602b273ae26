"""Unrolled runs in float64 against the same long steps taken by hand, and through an audit."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.lookaheads import RULES, answers_of, directions, look, make_gpt2, mean_loss, moved_by
from helpers.worlds import make_dictionary, make_model, pairs

from trl_sae_audit import AuditError, LookaheadConfig, audit_preferences
from trl_sae_audit.audit.lookahead.generations import mean_over_generations
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.lookahead.unrolled import UnrolledRun
from trl_sae_audit.models.sampling import Sampling

HALVES, TWICE_ALL = (slice(0, 4), slice(4, 6)), (slice(0, 6), slice(0, 6))


def by_hand(model, tokenizer, rule, steps, reference, parts):
    """Two long steps on those pairs (of which the first four and the last two are the batches of `look`), by autograd on a copy."""
    moved = copy.deepcopy(model)
    squares = []
    for rows in parts:
        moved.zero_grad()
        mean_loss(moved, tokenizer, reference, rows=rows).backward()
        mean = {name: value.grad.clone() for name, value in moved.named_parameters()}
        for start in range(rows.start, rows.stop, 2):
            moved.zero_grad()
            mean_loss(moved, tokenizer, reference, rows=slice(start, start + 2)).backward()
            squares.append({name: value.grad.square() for name, value in moved.named_parameters()})
        with torch.no_grad():
            for name, value in moved.named_parameters():
                step = rule.learning_rate * mean[name]
                if rule.kind == "adamw":
                    second = torch.stack([batch[name] for batch in squares]).mean(0)
                    step = step / (second.sqrt() + rule.eps)
                value -= steps / 2 * step
    return moved


@pytest.mark.parametrize("with_reference", [False, True])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize(("steps", "parts"), [(3, HALVES), (10, TWICE_ALL)])
def test_against_the_same_steps_by_hand(tokenizer, kind, with_reference, steps, parts):
    """A run of three steps of two pairs has three pairs in half of its time, so that each long step can have its own; one of ten has
    more than there are."""
    model = make_gpt2(tokenizer)
    reference = make_gpt2(tokenizer, seed=6) if with_reference else None
    rate = 1e-4 if kind == "adamw" else 1e-2
    rule = UpdateRule(kind, rate, max_grad_norm=None, batch_size=2)
    ahead = look(model, tokenizer, directions(), rule, reference)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shift = UnrolledRun(ahead, steps, segments=2).shift()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    moved = by_hand(model, tokenizer, rule, steps, reference or make_gpt2(tokenizer), parts)
    for name, value in moved.named_parameters():
        expected = (value - before[name]).detach()
        torch.testing.assert_close(shift[name], expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    first = ahead.step()
    assert any(not torch.allclose(shift[name], steps * first[name], rtol=1e-2, atol=1e-9) for name in shift)


def test_one_part_is_the_lookaheads_step(tokenizer):
    rule = UpdateRule("adamw", 1e-4, batch_size=2)
    ahead = look(make_gpt2(tokenizer), tokenizer, directions(), rule)
    shift, step = UnrolledRun(ahead, 7, segments=1).shift(), ahead.step()
    for name, value in shift.items():
        torch.testing.assert_close(value, 7 * step[name])


def test_a_longer_run_has_more_long_steps(tokenizer):
    ahead = look(
        make_gpt2(tokenizer), tokenizer, directions(), UpdateRule("adamw", 1e-4, batch_size=1)
    )  # two batches, of 4 and 2 pairs
    seen = []
    gradient = ahead.gradient

    def counted(share, *args):
        found, count = gradient(share, *args)
        seen.append(count)
        return found, count

    ahead.gradient = counted
    for steps, counts in ((2, [4, 2, 4, 2]), (12, [4, 2, 4, 2]), (13, [6] * 4), (55, [6] * 6)):
        seen.clear()
        UnrolledRun(ahead, steps).shift()
        assert seen == counts


def test_predictions_are_of_the_moved_model(tokenizer):
    """On given text: the moved model's own activations. In generations: its answers, read by the model before."""
    model, dictionary = make_gpt2(tokenizer), directions()
    ahead = look(model, tokenizer, dictionary, UpdateRule("adamw", 1e-3, batch_size=2))
    unrolled = UnrolledRun(ahead, 20, segments=2)
    prompts = [[5, 9, 12], [7, 30]]
    change = ahead.change_after(unrolled.shift())
    moved = moved_by(model, unrolled.shift(), 1.0)
    after = look(moved, tokenizer, dictionary, RULES["sgd"]).mean_activations()
    torch.testing.assert_close(change, after - ahead.mean_activations())
    with unrolled.moved():
        answers = answers_of(model, tokenizer, prompts, 50, 4)
    now, then = (
        mean_over_generations(ahead, iter(each))[0]
        for each in (answers_of(model, tokenizer, prompts, 50, 4), answers)
    )
    means = []
    for policy in (model, moved):
        states = []
        for _, batch in answers_of(policy, tokenizer, prompts, 50, 4):
            with torch.no_grad():
                output = model(
                    batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
                )
            states.append(output.hidden_states[2][batch["completion_mask"].bool()])
        means.append((torch.cat(states) @ dictionary.directions.double().T).mean(0))
    torch.testing.assert_close(then - now, means[1] - means[0])
    assert means[1].sub(means[0]).abs().max() > 0


def test_the_model_is_put_back_whatever_happens(tokenizer):
    model = make_gpt2(tokenizer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ahead = look(model, tokenizer, directions(), UpdateRule("sgd", 1e-2, max_grad_norm=None))
    unrolled = UnrolledRun(ahead, 5, 2)

    def stopped() -> None:
        with unrolled.moved():
            assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_refusals(tokenizer):
    model = make_gpt2(tokenizer)
    with pytest.raises(AuditError, match="positive numbers"):
        UnrolledRun(look(model, tokenizer, directions(), RULES["sgd"]), 0)
    nothing = look(model, tokenizer, directions(), RULES["sgd"])
    nothing.examples = list
    with pytest.raises(AuditError, match="no example to unroll"):
        UnrolledRun(nothing, 5).shift()
    with pytest.raises(AuditError, match="with batches of a known size"):
        UnrolledRun(look(model, tokenizer, directions(), RULES["adamw"]), 5)


def test_through_an_audit(tokenizer, tmp_path):
    model, dictionary = make_model(tokenizer), make_dictionary()
    common = {"probe": pairs(5, seed=7), "optimizer": UpdateRule("adamw", 1e-3, batch_size=2)}

    def audited(**options):
        lookahead = LookaheadConfig(**common, unroll_steps=12, **options)
        places = {"progress": False, "batch_size": 2, "output_dir": tmp_path / "audit"}
        return audit_preferences(model, tokenizer, pairs(8), dictionary, lookahead=lookahead, **places)

    table = audited(sampling=None).features()
    assert table["unrolled_change"].abs().max() > table["predicted_change"].abs().max()
    assert "unrolled_change_in_generations" not in table
    both = audited(sampling=Sampling(2, max_new_tokens=5)).features()
    assert both["unrolled_change_in_generations"].abs().max() > 0
    again, other = (
        audited(unroll_segments=segments, sampling=None).features()["unrolled_change"] for segments in (4, 6)
    )
    assert again.equals(table["unrolled_change"])
    assert not other.equals(again)
    with pytest.raises(AuditError, match="set unroll_steps= as well"):
        LookaheadConfig(**common, unroll_segments=2)
