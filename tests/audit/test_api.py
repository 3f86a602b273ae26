"""An audit's numbers are those of the callback at step 0, of autograd and of plain loops."""

from __future__ import annotations

import random

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.audits import audited, by_feature, config
from helpers.worlds import (
    D_MODEL,
    HOOK_POINT,
    make_dictionary,
    make_model,
    make_sae_dictionary,
    make_tokenizer,
    pairs,
)
from peft import LoraConfig, get_peft_model
from scipy import stats
from trl import DPOTrainer

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    FeatureDictionary,
    Flag,
    RunRecord,
    audit_preferences,
)
from trl_sae_audit.audit import result
from trl_sae_audit.audit.objectives import PreferenceLoss


def trained(tmp_path, tokenizer, data, dictionary, policy, reference=None, **overrides):
    """What the callback records of the first optimizer step on the whole of `data`."""
    callback = FeatureAttributionCallback(dictionary, tmp_path / "record")
    trainer = DPOTrainer(
        policy,
        reference if reference is not None else make_model(tokenizer),
        args=config(tmp_path, **overrides),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    return RunRecord.load(tmp_path / "record").features().set_index("feature").sort_index()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


LOSSES = [
    {"loss_type": "sigmoid"},
    {"loss_type": "ipo"},
    {"loss_type": "hinge"},
    {"loss_type": "robust", "label_smoothing": 0.2},
    {"loss_type": "exo_pair", "label_smoothing": 0.01},
    {"loss_type": "nca_pair"},
    {"loss_type": "bco_pair"},
    {"loss_type": "sppo_hard"},
    {"loss_type": "apo_zero"},
    {"loss_type": "apo_down"},
    {"loss_type": "discopop"},
    {"loss_type": "sigmoid_norm"},
    {"loss_type": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]},
    {"ld_alpha": 0.5},
    {"f_divergence_type": "js_divergence"},
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(str(value) for value in loss.values()))
def test_attribution_equals_what_the_callback_records_at_step_0(tmp_path, tokenizer, dictionary, loss):
    data, policy, reference = pairs(8), make_model(tokenizer), make_model(tokenizer, seed=5)
    step = trained(tmp_path, tokenizer, data, dictionary, make_model(tokenizer), reference, beta=0.3, **loss)
    args = config(tmp_path, beta=0.3, **loss)
    audit = audited(
        policy, tokenizer, data, dictionary, args=args, ref_model=make_model(tokenizer, seed=5), batch_size=3
    )
    found = by_feature(audit)
    for column in ("attribution", "chosen", "rejected", "standard_error"):
        assert relative(found[column], step[column]) < 1e-5


def test_the_reference_is_the_policy_unless_another_is_given(tmp_path, tokenizer, dictionary):
    data = pairs(8)
    step = trained(tmp_path, tokenizer, data, dictionary, make_model(tokenizer))
    found = by_feature(audited(make_model(tokenizer), tokenizer, data, dictionary))
    assert relative(found["attribution"], step["attribution"]) < 1e-5
    other = audited(
        make_model(tokenizer), tokenizer, data, dictionary, ref_model=make_model(tokenizer, seed=5)
    )
    assert relative(by_feature(other)["attribution"], step["attribution"]) > 1e-2


def test_attribution_equals_the_callback_with_lora(tmp_path, tokenizer, dictionary):
    def adapted():
        torch.manual_seed(3)
        adapters = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return get_peft_model(make_model(tokenizer), adapters)

    data = pairs(8)
    callback = FeatureAttributionCallback(dictionary, tmp_path / "record")
    trainer = DPOTrainer(
        adapted(), args=config(tmp_path), train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    step = RunRecord.load(tmp_path / "record").features().set_index("feature").sort_index()
    found = by_feature(audited(adapted(), tokenizer, data, dictionary))
    assert relative(found["attribution"], step["attribution"]) < 1e-5


def test_gradient_of_an_example_is_that_of_a_vector_added_at_the_hook_point(model, tokenizer, dictionary):
    """Written out for the sigmoid loss, with no TRL and no hook of ours in sight."""
    data = pairs(5)
    audit = audited(model, tokenizer, data, dictionary, args=None, batch_size=2)
    loss = PreferenceLoss(tokenizer)
    found = audit.contributions(range(dictionary.d_sae)) * len(data)
    for place, example in enumerate(loss.tokenize(list(enumerate(data)))):
        batch = loss.collate([example])
        added = torch.zeros(2, 1, D_MODEL, requires_grad=True)
        handle = model.get_submodule(HOOK_POINT).register_forward_hook(lambda m, a, h, added=added: h + added)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        handle.remove()
        log_probs = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        sums = (log_probs * batch["completion_mask"][:, 1:]).sum(1)
        margin = (sums - sums.detach())[0] - (sums - sums.detach())[1]
        (gradient,) = torch.autograd.grad(-torch.nn.functional.logsigmoid(0.1 * margin), added)
        expected = -(gradient.sum(0)[0] @ dictionary.directions.T)
        assert relative(found[place], expected.numpy()) < 1e-5


@pytest.mark.parametrize("loss", [{"loss_type": "ipo"}, {"ld_alpha": 0.5}], ids=str)
def test_selection_equals_what_the_callback_records_at_step_0(tmp_path, tokenizer, loss):
    """One formula: with all pairs in one step, and with weights that differ along an answer."""
    data, dictionary = pairs(7), make_sae_dictionary()
    reference = make_model(tokenizer, seed=3)
    options = {"per_device_train_batch_size": 7, "max_steps": 1, **loss}
    record = trained(tmp_path, tokenizer, data, dictionary, make_model(tokenizer), reference, **options)
    audit = by_feature(
        audited(
            *(make_model(tokenizer), tokenizer, data, dictionary),
            ref_model=reference,
            args=config(tmp_path / "audit", **options),
            part_size=3,
        )
    )
    assert np.abs(record["selection"]).max() > 0
    for column in ("selection", "selection_standard_error"):
        assert relative(audit[column], record[column]) < 1e-4, column


def test_the_result_does_not_depend_on_how_the_data_is_cut(model, tokenizer, dictionary):
    data = pairs(21)
    one = by_feature(audited(model, tokenizer, data, dictionary, batch_size=21))
    other = by_feature(audited(model, tokenizer, data, dictionary, batch_size=2, part_size=5))
    for column in one.columns.drop(["dictionary", "words", "label"]):
        np.testing.assert_allclose(one[column], other[column], rtol=2e-4, atol=1e-6, err_msg=column)


def test_activation_statistics_against_a_plain_loop(model, tokenizer):
    class Relu:
        def __init__(self, directions):
            self.directions = directions

        def encode(self, hidden):
            return torch.relu(hidden @ self.directions.T - 0.2)

        def output_scale(self, hidden):
            return torch.full_like(hidden[..., :1], 1.5)

    raw = make_dictionary()
    dictionary = FeatureDictionary(
        raw.directions * torch.rand(len(raw.directions), 1), HOOK_POINT, "relu", encoder=Relu(raw.directions)
    )
    data = pairs(6)
    audit = audited(model, tokenizer, data, dictionary, batch_size=4)
    loss = PreferenceLoss(tokenizer)
    active, means, extremes, residuals, encoded = ([], []), ([], []), ([], []), ([], []), ([], [])
    for example in loss.tokenize(list(enumerate(data))):
        batch = loss.collate([example])
        states = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[2]
        for side in (0, 1):
            activations = dictionary.encode(states[side][batch["completion_mask"][side].bool()].detach())
            encoded[side].append(activations.double())
            active[side].append((activations > 0).any(0).float())
            means[side].append(activations.mean(0))
            extremes[side].append(activations.amax(0))
            residuals[side].append(states[side][batch["completion_mask"][side].bool()].detach().mean(0))
    found = by_feature(audit)

    def gap(values):
        return (torch.stack(values[0]).mean(0) - torch.stack(values[1]).mean(0)).numpy()

    np.testing.assert_allclose(found["disparity"], gap(active), atol=1e-6)
    np.testing.assert_allclose(found["mean_activation_difference"], gap(means), atol=1e-5)
    np.testing.assert_allclose(found["max_activation_difference"], gap(extremes), atol=1e-5)
    direction = torch.stack(residuals[0]).mean(0) - torch.stack(residuals[1]).mean(0)
    np.testing.assert_allclose(
        found["projection_difference"], (dictionary.directions @ direction).numpy(), rtol=1e-4, atol=1e-5
    )
    # at the first step DPO weighs a token of the chosen answer by β/2 and of the rejected one by as much the other way
    every = torch.cat([tokens for side in encoded for tokens in side])
    sums = [torch.stack([(tokens - every.mean(0)).sum(0) for tokens in side]) for side in encoded]
    selected = 0.05 * (sums[0] - sums[1]).double().numpy()
    np.testing.assert_allclose(found["selection"], selected.mean(0), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(
        found["selection_standard_error"], selected.std(0, ddof=1) / np.sqrt(6), rtol=1e-4, atol=1e-7
    )
    exact = stats.permutation_test(
        (selected,), lambda x, axis: x.sum(axis), permutation_type="samples", n_resamples=np.inf
    ).pvalue
    assert (found["selection_p_value"] >= exact - 1e-9).all()
    z = np.abs(selected.sum(0)) / np.sqrt((selected**2).sum(0))
    np.testing.assert_allclose(
        found["selection_p_value"], np.minimum(1, 3.178 * 2 * stats.norm.sf(z)), rtol=1e-3
    )
    assert 0 < found["chosen_active"].mean() < 1
    examples = audit.examples([7])
    assert examples["activation_attribution"].sum() == pytest.approx(
        found["activation_attribution"][7], rel=1e-4
    )
    gaps = audit.activation_gaps([7])[:, 0]
    np.testing.assert_allclose(gaps.mean(), found["mean_activation_difference"][7], rtol=1e-4, atol=1e-7)


def test_activation_attribution_is_the_callbacks(tmp_path, tokenizer, dictionary):
    data = pairs(8)
    callback = FeatureAttributionCallback(dictionary, tmp_path / "record", token_scores=True)
    trainer = DPOTrainer(
        make_model(tokenizer),
        make_model(tokenizer),
        args=config(tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    step = RunRecord.load(tmp_path / "record").features().set_index("feature").sort_index()
    found = by_feature(audited(make_model(tokenizer), tokenizer, data, dictionary))
    assert relative(found["activation_attribution"], step["activation_attribution"]) < 1e-5


def test_examples_add_up_to_the_feature_and_name_their_rows(model, tokenizer, dictionary):
    audit = audited(model, tokenizer, pairs(9), dictionary, part_size=4)
    rows = audit.examples([3, 70])
    assert len(rows) == 9 * 2 * 2
    assert sorted(rows["row"].unique()) == list(range(9))
    sums = rows.groupby("feature")["attribution"].sum()
    table = by_feature(audit)
    for feature in (3, 70):
        assert sums[feature] == pytest.approx(table["attribution"][feature], rel=1e-4)
        chosen = rows[(rows["feature"] == feature) & (rows["side"] == "chosen")]["attribution"].sum()
        assert chosen == pytest.approx(table["chosen"][feature], rel=1e-4)
    with pytest.raises(AuditError, match="features 0 to 95"):
        audit.examples([96])


def test_the_model_the_tokenizer_and_the_seeds_are_left_alone(tokenizer, dictionary):
    model = make_model(tokenizer).train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    needs = {name: value.requires_grad for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    audited(model, tokenizer, pairs(4), dictionary)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])
    assert tokenizer.pad_token is None
    assert {name: value.requires_grad for name, value in model.named_parameters()} == needs
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None for value in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert "forward" not in vars(model.model)


def as_messages(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def implicit(row):
    return {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]}


LAYOUTS = {
    "plain": lambda row: row,
    "plain implicit": implicit,
    "conversational": as_messages,
    "conversational implicit": lambda row: implicit(as_messages(row)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_the_trainer_trains_on(tmp_path, tokenizer, layout):
    data = Dataset.from_list([LAYOUTS[layout](row) for row in pairs(6)])
    args = config(tmp_path, max_length=9)
    trainer = DPOTrainer(
        make_model(tokenizer),
        make_model(tokenizer),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    examples = PreferenceLoss(tokenizer, args).tokenize(list(enumerate(data)))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    expected = [{name: row[name] for name in names} for row in trainer.train_dataset]
    assert [{name: example.features[name] for name in names} for example in examples] == expected
    ours = PreferenceLoss(tokenizer, args).collate(examples)
    theirs = trainer.data_collator(list(trainer.train_dataset))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_many_directions_without_an_encoder_are_kept_as_sums(model, tokenizer, caplog):
    """64 kB a pair at most, however many there are; and said."""
    directions = torch.randn(3000, D_MODEL, generator=torch.Generator().manual_seed(0))
    dictionary = FeatureDictionary(directions, HOOK_POINT, "many")
    audit = audited(model, tokenizer, pairs(4), dictionary)
    assert "keeps sums over answers alone" in caplog.text
    size = sum(path.stat().st_size for path in (audit.directory / "parts").iterdir())
    assert size < 4 * 2**16
    table = audit.features()
    assert table["projection_difference"].abs().max() > 0
    assert "selection" not in table
    with pytest.raises(AuditError, match="no activations"):
        audit.activation_gaps([3])


def test_the_table_is_built_once_and_a_change_of_it_stays_with_whoever_made_it(
    model, tokenizer, dictionary, monkeypatch
):
    built = []
    plain = result.known_statistics
    monkeypatch.setattr(result, "known_statistics", lambda *args: built.append(args) or plain(*args))
    audit = audited(model, tokenizer, pairs(4), dictionary)
    first = audit.features()
    before = first.copy()
    first["attribution"] = 0.0
    del first["words"]
    for read in (audit.ranking, audit.beyond_chance, audit.leads_with):
        read()
    pd.testing.assert_frame_equal(audit.features(), before)
    assert len(built) == 1


@pytest.mark.parametrize(
    "adapted",
    [
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [5, 6]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ],
    ids=["lora", "tokens", "copy"],
)
def test_adapters_around_the_embeddings(tokenizer, dictionary, adapted):
    model = get_peft_model(make_model(tokenizer), LoraConfig(r=2, task_type="CAUSAL_LM", **adapted))
    expected = audited(make_model(tokenizer), tokenizer, pairs(4), dictionary)
    found = audited(model, tokenizer, pairs(4), dictionary)  # before a step, adapters change nothing
    assert relative(by_feature(found)["attribution"], by_feature(expected)["attribution"]) < 1e-5


@pytest.mark.parametrize(
    "around",
    [
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
    ],
    ids=["inference", "no_grad", "autocast"],
)
def test_whatever_a_notebook_has_switched_on(tokenizer, around):
    model, dictionary = make_model(tokenizer), make_sae_dictionary()
    expected = audit_preferences(model, tokenizer, pairs(8), dictionary, progress=False)
    with around():
        found = audit_preferences(model, tokenizer, pairs(8), dictionary, progress=False)
    assert found.features().equals(expected.features())
    assert found.influence([Flag("tiny", 3)]).equals(expected.influence([Flag("tiny", 3)]))


def test_another_default_type(tokenizer):
    model, dictionary = make_model(tokenizer), make_sae_dictionary()
    expected = audit_preferences(model, tokenizer, pairs(8), dictionary, progress=False).features()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = audit_preferences(model, tokenizer, pairs(8), dictionary, progress=False).features()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.equals(expected)


def test_a_model_made_in_inference_mode_is_refused(tokenizer, dictionary):
    with torch.inference_mode():
        model = make_model(tokenizer)
    with pytest.raises(AuditError, match="load it outside"):
        audit_preferences(model, tokenizer, pairs(4), dictionary, progress=False)
