"""One table: every format, through every entry; and what is said where a dataset cannot be read."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Json, List, Value, config
from helpers.worlds import make_dictionary, make_model, make_tokenizer, pairs

from trl_sae_audit import AuditError, Flag, FlagSet, audit_preferences, filter_preferences
from trl_sae_audit.cli.options import PreferenceArguments, TextArguments
from trl_sae_audit.data.opener import iterate_rows, open_dataset
from trl_sae_audit.data.texts import read_texts
from trl_sae_audit.verification.measured import answer_activations

ROOT = Path(__file__).parents[2]
ROWS = [dict(row) for row in pairs(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
BOM = "\ufeff"


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(directory: Path) -> Path:
        data = content if isinstance(content, bytes) else content.encode()
        (directory / name).write_bytes(gzip.compress(data) if name.lower().endswith(".gz") else data)
        return directory / name

    return write


def csv() -> str:
    return Dataset.from_list(ROWS).to_pandas().to_csv(index=False)


def parquet(directory: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(directory / "pairs.parquet")
    return directory / "pairs.parquet"


def parquet_shards(directory: Path) -> Path:
    (directory / "shards" / "data").mkdir(parents=True)
    for number in range(2):
        shard = Dataset.from_list(ROWS[2 * number :][:2])
        shard.to_parquet(directory / "shards" / "data" / f"train-{number:05}-of-00002.parquet")
    (directory / "shards" / "README.md").write_text("---\ndata_files: /etc/passwd\n---\n")
    return directory / "shards"


def json_shards(directory: Path) -> Path:
    (directory / "train").mkdir()
    written("0000.jsonl", "".join(LINES.splitlines(True)[:1]))(directory / "train")
    written("0001.jsonl", "".join(LINES.splitlines(True)[1:]))(directory / "train")
    return directory / "train"


def saved(data: Dataset | DatasetDict) -> Callable[[Path], Path]:
    def save(directory: Path) -> Path:
        data.save_to_disk(directory / "saved")
        return directory / "saved"

    return save


ON_DISK: dict[str, Callable[[Path], Path]] = {
    "lines": written("pairs.jsonl", LINES),
    "lines, .json": written("pairs.json", LINES),
    "lines, .ndjson": written("pairs.ndjson", LINES),
    "lines, capitals": written("PAIRS.JSONL", LINES),
    "lines, BOM": written("pairs.jsonl", BOM + LINES),
    "lines, CRLF and blank": written("pairs.jsonl", "\r\n" + LINES.replace("\n", "\r\n\r\n")),
    "lines, no end": written("pairs.jsonl", LINES.rstrip()),
    "lines, glob": written("pairs[1]*?.jsonl", LINES),
    "lines, gzip": written("pairs.jsonl.gz", LINES),
    "lines, gzip, capitals": written("PAIRS.JSONL.GZ", LINES),
    "array": written("pairs.json", json.dumps(ROWS)),
    "array, .jsonl": written("pairs.jsonl", json.dumps(ROWS)),
    "array, pretty": written("pairs.json", json.dumps(ROWS, indent=2)),
    "array, pretty, BOM": written("pairs.json", BOM + json.dumps(ROWS, indent=2)),
    "array, gzip": written("pairs.json.gz", json.dumps(ROWS, indent=1)),
    "csv": written("pairs.csv", csv()),
    "csv, BOM": written("pairs.csv", BOM + csv()),
    "csv, gzip": written("pairs.csv.gz", csv()),
    "parquet": parquet,
    "parquet, shards": parquet_shards,
    "lines, shards": json_shards,
    "saved": saved(Dataset.from_list(ROWS)),
    "saved, one split": saved(DatasetDict(validation=Dataset.from_list(ROWS))),
}
IN_MEMORY: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "dataset": lambda: Dataset.from_list(ROWS),
    "dataset, pandas": lambda: Dataset.from_list(ROWS).with_format("pandas"),
    "dataset, numpy columns": lambda: Dataset.from_list(ROWS).with_format("numpy", columns=["chosen"]),
    "dataset, Arrow": lambda: Dataset.from_list(ROWS).with_format("arrow"),
    "one split": lambda: DatasetDict(test=Dataset.from_list(ROWS)),
    "stream": lambda: Dataset.from_list(ROWS).to_iterable_dataset(),
    "stream, pandas": lambda: Dataset.from_list(ROWS).to_iterable_dataset().with_format("pandas"),
    "stream, generator": lambda: IterableDataset.from_generator(lambda: iter(ROWS)),
}


@pytest.fixture(scope="module")
def world() -> Any:
    tokenizer = make_tokenizer()
    model, dictionary = make_model(tokenizer), make_dictionary()
    return (
        model,
        tokenizer,
        dictionary,
        audit_preferences(model, tokenizer, ROWS, dictionary, lookahead=None, progress=False),
    )


def rows_of(source: Any, world: Any) -> Any:
    rows = list(iterate_rows(source))
    assert [row.index for row in rows] == list(range(len(rows)))
    return [row.columns for row in rows]


def audit_of(source: Any, world: Any) -> Any:
    found = audit_preferences(*world[:2], source, world[2], lookahead=None, progress=False)
    return found.manifest["dataset_sha256"], found.features().to_dict("list")


def filtered(source: Any, world: Any) -> Any:
    flags = FlagSet([Flag("tiny", 3)])
    flipped = filter_preferences(source, world[3], flags, "flip", budget=2)
    return list(flipped.kept), list(filter_preferences(source, world[3], flags, budget=2).dropped)


def texts_of(source: Any, world: Any) -> Any:
    return read_texts(source, world[1])


def activations_of(source: Any, world: Any) -> Any:
    return answer_activations(world[0], world[1], world[2], source).sums.tolist()


FUNCTIONS = [rows_of, audit_of, filtered, texts_of, activations_of]


def script(path: Path, world: Any) -> Any:
    return open_dataset(str(path), columns=("prompt", "chosen")).to_list()


def pairs_command(path: Path, world: Any) -> Any:
    return rows_of(PreferenceArguments(str(path)).source(), world)


def filter_command(path: Path, world: Any) -> Any:
    result = filter_preferences(
        PreferenceArguments(str(path)).source(),
        world[3],
        FlagSet([Flag("tiny", 3)]),
        score="attribution",
        weights="flags",
        budget=1,
    )
    out = result.save(path.parent / "out", format=None)
    (kept,) = out.glob("kept*")
    return [row.columns for row in iterate_rows(kept)], result.plan.kept.tolist()


def texts_command(path: Path, world: Any) -> Any:
    return TextArguments(str(path)).read(world[1])


COMMANDS = [script, pairs_command, filter_command, texts_command]


@pytest.mark.parametrize("kind", [*ON_DISK, *IN_MEMORY])
@pytest.mark.parametrize("entry", FUNCTIONS, ids=lambda entry: entry.__name__)
def test_every_format_through_every_function(kind: str, entry: Any, world: Any, tmp_path: Path) -> None:
    source = ON_DISK[kind](tmp_path) if kind in ON_DISK else IN_MEMORY[kind]()
    found, expected = entry(source, world), entry(ROWS, world)
    assert repr(found) == repr(expected)
    assert repr(entry(str(source) if kind in ON_DISK else source, world)) == repr(found), "a second time"


@pytest.mark.parametrize("kind", ON_DISK)
@pytest.mark.parametrize("entry", COMMANDS, ids=lambda entry: entry.__name__)
def test_every_format_through_every_command(kind: str, entry: Any, world: Any, tmp_path: Path) -> None:
    found = entry(ON_DISK[kind](tmp_path), world)
    if entry is filter_command:
        rows, kept = found
        assert rows == [ROWS[index] for index in kept]
        assert len(kept) == 3
    else:
        assert found == (texts_of(ROWS, world) if entry is texts_command else ROWS)


def test_there_is_no_other_opener() -> None:
    reads = re.compile(r"(?<!SAE\.)\b(load_dataset|load_from_disk|from_(json|csv|parquet|text))\(")
    files = [path for folder in ("trl_sae_audit", "scripts") for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in files if reads.search(path.read_text(encoding="utf-8"))] == ["opener.py"]
    openers = {
        path.stem for path in files if re.search(r"\bopen_dataset\(", path.read_text(encoding="utf-8"))
    }
    assert openers >= {"opener", "options", "rows", "dpo", "grpo", "ppo", "bench_overhead"}


# Streaming


@pytest.mark.parametrize("name", ["big.jsonl", "big.jsonl.gz", "big.csv"])
def test_the_first_row_comes_before_the_end_is_read(name: str, tmp_path: Path) -> None:
    line = f'{{"text": "{"w1 " * 2000}"}}\n' if "json" in name else f"{'w1 ' * 2000}\n"
    content = ("" if "json" in name else "text\n") + line * 12_000
    path = written(name, content.encode() + b"\xff\n")(tmp_path)
    rows = iterate_rows(path)
    assert next(rows).columns == {"text": "w1 " * 2000}
    with pytest.raises(AuditError, match="is not UTF-8 text"):
        list(rows)


def test_rows_are_not_copied_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for kind in ("lines", "array", "csv", "parquet"):
        assert len(list(iterate_rows(ON_DISK[kind](tmp_path)))) == 4
        assert not [
            path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"
        ]
    assert (
        open_dataset(tmp_path / "pairs.parquet")
        .cache_files[0]["filename"]
        .startswith(str(tmp_path / "cache"))
    )


# Splits


def test_splits(tmp_path: Path, world: Any) -> None:
    rows = Dataset.from_list(ROWS)
    splits = DatasetDict(train=rows, test=rows.select([0]))
    path = saved(splits)(tmp_path)
    assert len(open_dataset(path)) == 4
    assert len(open_dataset(path, split="test")) == len(list(iterate_rows(path, "test"))) == 1
    for open_it in (open_dataset, lambda path, split: list(iterate_rows(path, split))):
        with pytest.raises(AuditError, match=r"no split 'x' but train, test; choose one with --split"):
            open_it(path, split="x")
    with pytest.raises(
        AuditError, match=r"several splits \(train, test\); pass one, such as dataset\['train'\]"
    ):
        audit_preferences(*world[:2], splits, world[2], lookahead=None, progress=False)
    with pytest.raises(AuditError, match="no split 'test' but train"):
        open_dataset(ON_DISK["lines"](tmp_path), split="test")


def test_files_of_a_folder_that_are_not_shards_are_splits(tmp_path: Path, world: Any) -> None:
    """Kept and dropped rows of a filter are not read as one."""
    result = filter_preferences(
        ROWS, world[3], FlagSet([Flag("tiny", 3)]), score="attribution", weights="flags", budget=1
    )
    out = result.save(tmp_path / "filtered")
    with pytest.raises(AuditError, match="no split 'train' but decisions, dropped, kept, manifest"):
        open_dataset(out)
    assert len(open_dataset(out, split="kept")) == 3
    written("kept.csv", csv())(out)
    with pytest.raises(AuditError, match="or files of several"):
        open_dataset(out, split="kept")


def test_numbered_files_are_of_the_split_that_their_folder_names(tmp_path: Path) -> None:
    written("0000.jsonl", LINES.splitlines()[0])(json_shards(tmp_path).parent)
    (tmp_path / "test").mkdir()
    (tmp_path / "0000.jsonl").rename(tmp_path / "test" / "0000.jsonl")
    assert [len(open_dataset(tmp_path, split=split)) for split in ("train", "test", None)] == [4, 1, 4]


# What a row is


def test_values_are_those_of_the_file(tmp_path: Path) -> None:
    """Not Arrow's: no date is made of a text, no empty column of an absent one, no number of another type."""
    rows = [
        {"prompt": "2024-01-01", "chosen": "2024-01-02T10:00:00Z", "rejected": "c", "id": 1},
        {"chosen": [{"role": "user", "content": "x", "tool": {"y": [1, None]}}], "rejected": "c", "id": 1.5},
        {"chosen": 3, "rejected": None, "id": 2**70},
    ]
    for content in ("\n".join(map(json.dumps, rows)), json.dumps(rows)):
        assert rows_of(written("rows.json", content)(tmp_path), None) == rows


def test_columns_of_mixed_types_are_read_as_python(tmp_path: Path) -> None:
    features = Features({"any": Json(), "messages": List(Json()), "n": Value("int64")})
    rows = [{"any": {"a": [1, "b"]}, "messages": [{"q": 1}], "n": 1}, {"any": "x", "messages": [], "n": 2}]
    data = Dataset.from_list(rows, features=features)
    for source in (data, data.to_iterable_dataset(), saved(data)(tmp_path)):
        assert rows_of(source, None) == rows


def test_a_transform_of_the_users_own_stays() -> None:
    data = Dataset.from_list(ROWS).with_transform(
        lambda batch: {"prompt": [text.upper() for text in batch["prompt"]]}
    )
    assert rows_of(data, None) == [{"prompt": row["prompt"].upper()} for row in ROWS]


# Sentences

BROKEN = {
    "UTF-16": ("pairs.jsonl", LINES.encode("utf-16"), "is not UTF-8 text; convert it"),
    "UTF-16, csv": ("pairs.csv", csv().encode("utf-16"), "is not UTF-8 text; convert it"),
    "Latin-1": ("pairs.json", '[{"text": "é"}]'.encode("latin-1"), "is not UTF-8 text; convert it"),
    "broken gzip": ("pairs.jsonl.gz", None, "cannot be read .*gzip"),
    "broken array": ("pairs.json", json.dumps(ROWS)[:-20], "cannot be read .*line 1 column"),
    "two arrays": ("pairs.json", "[1]\n[2]", "cannot be read .*Extra data"),
    "no Parquet": ("pairs.parquet", b"x" * 50, "cannot be read .*Parquet"),
    "ragged": ("pairs.csv", "a,b\n1,2,3\n1,2\n1,2,3,4,5\n", "cannot be read .*Expected 3 fields"),
    "empty csv": ("pairs.csv", "", "cannot be read .*No columns"),
    "unknown": ("pairs.xlsx", "x", "unknown format, or files of several; give files that end in .jsonl, "),
    "no ending": ("pairs", LINES, "unknown format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    file, content, words = BROKEN[name]
    path = written(file, content or b"")(tmp_path)
    if content is None:
        path.write_bytes(b"no gzip")
    for read in (lambda: list(iterate_rows(path)), lambda: open_dataset(path)):
        with pytest.raises(AuditError, match=words) as error:
            read()
        assert str(error.value).startswith(str(path))
        assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "w1', "is not valid JSON .*at character 11"),
        ('{"prompt": "a", "prompt": "b"}', "'prompt' appears in it twice"),
        ("[" * 70 + "]" * 70, "nested deeper"),
        ("3", "is a int, not a mapping of columns"),
    ],
)
def test_a_line_that_is_no_row(line: str, words: str, tmp_path: Path) -> None:
    lines = LINES.splitlines()
    path = written("pairs.jsonl", "\n".join([*lines[:2], line, *lines[2:]]))(tmp_path)
    rows = list(iterate_rows(path))
    assert [row.columns for row in rows if row.columns] == ROWS
    assert re.search(words, rows[2].problem or "")
    assert rows[2].text == line
    with pytest.raises(AuditError, match=rf"Row 2 of .*pairs.jsonl \(counted from 0\) .*{words}"):
        open_dataset(path)


def test_nothing_there(tmp_path: Path) -> None:
    for name in (tmp_path / "none.jsonl", tmp_path / "none" / "there", "none.CSV"):
        with pytest.raises(AuditError, match=r"There is no dataset at .*; check the path"):
            list(iterate_rows(name))
    with pytest.raises(AuditError, match=r"holds no dataset made by save_to_disk and no data files \(.jsonl"):
        open_dataset(tmp_path)
    with pytest.raises(
        AuditError, match=r"nobody/nothing is not a file or directory, and cannot be loaded from the Hub \("
    ):
        open_dataset("nobody/nothing")
    with pytest.raises(AuditError, match="pass --dataset_name"):
        open_dataset(None)
    assert list(iterate_rows(written("empty.jsonl", "\n \n")(tmp_path))) == []
    with pytest.raises(AuditError, match="has no rows"):
        open_dataset(written("empty.jsonl", "")(tmp_path))
    with pytest.raises(AuditError, match=r"has no column rejected \(it has prompt, chosen\); rename"):
        open_dataset(
            written("x.jsonl", '{"prompt": "a", "chosen": "b"}')(tmp_path), columns=("chosen", "rejected")
        )
    with pytest.raises(AuditError, match="The dataset is a int; pass"):
        list(iterate_rows(3))


def test_a_file_is_read_without_asking_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets.load_dataset` counts every call at the hub: without a network each file would wait for that."""

    def ask(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", ask)
    monkeypatch.setattr("datasets.load.increase_load_count", ask)
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "a"}\n')
    assert [row.columns for row in iterate_rows(str(path))] == [{"prompt": "a"}]
    assert list(open_dataset(str(path))) == [{"prompt": "a"}]


def test_a_date_beyond_those_of_python_is_said(tmp_path: Path) -> None:
    path = tmp_path / "pairs.parquet"
    columns = {name: pa.array(["a"]) for name in ("prompt", "chosen", "rejected")}
    pq.write_table(pa.table(columns | {"when": pa.array([2**31 - 1], pa.int32()).cast(pa.date32())}), path)
    with pytest.raises(AuditError, match=r"pairs\.parquet cannot be read .*days"):
        list(iterate_rows(path))
