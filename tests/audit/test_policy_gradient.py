"""What a reward teaches: selection, its errors, and the step's effect on generations, by brute force and by GRPO itself."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lookaheads import HOOK, centred, directions, make_gpt2, moved_by
from helpers.rewards import (
    PROTOCOLS,
    answered,
    awaited,
    by_column,
    by_length,
    by_message,
    data,
    never,
    trainer_of,
)
from helpers.worlds import (
    D_MODEL,
    HOOK_POINT,
    make_model,
    make_sae_dictionary,
    make_tokenizer,
    pairs,
    prompts,
    reward_by_length,
)
from trl import GRPOConfig

from trl_sae_audit import Audit, AuditError, LookaheadConfig, audit_preferences
from trl_sae_audit.audit.answers import rewarded_answers
from trl_sae_audit.audit.gradients import AuditPass
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.policy_gradient import sampling_of
from trl_sae_audit.audit.rewards import PolicyGradientLoss
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.rewards import Rewards
from trl_sae_audit.models.sampling import Sampling

SAMPLING = Sampling(answers=4, max_new_tokens=6)


def audited(
    reward: Any, dataset: Any = None, model: Any = None, dictionary: Any = None, **options: Any
) -> Audit:
    tokenizer = make_tokenizer()
    return audit_preferences(
        model or make_model(tokenizer),
        tokenizer,
        data(False, 6) if dataset is None else dataset,
        dictionary or make_sae_dictionary(),
        "policy_gradient",
        reward=reward,
        **({"sampling": SAMPLING, "lookahead": None, "progress": False} | options),
    )


@torch.no_grad()
def activations(model: Any, dictionary: Any, prompt: list[int], answer: list[int]) -> np.ndarray:
    """Of the answer's tokens [tokens, features], by a forward pass of its own."""
    states = model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states[2][0]
    return dictionary.encode(states[len(prompt) :]).double().numpy()


def test_selection_is_the_covariance_of_advantage_and_feature_over_the_answers_to_a_prompt() -> None:
    tokenizer, dictionary = make_tokenizer(), make_sae_dictionary()
    model = make_model(tokenizer)
    audit = audited(by_length, model=model, dictionary=dictionary)
    answers = audit.answers()
    assert len(answers) == 24
    assert list(answers["group"]) == [group for group in range(6) for _ in range(4)]
    read = [
        activations(model, dictionary, tokenizer(row.prompt)["input_ids"], row.completion_ids)
        for row in answers.itertuples()
    ]
    tokens = np.array([len(each) for each in read])
    mean = np.concatenate(read).mean(0)
    shown = np.stack([each.sum(0) for each in read]) - tokens[:, None] * mean
    advantage = answers["advantage"].to_numpy()
    covariance = np.stack(
        [
            sum(
                np.cov(advantage[rows], shown[rows, feature], ddof=0)[0, 1]
                for rows in np.arange(24).reshape(6, 4)
            )
            / 6
            for feature in range(dictionary.d_sae)
        ]
    )
    table = audit.features().set_index("feature").sort_index()
    np.testing.assert_allclose(table["selection"], covariance, rtol=1e-3, atol=1e-5)
    by_prompts = (advantage[:, None] * shown).reshape(6, 4, -1).mean(1)
    np.testing.assert_allclose(
        table["selection_standard_error"], by_prompts.std(0, ddof=1) / 6**0.5, rtol=1e-3, atol=1e-5
    )
    assert table["selection_p_value"].between(0, 1).all()


def test_a_reward_may_change_the_directory_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)

    def runs_code_elsewhere(completions: list[str], **columns: Any) -> list[float]:
        os.chdir(tmp_path / "scratch")
        return reward_by_length(completions)

    audited(runs_code_elsewhere, output_dir="audit").features()
    assert len(Audit.load(tmp_path / "audit").answers())
    assert not any((tmp_path / "scratch").iterdir())


def test_attribution_and_its_error_are_over_prompts() -> None:
    audit = audited(by_length)
    table = audit.features().set_index("feature").sort_index()
    parts = audit.contributions(range(len(table))) * len(audit)
    by_prompts = parts.reshape(6, 4, -1).mean(1)
    np.testing.assert_allclose(table["attribution"], parts.mean(0), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(
        table["standard_error"], by_prompts.std(0, ddof=1) / 6**0.5, rtol=1e-3, atol=1e-5
    )
    assert table["p_value"].min() >= 2 / 2**6  # all signs of six prompts


def test_a_step_of_grpo_itself(tmp_path: Path) -> None:
    """The gradient at the layer of TRL's own loss on a batch of its own, against the audit's pass on the same tokens."""
    trainer = trainer_of(PROTOCOLS["a function of texts"], tmp_path)
    trainer.model.eval()
    rows = [row for row in data(False, n=2) for _ in range(4)]
    made = trainer._generate_and_score_completions(rows)
    lengths = made["completion_mask"].sum(1)
    for loss_type, per_token in (("dapo", False), ("dr_grpo", False), ("grpo", True)):
        trainer.loss_type = loss_type
        trainer.current_gradient_accumulation_steps = 1
        added = torch.zeros(8, 1, D_MODEL, requires_grad=True)
        handle = trainer.model.get_submodule(HOOK_POINT).register_forward_hook(lambda m, a, h, z=added: h + z)
        inputs = {**made, "num_items_in_batch": lengths.sum()}
        with torch.enable_grad():
            loss = trainer.compute_loss(trainer.model, inputs)
        handle.remove()
        (expected,) = torch.autograd.grad(loss, added)
        loss = PolicyGradientLoss(make_tokenizer(), mean_over_tokens=per_token)
        sampled = [
            {
                "prompt": row["prompt"],
                "completion": "",
                "completion_ids": ids[: int(length)].tolist(),
                "advantage": float(advantage),
            }
            for row, ids, length, advantage in zip(
                rows, made["completion_ids"], lengths, made["advantages"], strict=True
            )
        ]
        running = AuditPass(
            trainer.model, resolve_hook_point(trainer.model, HOOK_POINT), make_sae_dictionary(), loss
        )
        found = torch.from_numpy(running.run(loss.tokenize(list(enumerate(sampled))), 3).gradient[:, 0])
        constant = {"dapo": lengths.sum(), "dr_grpo": 8 * trainer.max_completion_length, "grpo": 8}[loss_type]
        torch.testing.assert_close(found, expected[:, 0] * constant, rtol=1e-3, atol=1e-5)


def test_the_lookahead_is_the_change_of_the_sampled_mean_by_a_step(tokenizer: Any) -> None:
    """In float64: gradient of the loss by autograd, then the same answers weighted by how much likelier a moved model finds them."""
    model, dictionary, rate = make_gpt2(tokenizer), directions(), 1e-2
    ahead = LookaheadConfig(
        [dict(row) for row in prompts(3, seed=5)],
        optimizer=UpdateRule("sgd", rate, max_grad_norm=None),
        sampling=Sampling(20, 4),
    )
    dataset = [{"prompt": row["prompt"]} for row in prompts(4)]
    audit = audited(reward_by_length, dataset, model, dictionary, sampling=Sampling(4, 5), lookahead=ahead)
    answers = audit.answers()
    total = 0.0
    for row in answers.itertuples():
        begun = tokenizer(row.prompt)["input_ids"]
        ids = torch.tensor([begun + row.completion_ids])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total = total - row.advantage * log_probs[len(begun) - 1 :].sum() / len(answers)
    names, values = zip(*model.named_parameters(), strict=True)
    step = {name: -rate * g for name, g in zip(names, torch.autograd.grad(total, values), strict=True)}
    for name, value in audit._lookahead.ahead.step().items():
        torch.testing.assert_close(value, step[name], rtol=1e-5, atol=1e-8)

    @torch.no_grad()
    def weighted_mean(policy: Any) -> torch.Tensor:
        generations = audit._lookahead.generations
        ratios, readings = [], []
        for prompt, several in zip(generations.prompts, generations.answers, strict=True):
            for answer in several:
                ids = torch.tensor([[*prompt, *answer]])
                after, before = (
                    each(ids)
                    .logits[0, :-1]
                    .log_softmax(-1)
                    .gather(-1, ids[0, 1:, None])[len(prompt) - 1 :, 0]
                    for each in (policy, model)
                )
                ratios.append(after - before)
                states = model(ids, output_hidden_states=True).hidden_states[2][0, len(prompt) :]
                readings.append(states @ dictionary.directions.to(states).T)
        weights = [ratio.cumsum(0).exp() for ratio in centred(ratios)]
        numerator = torch.stack([w @ values for w, values in zip(weights, readings, strict=True)]).sum(0)
        return numerator / torch.cat(weights).sum()

    h = 1e-3
    expected = (weighted_mean(moved_by(model, step, h)) - weighted_mean(moved_by(model, step, -h))) / (2 * h)
    found = audit.features().set_index("feature").sort_index()["predicted_change_in_generations"].to_numpy()
    assert np.abs(found - expected.numpy()).max() / expected.abs().max() < 1e-3
    assert dictionary.hook_point == HOOK


def test_by_default_it_looks_ahead_to_prompts_held_out() -> None:
    audit = audited(by_length, prompts(12), lookahead=LookaheadConfig(sampling=SAMPLING))
    assert audit.lookahead["held_out"]
    assert audit.lookahead["prompts"] == 3
    assert audit.lookahead["pairs"] == 36
    table = audit.features()
    assert table["effect_size"].abs().is_monotonic_decreasing or table["effect_size"].isna().any()
    assert {"effect_size_low", "selection_q_value", "reinforced", "suppressed"} <= set(table.columns)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_protocol_through_an_audit(name: str) -> None:
    """The rewards that an audit notes are those of the adapter, which is TRL's own call."""
    protocol = PROTOCOLS[name]
    tokenizers = None if protocol.tokenizers is None else protocol.tokenizers()
    args = GRPOConfig(
        "unused",
        reward_weights=protocol.weights,
        num_generations=4,
        max_completion_length=6,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    audit = audited(
        protocol.rewards(),
        data(protocol.conversational),
        reward_tokenizer=tokenizers,
        sampling=None,
        args=args,
    )
    rewards = Rewards(protocol.rewards(), tokenizers, protocol.weights)
    columns = list(data(protocol.conversational))
    rows = [
        {
            **columns[row["group"]],
            "completion": [{"role": "assistant", "content": row["completion"]}]
            if protocol.conversational
            else row["completion"],
            "completion_ids": row["completion_ids"],
        }
        for row in audit.answers().to_dict("records")
    ]
    values = torch.cat([rewards(rows[start : start + 64]) for start in range(0, len(rows), 64)])
    expected = rewards.combine(values)
    np.testing.assert_allclose(audit.answers()["reward"].astype(float), expected, rtol=1e-5, atol=1e-6)
    assert audit.manifest["loss"]["rewards"] == rewards.names
    assert audit.manifest["loss"]["answers_sampled"] == 4


def test_where_there_is_nothing_to_learn(caplog: pytest.LogCaptureFixture) -> None:
    def constant(completions: list[Any], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    for reward, match in (
        (constant, "every prompt's answers have the same reward"),
        (never, "the reward judged no answer"),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            audit = audited(reward, lookahead=LookaheadConfig(sampling=SAMPLING))
        assert match in caplog.text
        assert audit.manifest["loss"]["deciding_prompts"] == 0
        assert audit.lookahead is None
        assert not audit.features()["attribution"].any()
        assert audit.beyond_chance().empty
        assert set(audit.examples([0])["side"]) == {"neither"}
    assert "24 of 24 answers were judged by no reward" in caplog.text


def test_contexts_of_answers_without_an_advantage_are_of_neither_side() -> None:
    def partly(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        """Pays all answers to half of the prompts alike."""
        paid = by_length(completions)
        alike = sorted(set(prompts))[:3]
        return [1.0 if prompt in alike else value for prompt, value in zip(prompts, paid, strict=True)]

    audit = audited(partly)
    advantage = audit.answers()["advantage"].to_numpy()
    assert (advantage == 0).sum() >= 12
    assert (advantage != 0).any()
    contexts = audit.contexts()
    named = {0: "neither", 1: "reinforced", -1: "suppressed"}
    assert [named[int(np.sign(advantage[row]))] for row in contexts["row"]] == contexts["source"].tolist()
    assert set(contexts["source"]) == set(named.values())


def test_given_answers_of_conversations() -> None:
    rows = [
        {**row, "prompt": row["prompt"], "completion": answer}
        for row in data(True, 3)
        for answer in ("w1 w2", [{"role": "assistant", "content": "w3 w40 w2"}])
    ]
    audit = audited(by_message, rows)
    assert list(audit.answers()["group"]) == [0, 0, 1, 1, 2, 2]
    assert audit.answers()["completion_ids"][0][-1] == make_tokenizer().eos_token_id


def test_sampled_answers_keep_their_tokens() -> None:
    """An answer that was cut has no end of sequence, and one that is only that end is an answer too."""
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    found = rewarded_answers(model, tokenizer, prompts(12), Rewards(by_length), Sampling(8, 3)).rows
    ids = [row["completion_ids"] for row in found]
    assert any(tokenizer.eos_token_id not in each for each in ids)
    assert all(len(each) <= 3 for each in ids)
    examples = PolicyGradientLoss(tokenizer).tokenize(list(enumerate(found)))
    assert [example.features["answer"] for example in examples] == ids


def test_it_is_kept_and_goes_on(tmp_path: Path) -> None:
    first = audited(by_length, output_dir=tmp_path / "audit")
    again = audited(awaited, output_dir=tmp_path / "other")
    assert first.answers().equals(again.answers())
    loaded = Audit.load(tmp_path / "audit")
    assert loaded.features().equals(first.features())
    assert loaded.answers().equals(first.answers())
    assert audited(by_length, output_dir=tmp_path / "audit").features().equals(first.features())
    with pytest.raises(AuditError, match="made with another loss"):
        audited(by_column, output_dir=tmp_path / "audit")
    (tmp_path / "audit" / "answers.jsonl").write_text("{}\n")
    with pytest.raises(AuditError, match="its content hash is not the manifest's"):
        Audit.load(tmp_path / "audit").answers()


def test_rows_that_cannot_be_answered() -> None:
    rows: list[Any] = [{"prompt": row["prompt"]} for row in prompts(4)]
    rows[2] = {"prompt": ""}
    with pytest.raises(AuditError, match=r"Row 2 .*has an empty 'prompt'"):
        audited(by_length, rows)
    assert set(audited(by_length, rows, on_bad_row="set_aside").answers()["group"]) == {0, 1, 3}
    rows[2] = {"prompt": " ".join(["w1"] * 125)}
    with pytest.raises(AuditError, match=r"Row 2 .*prompt of 125 tokens, .* needs 3 more .* max_new_tokens"):
        audited(by_length, rows)
    given = [dict(row) for row in answered(False)]
    given[3]["completion"] = ""
    audit = audited(by_length, given, on_bad_row="set_aside")
    assert audit.set_aside == [(3, "has an empty 'completion'")]
    assert list(audit.rows()) == [row for row in range(16) if row != 3]
    given[3]["completion"] = [{"role": "assistant", "content": "w1"}]
    with pytest.raises(AuditError, match="has text as 'prompt' and a list of messages"):
        audited(by_length, given)


def test_by_default_answers_fit_into_the_models_context() -> None:
    """The model has 128 positions, and the default is 128 new tokens."""
    audit = audited(by_length, prompts(2), sampling=None)
    assert audit.answers()["completion_ids"].map(len).max() <= 64
    assert sampling_of(None) == Sampling()


def test_options_that_an_audit_would_not_follow(tmp_path: Path) -> None:
    def of(**options: Any) -> GRPOConfig:
        return GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", **options)

    with pytest.raises(
        AuditError, match=r"top_p is 0\.9; an audit samples from the model's own distribution"
    ):
        audited(by_length, args=of(top_p=0.9))
    with pytest.raises(AuditError, match="loss_type is 'vespo'"):
        audited(by_length, args=of(loss_type="vespo"))
    with pytest.raises(AuditError, match="A reward is for objective='policy_gradient'"):
        audit_preferences(
            make_model(make_tokenizer()), make_tokenizer(), pairs(2), make_sae_dictionary(), reward=by_length
        )

    def broken(completions: list[Any], **columns: Any) -> list[float]:
        return [float("nan")] * len(completions)

    with pytest.raises(AuditError, match="Reward 0 of 'broken' is nan"):
        audited(broken)
