"""Rows and texts from strangers: each bad one is named or set aside, the odd ones are audited and trained on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from datasets import Dataset
from helpers.worlds import make_dictionary, make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import AuditError, FeatureAttributionCallback, Flag, FlagSet, RunRecord, audit_preferences
from trl_sae_audit.data.texts import read_texts


def said(role, content):
    return [{"role": role, "content": content}]


GOOD = {"prompt": "w1 w2 ", "chosen": "w3 w4", "rejected": "w5"}
CHAT = {"prompt": said("user", "w1"), "chosen": said("assistant", "w2"), "rejected": said("assistant", "w3")}
BAD_ROWS = {
    "halves of surrogates": (GOOD | {"chosen": "w1 \ud83d"}, "characters that are no text"),
    "empty": (GOOD | {"rejected": " \n"}, "has an empty 'rejected'"),
    "a number": (GOOD | {"chosen": 3}, "neither text nor a list of messages"),
    "none": (GOOD | {"rejected": None}, "has no 'rejected'"),
    "nested lists": (GOOD | {"prompt": [["w1"]]}, "neither text nor a list of messages"),
    "mixed formats": (GOOD | {"chosen": said("assistant", "w1")}, "mixes text and lists of messages"),
    "another layout": (CHAT, "is conversational, unlike the rows before it"),
    "pictures": (GOOD | {"images": ["x.png"]}, "has pictures"),
    "a long text": (GOOD | {"prompt": "w1 " * 6_000_000}, "of 18,000,000 characters"),
    "no prompt": ({"chosen": "w1", "rejected": "w2"}, "has no prompt, unlike the rows before it"),
}
BAD_CHATS = {
    "a role that is none": (CHAT | {"chosen": [{"role": 3, "content": "w1"}]}, "a message whose role is 3"),
    "content that is no text": (CHAT | {"prompt": said("user", {"a": 1})}, "content is not text"),
    "a picture in it": (CHAT | {"prompt": said("user", [{"type": "image"}])}, "content is not text"),
}
HARMLESS = [
    GOOD,
    GOOD,  # twice
    GOOD | {"rejected": GOOD["chosen"]},
    GOOD | {"prompt": "w1\0 w2 \x1b[31m ", "chosen": "\u202ew3"},
    GOOD | {"prompt": "w1 " * 33_334},  # 100,000 characters
]


@pytest.fixture(scope="module")
def strangers(model, tokenizer, dictionary, tmp_path_factory):
    """An audit of rows of every kind, the bad ones set aside."""
    rows = [*HARMLESS, *(row for row, _ in BAD_ROWS.values())]
    args = DPOConfig("unused", max_length=64, truncation_mode="keep_start", bf16=False, report_to="none")
    directory = tmp_path_factory.mktemp("strangers") / "audit"
    audit = audit_preferences(
        model,
        tokenizer,
        rows,
        dictionary,
        args=args,
        on_bad_row="set_aside",
        progress=False,
        output_dir=directory,
    )
    return rows, audit


def test_bad_rows_are_set_aside_each_with_its_reason(strangers):
    _, audit = strangers
    reasons = dict(audit.set_aside)
    for number, (name, (_, words)) in enumerate(BAD_ROWS.items(), len(HARMLESS)):
        assert words in reasons[number], name
    assert set(audit.rows()) <= set(range(len(HARMLESS)))
    assert np.isfinite(audit.features()["attribution"]).all()


def test_bad_rows_are_filtered_out(strangers, tmp_path):
    from trl_sae_audit import filter_preferences

    rows, audit = strangers
    result = filter_preferences(rows, audit, FlagSet([Flag("tiny", 3)]), budget=1, on_bad_row="set_aside")
    assert len(result.kept) + len(result.dropped) == len(rows)
    result.save(tmp_path / "out")


@pytest.mark.parametrize("name", [*BAD_ROWS, *BAD_CHATS])
def test_a_bad_row_stops_an_audit_with_a_sentence(model, tokenizer, dictionary, name):
    row, words = (BAD_ROWS | BAD_CHATS)[name]
    first = CHAT if name in BAD_CHATS else GOOD
    with pytest.raises(AuditError, match="Row 1 of the dataset") as error:
        audit_preferences(model, tokenizer, [first, row], dictionary, lookahead=None, progress=False)
    assert words in str(error.value)


def test_a_role_that_the_template_refuses_names_the_row(model, dictionary):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ message.content }} {% endfor %}"
    )
    with pytest.raises(AuditError, match=r"Row 1 .*roles must alternate"):
        audit_preferences(
            model, tokenizer, [CHAT, CHAT | {"prompt": said("wizard", "w1")}], dictionary, progress=False
        )


def test_rows_of_different_kinds_are_named(model, tokenizer, dictionary):
    other = CHAT | {"prompt": said("user", [{"type": "text", "text": "w1"}])}
    with pytest.raises(AuditError, match=r"Rows 0 to 1 of the dataset .* of different kinds"):
        audit_preferences(model, tokenizer, [CHAT, other], dictionary, lookahead=None, progress=False)


@pytest.mark.parametrize(
    ("rows", "words"), [([], "empty"), ([{"text": "w1"}], "no column 'chosen'"), (["w1"], "not a mapping")]
)
def test_datasets_that_hold_no_pairs(model, tokenizer, dictionary, rows, words):
    with pytest.raises(AuditError, match=words):
        audit_preferences(model, tokenizer, rows, dictionary, lookahead=None, progress=False)


def test_texts_of_doctor_and_train_sae_are_held_to_the_same(tmp_path):
    tokenizer = make_tokenizer()
    for row, words in (
        ({"text": "\ud83d"}, "surrogate"),
        ({"text": {"a": 1}}, "holds something else"),
        ({"messages": [["x"]]}, "holds something else"),
        ({"n": 3}, "none of which is known"),
    ):
        (tmp_path / "texts.jsonl").write_text(json.dumps(row) + "\n")
        with pytest.raises(AuditError, match=words):
            read_texts(tmp_path / "texts.jsonl", tokenizer)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "w1\0 \x1b[2J"}) + "\n")
    assert read_texts(tmp_path / "texts.jsonl", tokenizer) == ["w1\0 \x1b[2J"]


def test_the_callback_lives_through_rows_of_strangers(tmp_path):
    tokenizer = make_tokenizer()
    callback = FeatureAttributionCallback(
        make_dictionary(), output_dir=tmp_path / "record", watch={"\x1b[31mx": 3}
    )
    args = DPOConfig(
        str(tmp_path / "out"), max_length=64, per_device_train_batch_size=1, max_steps=5, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    data = Dataset.from_list(HARMLESS)
    model, reference = make_model(tokenizer), make_model(tokenizer)
    trainer = DPOTrainer(
        model, reference, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[callback]
    )
    trainer.train()
    features = RunRecord.load(tmp_path / "record").features()
    assert np.isfinite(features["attribution"]).all()
    assert (features["attribution"] != 0).any()
