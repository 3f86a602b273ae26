"""Rows, models and options with which there is nothing to audit, each named."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
from helpers.audits import audited, by_feature, config
from helpers.worlds import D_MODEL, HOOK_POINT, make_model, pairs
from peft import PromptTuningConfig, get_peft_model

from trl_sae_audit import AuditError, FeatureDictionary, LookaheadConfig
from trl_sae_audit.models.sampling import Sampling


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
        audited(model, tokenizer, {"train": pairs(2), "test": pairs(2)}, dictionary)


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
    ahead = LookaheadConfig([{"prompt": "w1 w2 "}], sampling=Sampling(2, 3))
    with pytest.raises(AuditError, match=r"Row 1 .*not finite"):
        audited(model, tokenizer, rows, dictionary, lookahead=ahead)
    audit = audited(model, tokenizer, rows, dictionary, on_bad_row="set_aside", lookahead=ahead)
    assert list(audit.rows()) == [0, 2]
    assert np.isfinite(by_feature(audit)["predicted_change_in_generations"]).all()


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
