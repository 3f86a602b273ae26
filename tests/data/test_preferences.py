"""Layouts that TRL takes and refuses are taken and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from helpers.worlds import make_dictionary, make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import AuditError, audit_preferences
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.data.preferences import PairCheck
from trl_sae_audit.data.texts import read_texts


def said(*texts: str) -> list[dict[str, str]]:
    roles = ("user", "assistant") if len(texts) == 2 else ("assistant",)
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


ULTRAFEEDBACK = {"prompt": "w1 w2", "chosen": said("w1 w2", "w3"), "rejected": said("w1 w2", "w4")}
LAYOUTS: dict[str, tuple[dict[str, Any], str | None]] = {
    "text": ({"prompt": "w1", "chosen": "w2", "rejected": "w3"}, None),
    "messages": ({"prompt": said("w1"), "chosen": said("w2"), "rejected": said("w3")}, None),
    "implicit prompt": ({side: ULTRAFEEDBACK[side] for side in ("chosen", "rejected")}, None),
    "ultrafeedback_binarized": (ULTRAFEEDBACK, "they begin with the prompt, so remove the column 'prompt'"),
    "text and answers as messages": (
        ULTRAFEEDBACK | {"chosen": said("w3"), "rejected": said("w4")},
        "mixes text and lists of messages",
    ),
}


def trained_by_trl(row: dict[str, Any], directory: Path) -> bool:
    tokenizer = make_tokenizer()
    args = DPOConfig(str(directory), bf16=False, use_cpu=True, report_to="none")
    models = make_model(tokenizer), make_model(tokenizer)
    try:
        DPOTrainer(*models, args=args, train_dataset=Dataset.from_list([row]), processing_class=tokenizer)
    except (AttributeError, TypeError):  # which one depends on the hash of the columns' names
        return False
    return True


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path) -> None:
    row, problem = LAYOUTS[layout]
    (found,) = (PairCheck()(each) for each in iterate_rows([row]))
    assert (found is None) == (problem is None) == trained_by_trl(row, tmp_path)
    assert (problem or "") in (found or "")
    assert ("remove the column" in (found or "")) == (layout == "ultrafeedback_binarized")


def test_the_way_out_is_one(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    parts = make_model(tokenizer), tokenizer
    data = Dataset.from_list([ULTRAFEEDBACK, ULTRAFEEDBACK])
    with pytest.raises(
        AuditError, match=r"Row 0 of the dataset .* so remove the column 'prompt' from the dataset"
    ):
        audit_preferences(*parts, data, make_dictionary(), lookahead=None, progress=False)
    assert (
        len(
            audit_preferences(
                *parts, data.remove_columns("prompt"), make_dictionary(), lookahead=None, progress=False
            )
        )
        == 2
    )


def test_a_prompt_that_the_messages_hold_is_not_repeated() -> None:
    tokenizer = make_tokenizer()
    assert read_texts([ULTRAFEEDBACK], tokenizer) == ["w1 w2 w3 ", "w1 w2 w4 "]
    assert read_texts([LAYOUTS["text and answers as messages"][0]], tokenizer) == ["w1 w2 w3 ", "w1 w2 w4 "]
