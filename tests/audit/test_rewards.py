"""Audits of rewards: the policy gradient and reward models, against autograd."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.worlds import (
    D_MODEL,
    HOOK_POINT,
    make_model,
    make_reward_model,
    pairs,
    prompts,
    reward_by_length,
)

from trl_sae_audit import AuditError, FeatureDictionary, audit_preferences, audit_reward_model
from trl_sae_audit.audit.answers import rewarded_answers
from trl_sae_audit.audit.rewards import answer_ids
from trl_sae_audit.models.rewards import Rewards
from trl_sae_audit.models.sampling import Sampling


def given_answers():
    rows = list(pairs(6))
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "completion": row[side], "id": i}
            for i, row in enumerate(rows)
            for side in ("chosen", "rejected")
        ]
    )


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def added_gradient(model, inputs, value):
    """d value(output) / d a vector added at the hook point, one a row."""
    added = torch.zeros(len(inputs["input_ids"]), 1, D_MODEL, requires_grad=True)
    handle = model.get_submodule(HOOK_POINT).register_forward_hook(lambda m, a, hidden: hidden + added)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    return torch.autograd.grad(value(output), added)[0][:, 0]


def test_policy_gradient_against_autograd(tokenizer, dictionary):
    model, data = make_model(tokenizer), given_answers()
    audit = audit_preferences(
        model,
        tokenizer,
        data,
        dictionary,
        "policy_gradient",
        reward=reward_by_length,
        batch_size=5,
        progress=False,
    )
    found = audit.contributions(range(dictionary.d_sae)) * len(audit)
    rewards = np.array(reward_by_length(data["completion"][:]))
    groups = rewards.reshape(6, 2)
    spread = groups.std(1, ddof=1, keepdims=True) + 1e-4
    advantages = ((groups - groups.mean(1, keepdims=True)) / spread).reshape(-1)
    for index, row in enumerate(data):
        prompt, answer = answer_ids(tokenizer, row["prompt"], row["completion"])
        ids = torch.tensor([prompt + answer])

        def loss(output, ids=ids, prompt=prompt, advantage=advantages[index]):
            log_probs = output.logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            return -advantage * log_probs[len(prompt) - 1 :].sum()

        gradient = added_gradient(model, {"input_ids": ids}, loss)
        expected = -(gradient @ dictionary.directions.T)[0].numpy()
        np.testing.assert_allclose(found[index], expected, rtol=1e-4, atol=1e-6)
    table = audit.features()
    assert {"reinforced", "suppressed"} <= set(table.columns)
    np.testing.assert_allclose(
        table["reinforced"] + table["suppressed"], table["attribution"], rtol=1e-3, atol=1e-6
    )
    assert set(audit.examples([0])["side"]) == {"reinforced", "suppressed"}


def test_answers_are_sampled_where_there_are_none(tokenizer, dictionary):
    model = make_model(tokenizer)
    state = torch.get_rng_state()
    sampling = Sampling(answers=3, max_new_tokens=5)
    rows = rewarded_answers(model, tokenizer, prompts(4), Rewards(reward_by_length), sampling).rows
    assert torch.equal(torch.get_rng_state(), state)
    assert len(rows) == 12
    for start in range(0, 12, 3):
        assert sum(row["advantage"] for row in rows[start : start + 3]) == pytest.approx(0, abs=1e-9)
    assert rows == rewarded_answers(model, tokenizer, prompts(4), Rewards(reward_by_length), sampling).rows
    audit = audit_preferences(
        model,
        tokenizer,
        prompts(4),
        dictionary,
        "policy_gradient",
        reward=reward_by_length,
        sampling=sampling,
        progress=False,
    )
    assert len(audit) == 12
    assert not audit.set_aside


def test_a_model_can_be_the_reward(tokenizer, dictionary):
    reward_model, data = make_reward_model(tokenizer), given_answers()
    rewards = Rewards(reward_model, fallback=tokenizer, batch_size=5)
    for row in rewarded_answers(make_model(tokenizer), tokenizer, data, rewards, Sampling()).rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        expected = reward_model(torch.tensor([ids])).logits[0, 0]
        assert row["reward"] == pytest.approx(float(expected), rel=1e-4, abs=1e-6)


def test_what_a_reward_model_pays_for(tokenizer, dictionary):
    model, data = make_reward_model(tokenizer), pairs(7)
    audit = audit_reward_model(model, tokenizer, data, dictionary, batch_size=3, progress=False)
    found = audit.examples(range(dictionary.d_sae))
    for row, example in enumerate(data):
        for side in ("chosen", "rejected"):
            ids = tokenizer(example["prompt"] + example[side] + tokenizer.eos_token, return_tensors="pt")[
                "input_ids"
            ]
            gradient = added_gradient(model, {"input_ids": ids}, lambda output: output.logits[0, 0])
            expected = (gradient @ dictionary.directions.T)[0].numpy() / 7
            mine = found[(found["row"] == row) & (found["side"] == side)]
            np.testing.assert_allclose(mine["attribution"], expected, rtol=1e-4, atol=1e-7)
            assert mine["log_prob"].iloc[0] == pytest.approx(
                float(model(ids).logits[0, 0]), rel=1e-4, abs=1e-6
            )


@pytest.mark.parametrize("known", [None, 5])
def test_a_reward_is_read_before_the_padding_whatever_the_configuration_says(tokenizer, dictionary, known):
    model = make_reward_model(tokenizer)
    expected = audit_reward_model(model, tokenizer, pairs(4), dictionary, progress=False).examples([3])
    model.config.pad_token_id = known
    found = audit_reward_model(model, tokenizer, pairs(4), dictionary, progress=False).examples([3])
    pd.testing.assert_frame_equal(found, expected)
    assert model.config.pad_token_id == known


def test_refusals(tokenizer, dictionary):
    model, data = make_model(tokenizer), given_answers()

    def audited(data=data, **options):
        return audit_preferences(
            model, tokenizer, data, dictionary, "policy_gradient", progress=False, **options
        )

    with pytest.raises(AuditError, match="needs a reward"):
        audited()
    with pytest.raises(AuditError, match="2 rewards for 12 responses"):
        audited(reward=lambda prompts, completions, **columns: [0.0, 1.0])
    with pytest.raises(AuditError, match="no column 'prompt'"):
        audited(Dataset.from_list([{"text": "w1"}]), reward=reward_by_length)
    rows = [dict(row) for row in data]
    rows[1]["completion"] = ""
    with pytest.raises(AuditError, match=r"Row 1 .*empty 'completion'"):
        audited(rows, reward=reward_by_length)
    two = make_reward_model(tokenizer)
    two.config.num_labels = 2
    with pytest.raises(AuditError, match="2 outputs"):
        audit_reward_model(two, tokenizer, pairs(2), dictionary, progress=False)
    with pytest.raises(AuditError, match="no language-modelling head"):
        audit_preferences(make_reward_model(tokenizer), tokenizer, pairs(2), dictionary, progress=False)
    wide = FeatureDictionary(torch.randn(3, D_MODEL + 1), HOOK_POINT, "wide")
    with pytest.raises(AuditError, match="33 dimensions"):
        audit_reward_model(make_reward_model(tokenizer), tokenizer, pairs(2), wide, progress=False)
