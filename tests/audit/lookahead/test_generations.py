"""What a step does to the model's own answers, against importance weighting and an exact expectation, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.lookaheads import RULES, answers_of, centred, directions, look, make_gpt2, moved_by, topk
from helpers.selection import sinks_of

from trl_sae_audit import AuditError
from trl_sae_audit.audit.lookahead import generation_changes
from trl_sae_audit.audit.lookahead.generation_changes import half_width
from trl_sae_audit.audit.lookahead.generations import (
    gradient_in_generations,
    mean_over_generations,
    predict_in_generations,
)
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


PROMPTS = [[5, 9, 12], [7, 30]]


def rows_of(batches):
    """Ids [1, T] of each answer after its prompt, without padding, and which of them are the answer [T]."""
    for _, batch in batches:
        for ids, counted in zip(batch["input_ids"], batch["completion_mask"].bool(), strict=True):
            size = int(counted.nonzero().max()) + 1
            yield ids[None, :size], counted[:size]


def test_sampled_change_is_the_derivative_of_importance_weighting(tokenizer):
    """Independently: the same answers weighted by how much likelier a moved model finds them, up to each token."""
    model, dictionary = make_gpt2(tokenizer), directions()
    lookahead = look(model, tokenizer, dictionary, RULES["adamw"])
    batches = answers_of(model, tokenizer, PROMPTS, 20, 4)
    predictions = predict_in_generations(lookahead, iter(batches))
    found, frequency = (
        predictions[name] for name in ("predicted_change_in_generations", "predicted_frequency_change")
    )
    step = lookahead.step()

    def log_probs(policy, ids):
        with torch.no_grad():
            return policy(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def weighted_mean(policy):
        ratios, activations = [], []
        for ids, counted in rows_of(batches):
            ratios.append((log_probs(policy, ids) - log_probs(model, ids))[0, counted[1:]])
            with torch.no_grad():
                states = model(ids, output_hidden_states=True).hidden_states[2][0, counted]
            activations.append(states @ dictionary.directions.to(states).T)
        weights = [ratio.cumsum(0).exp() for ratio in centred(ratios)]
        numerator = sum(weight @ values for weight, values in zip(weights, activations, strict=True))
        return numerator / sum(weight.sum() for weight in weights)

    h = 1e-3
    expected = (weighted_mean(moved_by(model, step, h)) - weighted_mean(moved_by(model, step, -h))) / (2 * h)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4
    assert (
        float(frequency.abs().max()) < 1e-12
    )  # raw directions are active always, so their share cannot change


def test_frequency_is_the_derivative_of_weighing_whole_answers(tokenizer):
    model, dictionary = make_gpt2(tokenizer), topk()
    lookahead = look(model, tokenizer, dictionary, RULES["adamw"])
    batches = answers_of(model, tokenizer, PROMPTS, 20, 4)
    found = predict_in_generations(lookahead, iter(batches))["predicted_frequency_change"]

    @torch.no_grad()
    def share(policy):
        ratios, present = [], []
        for ids, answer in rows_of(batches):
            now, before = (
                one(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[answer[1:], 0]
                for one in (policy, model)
            )
            ratios.append(now - before)
            states = model(ids, output_hidden_states=True).hidden_states[2][0, answer]
            present.append((dictionary.encoder.sae.encode(states) != 0).any(0).double())
        weights = torch.stack([ratio.sum().exp() for ratio in centred(ratios)])
        return weights @ torch.stack(present) / weights.sum()

    h = 1e-3
    step = lookahead.step()
    expected = (share(moved_by(model, step, h)) - share(moved_by(model, step, -h))) / (2 * h)
    assert expected.abs().max() > 0
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("method", ["forward", "finite_difference"])
def test_no_feature_is_active_at_an_attention_sink(tokenizer, counted, method):
    """Answers to one prompt read it once; likewise weighted, with 0 at the place whose embedding is a hundred times as long."""
    model, dictionary = make_gpt2(tokenizer), topk()
    with torch.no_grad():
        model.transformer.wpe.weight[5] *= 100
    ahead = look(model, tokenizer, dictionary, RULES["adamw"], method=method, attention_sinks=counted)
    batches = answers_of(model, tokenizer, PROMPTS, 20, 6)
    found = predict_in_generations(ahead, iter(batches))
    active, silent = [], 0
    for ids, answer in rows_of(batches):
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states[2][0, answer]
            huge = sinks_of(states)
            silent += int(huge.sum())
            active.append(dictionary.encoder.sae.encode(states) * (counted | ~huge)[:, None])
    assert silent
    everywhere = torch.cat(active)
    torch.testing.assert_close(found["generation_activation"], everywhere.mean(0))
    share = torch.stack([(each != 0).any(0).double() for each in active]).mean(0)
    torch.testing.assert_close(found["generation_frequency"], share)
    torch.testing.assert_close(mean_over_generations(ahead, iter(batches))[0], everywhere.mean(0))

    @torch.no_grad()
    def weighted_mean(policy):
        ratios = []
        for ids, answer in rows_of(batches):
            now, before = (
                one(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[answer[1:], 0]
                for one in (policy, model)
            )
            ratios.append(now - before)
        weights = torch.cat([ratio.cumsum(0).exp() for ratio in centred(ratios)])
        return weights @ everywhere / weights.sum()

    h, step = 1e-3, ahead.step()
    expected = (weighted_mean(moved_by(model, step, h)) - weighted_mean(moved_by(model, step, -h))) / (2 * h)
    change = found["predicted_change_in_generations"]
    assert float((change - expected).abs().max() / expected.abs().max()) < 1e-4
    feature = int(change.abs().argmax())
    gradient = gradient_in_generations(ahead, feature, lambda: iter(batches))
    along = sum(float((gradient[name] * step[name]).sum()) for name in step)
    assert along == pytest.approx(float(change[feature]), rel=1e-4)


def test_sampled_change_is_that_of_the_exact_expectation(tokenizer):
    """Every answer of two tokens, each with its probability, before and after a step: no sampling at all."""
    model, dictionary = make_gpt2(tokenizer), directions()
    lookahead = look(model, tokenizer, dictionary, UpdateRule("sgd", 1e-2, max_grad_norm=None))
    step, vocabulary = lookahead.step(), len(tokenizer)
    second = torch.arange(vocabulary)

    @torch.no_grad()
    def expectation(policy):
        activity, tokens = 0.0, 0.0
        for prompt in PROMPTS:
            first = policy(torch.tensor([prompt])).logits[0, -1].softmax(-1)
            for token, chance in enumerate(first):
                begun = torch.tensor([[*prompt, token]])
                states = model(begun, output_hidden_states=True).hidden_states[2][0, -1]
                activity, tokens = (
                    activity + chance * (states @ dictionary.directions.to(states).T),
                    tokens + chance,
                )
                if token == tokenizer.eos_token_id:
                    continue
                then = chance * policy(begun).logits[0, -1].softmax(-1)
                both = torch.cat([begun.expand(vocabulary, -1), second[:, None]], dim=1)
                states = model(both, output_hidden_states=True).hidden_states[2][:, -1]
                activity, tokens = (
                    activity + then @ (states @ dictionary.directions.to(states).T),
                    tokens + then.sum(),
                )
        return activity / tokens

    h = 1e-3
    expected = (expectation(moved_by(model, step, h)) - expectation(moved_by(model, step, -h))) / (2 * h)
    batches = answers_of(model, tokenizer, PROMPTS, 5000, 2)
    found = predict_in_generations(lookahead, iter(batches))["predicted_change_in_generations"]
    assert float((found - expected).norm() / expected.norm()) < 0.15
    assert np.corrcoef(found, expected)[0, 1] > 0.98


def test_groups_are_parts_of_one_step(tokenizer):
    model, rule = make_gpt2(tokenizer), UpdateRule("adamw", 1e-3, weight_decay=0.1, batch_size=2)
    batches = answers_of(model, tokenizer, PROMPTS, 20, 4)
    whole, parts = (
        predict_in_generations(look(model, tokenizer, topk(), rule, borders=borders), iter(batches))
        for borders in ((), (1, 3))
    )
    for name in ("predicted_change_in_generations", "predicted_frequency_change", "effect_size"):
        torch.testing.assert_close(whole[name], parts[name], equal_nan=True)
    assert bool(whole["effect_size_low"].isnan().all())  # one group shows no noise
    known = ~parts["effect_size"].isnan()
    assert bool((parts["effect_size_low"] < parts["effect_size"])[known].all())
    halves = parts["effect_size_high"] - parts["effect_size"], parts["effect_size"] - parts["effect_size_low"]
    torch.testing.assert_close(*halves, equal_nan=True)


def test_the_gradient_in_generations_goes_along_the_step_as_predicted(tokenizer):
    model, dictionary = make_gpt2(tokenizer), topk()
    ahead = look(model, tokenizer, dictionary, RULES["adamw"], make_gpt2(tokenizer, seed=6))
    batches = answers_of(model, tokenizer, PROMPTS, 20, 4)
    change = predict_in_generations(ahead, iter(batches))["predicted_change_in_generations"]
    feature, step = int(change.abs().argmax()), ahead.step()
    gradient = gradient_in_generations(ahead, feature, lambda: iter(batches))
    along = sum(float((gradient[name] * step[name]).sum()) for name in step)
    assert along == pytest.approx(float(change[feature]), rel=1e-6)
    influence, offset = ahead.influence(gradient)
    assert float(influence.sum()) + offset == pytest.approx(float(change[feature]), rel=1e-6)


def by_hand(answers):
    """The ratio estimate of the change of roots, from the increments and roots of each answer."""
    so_far = torch.cat([each.cumsum(0) for each in centred([increments for increments, _ in answers])])
    roots = torch.cat([values for _, values in answers])
    return so_far @ (roots - roots.mean(0)) / len(roots)


def test_the_interval_is_that_of_leaving_prompts_out_and_of_groups(tokenizer, monkeypatch):
    """The error over prompts is the jackknife's; the effect size is in deviations of answers; groups widen the interval."""
    model, dictionary = make_gpt2(tokenizer), topk()
    prompts = [[5 + n % 40, 9 + n % 13] for n in range(40)]
    batches = answers_of(model, tokenizer, prompts, 4, 6)
    ahead = look(model, tokenizer, dictionary, UpdateRule("adamw", 1e-3, batch_size=2), borders=(2, 4))
    seen = {}

    def recorded(prompt_error, *rest):
        seen["error"] = prompt_error
        return half_width(prompt_error, *rest)

    monkeypatch.setattr(generation_changes, "half_width", recorded)
    found = predict_in_generations(ahead, iter(batches))
    step = ahead.step()
    answers, asked = [], []
    with torch.no_grad():
        for numbers, batch in batches:
            predicted = batch["completion_mask"][:, 1:].bool()
            log_probs = ahead.gradients.log_probs(batch, predicted, batch["input_ids"][:, 1:][predicted])
            lengths = predicted.sum(1).tolist()
            increments = ahead.jvp.derivative(log_probs, step).split(lengths)
            roots = dictionary.encode(ahead.states(batch).hidden).double().sqrt().split(lengths)
            answers += zip(increments, roots, strict=True)
            asked += numbers.tolist()
    change = by_hand(answers)
    deviation = torch.stack([roots.mean(0) for _, roots in answers]).std(0, correction=0)
    known = deviation > 0
    unit = (deviation**2 + (2 * deviation[known].median()) ** 2).sqrt()
    torch.testing.assert_close(found["effect_size"][known], (change / unit)[known])
    assert bool(found["effect_size"][~known].isnan().all())
    n = len(prompts)
    left_out = torch.stack(
        [
            by_hand([each for number, each in zip(asked, answers, strict=True) if number != one])
            for one in range(n)
        ]
    )
    jackknife = ((n - 1) / n * (left_out - left_out.mean(0)).square().sum(0)).sqrt()
    np.testing.assert_allclose(seen["error"][known], jackknife[known], rtol=0.05)
    alone = half_width(seen["error"], np.zeros((2, dictionary.d_sae)), [3, 3], unit.numpy())
    np.testing.assert_allclose(alone[known], 1.96 * (seen["error"] / unit.numpy())[known], rtol=1e-3)
    half = (found["effect_size_high"] - found["effect_size"])[known]
    assert bool((half > torch.from_numpy(alone)[known]).all())  # the groups do not agree


def test_no_answers_are_refused(tokenizer):
    model = make_gpt2(tokenizer)
    with pytest.raises(AuditError, match="no sampled answers"):
        predict_in_generations(look(model, tokenizer, topk(), RULES["sgd"]), iter([]))
