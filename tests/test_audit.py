"""The audit of a preference set: exact against training, the same however it is cut, and plain about bad input."""

from __future__ import annotations

import json
import logging
import random

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl import DPOConfig, DPOTrainer
from worlds import D_MODEL, HOOK_POINT, make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import AuditError, FeatureAttributionCallback, FeatureDictionary, RunRecord
from trl_sae_audit.audit import audit_preferences
from trl_sae_audit.audit_result import Audit
from trl_sae_audit.objectives import PreferenceLoss


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture(scope="module")
def dictionary():
    return make_dictionary()


def config(tmp_path, **overrides):
    settings = {"per_device_train_batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "bf16": False}
    settings |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
    return DPOConfig(str(tmp_path / "out"), **(settings | overrides))


def by_feature(audit):
    return audit.features().set_index("feature").sort_index()


def audited(model, tokenizer, data, dictionary, **options):
    return audit_preferences(model, tokenizer, data, dictionary, progress=False, **options)


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


def test_the_result_does_not_depend_on_how_the_data_is_cut(model, tokenizer, dictionary):
    data = pairs(21)
    one = by_feature(audited(model, tokenizer, data, dictionary, batch_size=21))
    other = by_feature(audited(model, tokenizer, data, dictionary, batch_size=2, part_size=5))
    for column in one.columns.drop("dictionary"):
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
    active, means, extremes = ([], []), ([], []), ([], [])
    for example in loss.tokenize(list(enumerate(data))):
        batch = loss.collate([example])
        states = model(
            batch["input_ids"], attention_mask=batch["attention_mask"], output_hidden_states=True
        ).hidden_states[2]
        for side in (0, 1):
            activations = dictionary.encode(states[side][batch["completion_mask"][side].bool()].detach())
            active[side].append((activations > 0).any(0).float())
            means[side].append(activations.mean(0))
            extremes[side].append(activations.amax(0))
    found = by_feature(audit)

    def gap(values):
        return (torch.stack(values[0]).mean(0) - torch.stack(values[1]).mean(0)).numpy()

    np.testing.assert_allclose(found["disparity"], gap(active), atol=1e-6)
    np.testing.assert_allclose(found["mean_activation_difference"], gap(means), atol=1e-5)
    np.testing.assert_allclose(found["max_activation_difference"], gap(extremes), atol=1e-5)
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


# Every layout that TRL reads


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


def test_every_kind_of_source_gives_the_same_audit(tmp_path, model, tokenizer, dictionary):
    data = pairs(7)
    data.save_to_disk(tmp_path / "disk")
    data.to_parquet(tmp_path / "data.parquet")
    data.to_json(tmp_path / "data.jsonl")
    expected = by_feature(audited(model, tokenizer, data, dictionary))
    hashes = set()
    for source in (
        data.to_iterable_dataset(),
        list(data),
        tmp_path / "disk",
        str(tmp_path / "data.parquet"),
        tmp_path / "data.jsonl",
    ):
        audit = audited(model, tokenizer, source, dictionary)
        hashes.add(audit.manifest["dataset_sha256"])
        assert by_feature(audit).equals(expected)
    assert len(hashes) == 1


# On disk


def test_an_audit_is_saved_and_read_back(tmp_path, model, tokenizer, dictionary):
    audit = audited(model, tokenizer, pairs(6), dictionary)
    audit.save(tmp_path / "audit")
    again = Audit.load(tmp_path / "audit")
    assert again.features().equals(audit.features())
    assert again.examples([5]).equals(audit.examples([5]))
    assert again.dictionary.identity == dictionary.identity
    temporary = audit.directory
    with pytest.raises(AuditError, match="exists already"):
        audit.save(tmp_path / "audit")
    del audit
    assert not temporary.exists()


def test_an_interrupted_audit_goes_on_where_it_stopped(tmp_path, monkeypatch, model, tokenizer, dictionary):
    data = pairs(12)
    options = {"part_size": 3, "output_dir": tmp_path / "audit"}
    whole = audited(model, tokenizer, data, dictionary, part_size=3)
    from trl_sae_audit.audit_pass import AuditPass

    run, calls = AuditPass.run, []

    def interrupted(self, examples, batch_size):
        calls.append(len(examples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, examples, batch_size)

    monkeypatch.setattr(AuditPass, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited(model, tokenizer, data, dictionary, **options)
    with pytest.raises(AuditError, match="interrupted"):
        Audit.load(tmp_path / "audit")
    resumed = audited(model, tokenizer, data, dictionary, **options)
    assert len(calls) == 5
    assert resumed.features().equals(whole.features())
    calls.clear()
    audited(model, tokenizer, data, dictionary, **options)
    assert calls == []
    with pytest.raises(AuditError, match="another dataset: it differs from row 0"):
        audited(model, tokenizer, pairs(12, seed=1), dictionary, **options)
    with pytest.raises(AuditError, match="another dataset: it differs from row 12"):
        audited(model, tokenizer, pairs(13), dictionary, **options)
    with pytest.raises(AuditError, match="another dictionary"):
        audited(model, tokenizer, data, make_dictionary(seed=9), **options)
    with pytest.raises(AuditError, match="another model fingerprint"):
        audited(make_model(tokenizer, seed=4), tokenizer, data, dictionary, **options)


def test_an_audit_of_another_time_or_a_damaged_one_is_refused(tmp_path, model, tokenizer, dictionary):
    audited(model, tokenizer, pairs(4), dictionary, output_dir=tmp_path / "audit")
    part = tmp_path / "audit" / "parts" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(AuditError, match="cannot be read"):
        Audit.load(tmp_path / "audit").features()
    manifest = tmp_path / "audit" / "manifest.json"
    manifest.write_text(json.dumps({"schema": 99, "status": "finished"}))
    with pytest.raises(AuditError, match="schema version 99"):
        Audit.load(tmp_path / "audit")
    manifest.write_text("{")
    with pytest.raises(AuditError, match="damaged"):
        Audit.load(tmp_path / "audit")
    with pytest.raises(AuditError, match="holds no audit"):
        Audit.load(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(AuditError, match="not empty"):
        audited(model, tokenizer, pairs(4), dictionary, output_dir=tmp_path / "full")


def test_a_full_disk_stops_the_audit_with_a_sentence_and_it_goes_on_later(
    tmp_path, monkeypatch, model, tokenizer, dictionary
):
    from trl_sae_audit import audit_store

    write, calls = audit_store.write_durably, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(audit_store, "write_durably", full)
    options = {"part_size": 2, "output_dir": tmp_path / "audit"}
    with pytest.raises(AuditError, match="No space left"):
        audited(model, tokenizer, pairs(8), dictionary, **options)
    resumed = audited(model, tokenizer, pairs(8), dictionary, **options)
    assert resumed.features().equals(audited(model, tokenizer, pairs(8), dictionary, part_size=2).features())


# Bad input


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chosen": ""}, "empty 'chosen'"),
        ({"chosen": "  "}, "empty 'chosen'"),
        ({"rejected": None}, "no 'rejected'"),
        ({"rejected": 3}, "neither text nor"),
        ({"prompt": 3}, "'prompt' that is neither"),
        ({"chosen": [{"role": "assistant", "content": "w1"}]}, "mixes text and lists"),
        ({"prompt": None}, "no prompt, unlike"),
    ],
)
def test_a_bad_row_is_named_or_set_aside(model, tokenizer, dictionary, change, words):
    rows = list(pairs(5))
    rows[3] = rows[3] | change
    with pytest.raises(AuditError, match=f"Row 3 of the dataset .*{words}"):
        audited(model, tokenizer, rows, dictionary)
    audit = audited(model, tokenizer, rows, dictionary, on_bad_row="set_aside")
    assert [row for row, _ in audit.set_aside] == [3]
    assert len(audit) == 4
    assert list(audit.rows()) == [0, 1, 2, 4]
    good = audited(model, tokenizer, [rows[i] for i in (0, 1, 2, 4)], dictionary)
    assert by_feature(audit)["attribution"].equals(by_feature(good)["attribution"])


def test_missing_columns_are_named(model, tokenizer, dictionary):
    with pytest.raises(AuditError, match=r"no column 'chosen' and no column 'rejected', but \['question'\]"):
        audited(model, tokenizer, [{"question": "w1"}], dictionary)
    with pytest.raises(AuditError, match="empty"):
        audited(model, tokenizer, [], dictionary)
    with pytest.raises(AuditError, match="several splits"):
        audited(model, tokenizer, {"train": pairs(2)}, dictionary)


def test_a_damaged_line_is_a_bad_row(tmp_path, model, tokenizer, dictionary):
    lines = [json.dumps(row) for row in pairs(4)]
    (tmp_path / "data.jsonl").write_text("\n".join([*lines[:2], '{"prompt": "w1', *lines[2:]]) + "\n")
    with pytest.raises(AuditError, match=r"Row 2 of the dataset .*not valid JSON"):
        audited(model, tokenizer, tmp_path / "data.jsonl", dictionary)
    audit = audited(model, tokenizer, tmp_path / "data.jsonl", dictionary, on_bad_row="set_aside")
    assert list(audit.rows()) == [0, 1, 3, 4]


def test_answers_beyond_the_context(tmp_path, caplog, model, tokenizer, dictionary):
    rows = list(pairs(4))
    rows[1] = rows[1] | {"chosen": "w1 " * 200}
    with pytest.raises(AuditError, match=r"Row 1 .*model's context has 128"):
        audited(model, tokenizer, rows, dictionary)
    with caplog.at_level(logging.WARNING):
        audited(model, tokenizer, rows, dictionary, args=config(tmp_path, max_length=64))
    assert "1 of 4 rows are longer than max_length" in caplog.text
    rows[1] = rows[1] | {"prompt": "w1 " * 80}
    audit = audited(model, tokenizer, rows, dictionary, args=config(tmp_path, max_length=64))
    assert audit.set_aside == [(1, "has a prompt that alone fills max_length, so TRL drops it")]


def test_duplicate_and_identical_rows_are_counted_aloud(caplog, model, tokenizer, dictionary):
    rows = list(pairs(5))
    rows += [rows[2], rows[0] | {"rejected": rows[0]["chosen"]}]
    with caplog.at_level(logging.WARNING):
        audit = audited(model, tokenizer, rows, dictionary)
    assert "1 of 7 rows are exact duplicates" in caplog.text
    assert "1 of 7 rows have the same text" in caplog.text
    contributions = audit.contributions([0, 1])
    np.testing.assert_allclose(contributions[6], 0, atol=1e-8)
    np.testing.assert_allclose(contributions[5], contributions[2], rtol=1e-4)
    with pytest.raises(AuditError, match="same text"):
        audited(model, tokenizer, [{"chosen": "w1", "rejected": "w1"}], dictionary)


def test_a_loss_that_is_not_finite_names_the_row(tokenizer, dictionary):
    model = make_model(tokenizer)
    rows = [row | {"prompt": "w1", "chosen": "w2 w3", "rejected": "w3 w2"} for row in pairs(3)]
    rows[1] = rows[1] | {"chosen": "w2 w59"}
    with torch.no_grad():
        model.model.embed_tokens.weight[tokenizer.convert_tokens_to_ids("w59")] = torch.nan
    with pytest.raises(AuditError, match=r"Row 1 .*not finite"):
        audited(model, tokenizer, rows, dictionary)
    audit = audited(model, tokenizer, rows, dictionary, on_bad_row="set_aside")
    assert list(audit.rows()) == [0, 2]
    assert np.isfinite(by_feature(audit)["attribution"]).all()


def test_options_that_make_no_sense(tmp_path, model, tokenizer, dictionary):
    data = pairs(2)
    for loss in ("aot", "sft"):
        with pytest.raises(AuditError, match="no loss of its own"):
            audited(model, tokenizer, data, dictionary, args=config(tmp_path, loss_type=loss))
    with pytest.raises(AuditError, match="TRL refuses"):
        audited(model, tokenizer, data, dictionary, args=config(tmp_path, loss_type="exo_pair"))
    with pytest.raises(AuditError, match="batch_size is 0"):
        audited(model, tokenizer, data, dictionary, batch_size=0)
    with pytest.raises(AuditError, match="on_bad_row"):
        audited(model, tokenizer, data, dictionary, on_bad_row="ignore")
    with pytest.raises(AuditError, match="objective"):
        audited(model, tokenizer, data, dictionary, objective="ppo")
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(AuditError, match="prompt learning"):
        audited(get_peft_model(make_model(tokenizer), virtual), tokenizer, data, dictionary)
    wide = FeatureDictionary(torch.randn(4, D_MODEL + 1), HOOK_POINT, "wide")
    with pytest.raises(AuditError, match="33 dimensions"):
        audited(model, tokenizer, data, wide)
