"""Texts from every kind of file, and the windows that a model reads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from helpers.sae_training import CHAT_TEMPLATE
from helpers.worlds import WORDS, make_tokenizer

from trl_sae_audit import AuditError
from trl_sae_audit.data.texts import read_texts
from trl_sae_audit.models.residual_stream import token_windows

PAIR = {"prompt": "w1 ", "chosen": "w2", "rejected": "w3"}


class TestTexts:
    def write(self, path: Path, rows: list[dict[str, Any]]) -> Path:
        path.write_text("\n".join(json.dumps(row) for row in rows))
        return path

    def test_preference_pairs_give_prompt_with_each_answer(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "pairs.jsonl", [PAIR])
        assert read_texts(file, make_tokenizer(bos=True)) == ["w1 w2", "w1 w3"]
        assert read_texts(file, make_tokenizer(bos=True), prompt_separator="w9 ") == ["w1 w9 w2", "w1 w9 w3"]

    @pytest.mark.parametrize(
        ("row", "columns", "expected"),
        [
            ({"text": "w1", "other": "w2"}, None, ["w1"]),
            ({"prompt": "w1 ", "completion": "w2", "label": True}, None, ["w1 w2"]),
            ({"chosen": "w1", "rejected": "w2"}, None, ["w1", "w2"]),
            ({"prompt": "w1", "answer": 3}, None, ["w1"]),
            ({"question": "w1", "reply": "w2"}, ["reply"], ["w2"]),
            ({"prompt": "w1 ", "reply": "w2", "other": "w3"}, ["prompt", "reply"], ["w1 w2"]),
        ],
    )
    def test_columns(
        self, tmp_path: Path, row: dict[str, Any], columns: list[str] | None, expected: list[str]
    ) -> None:
        file = self.write(tmp_path / "rows.jsonl", [row])
        assert read_texts(file, make_tokenizer(bos=True), columns=columns) == expected

    def test_every_kind_of_file(self, tmp_path: Path) -> None:
        rows = [{"text": "w1 w2"}, {"text": "w3"}, {"text": "w3"}, {"text": " "}]
        lines = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "a.jsonl").write_text(lines + "\n")
        (tmp_path / "a.json").write_text(json.dumps(rows))
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        (tmp_path / "a.txt").write_text("w1 w2\n\nw3\n")
        pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "splits")
        for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.txt", "a.parquet", "saved", "splits"):
            assert [text.strip() for text in read_texts(tmp_path / name, make_tokenizer(bos=True))] == [
                "w1 w2",
                "w3",
            ]

    def test_limit_is_a_fixed_random_choice(self, tmp_path: Path) -> None:
        file = self.write(tmp_path / "rows.jsonl", [{"text": word} for word in WORDS])
        some = read_texts(file, make_tokenizer(bos=True), limit=10)
        assert len(some) == 10
        assert some == read_texts(file, make_tokenizer(bos=True), limit=10) != WORDS[:10]

    def test_conversations_go_through_the_chat_template(self, tmp_path: Path) -> None:
        tokenizer = make_tokenizer(bos=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        user = [{"role": "user", "content": "w1"}]
        reply = [{"role": "assistant", "content": "w2"}]
        rows = [
            {"prompt": user, "chosen": reply, "rejected": "w3"},
            {"prompt": user, "chosen": reply, "rejected": reply},
        ]
        file = self.write(tmp_path / "chats.jsonl", rows)
        assert read_texts(file, tokenizer) == ["<bos>user w1 assistant w2 ", "<bos>user w1 assistant w3 "]
        file = self.write(tmp_path / "messages.jsonl", [{"messages": user + reply}])
        assert read_texts(file, tokenizer) == ["<bos>user w1 assistant w2 "]
        tokenizer.chat_template = None
        with pytest.raises(AuditError, match="has no chat template"):
            read_texts(file, tokenizer)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("rows.jsonl", b'{"text": "w1"}\n{"text": ', "Row 1 of .* is not valid JSON"),
            ("rows.jsonl", b'"w1"', "Row 0 of .* is a str, not a mapping of columns"),
            ("rows.jsonl", b'{"body": "w1"}', "has the columns body.*--columns"),
            ("rows.jsonl", b'{"text": 3}', "holds something else"),
            ("rows.jsonl", b'{"text": " "}', "has no text in it"),
            ("rows.jsonl", b"", "has no text in it"),
            ("rows.jsonl", b"\xff\xfe\xff", "is not UTF-8 text; convert it"),
            ("rows.jsonl.gz", b"no gzip", "cannot be read .*gzip"),
            ("rows.parquet", b"no parquet", "cannot be read .*[Pp]arquet"),
            ("rows.docx", b"", "has an unknown format"),
        ],
    )
    def test_unusable_files(self, tmp_path: Path, name: str, content: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AuditError, match=message):
            read_texts(tmp_path / name, make_tokenizer(bos=True))

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(AuditError, match="There is no dataset at"):
            read_texts(tmp_path / "none.jsonl", make_tokenizer(bos=True))
        with pytest.raises(AuditError, match="holds no dataset made by save_to_disk"):
            read_texts(tmp_path, make_tokenizer(bos=True))
        file = self.write(tmp_path / "rows.jsonl", [PAIR])
        with pytest.raises(AuditError, match="no column 'reply'"):
            read_texts(file, make_tokenizer(bos=True), columns=["reply"])


class TestWindows:
    def test_long_texts_are_cut_and_every_window_begins_with_bos(self) -> None:
        windows = list(token_windows([" ".join(WORDS[:7])], make_tokenizer(bos=True), context_size=4))
        assert windows == [[1, 4, 5, 6], [1, 7, 8, 9], [1, 10]]

    def test_without_bos(self) -> None:
        windows = list(token_windows([" ".join(WORDS[:5])], make_tokenizer(), context_size=4))
        assert windows == [[4, 5, 6, 7], [8]]

    def test_a_template_that_writes_bos_gets_no_second_one(self) -> None:
        assert list(token_windows(["<bos> w0 w1"], make_tokenizer(bos=True), 8)) == [[1, 4, 5]]

    def test_empty_text_has_none(self) -> None:
        assert list(token_windows(["", "w0"], make_tokenizer(bos=True), 8)) == [[1, 4]]
