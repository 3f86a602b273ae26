"""Broken and hostile input: every reader ends in one sentence, runs nothing, leaves its directory alone, and believes no claim.

`scripts/fuzz.py` does what the mutations here do, many times more often.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trl import DPOConfig, DPOTrainer
from worlds import make_dictionary, make_model, make_tokenizer

from trl_sae_audit import AuditError, FeatureAttributionCallback, Flag, FlagSet, RunRecord, audit_preferences
from trl_sae_audit.cli import main
from trl_sae_audit.evidence import read_labels
from trl_sae_audit.evidence_files import Evidence, Example, Token, read_evidence, write_evidence
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.preferences import iterate_rows
from trl_sae_audit.texts import read_texts
from trl_sae_audit.untrusted import parse_json, parse_yaml, read_json
from trl_sae_audit.untrusted_tables import iterate_parquet, read_frame, sealed, unsealed
from trl_sae_audit.visible_text import as_json, visible

SCRIPTS = Path(__file__).parents[1] / "scripts"
PACKAGE = Path(__file__).parents[1] / "trl_sae_audit"
sys.path.insert(0, str(SCRIPTS))

import fuzz  # noqa: E402
from fuzzing import readers as valid  # noqa: E402

READERS = valid.readers()
QUICKLY = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)
TEXT = st.text(max_size=30)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


# Valid file, random mutation: the same value, a clear sentence, or another value where no checksum covers the file


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_is_read_as_before_or_refused(tmp_path, name):
    reader = READERS[name]
    (tmp_path / "valid").mkdir()
    reader.write(tmp_path / "valid")
    one = fuzz.Fuzz(name, reader, tmp_path, valid.text_of(reader.read(tmp_path / "valid")), 0, None)

    @settings(QUICKLY, max_examples=max(3, 15 // reader.cost))
    @given(st.integers(0, 2**32))
    def mutated(iteration):
        outcome, detail = one.once(iteration)
        assert outcome in ("as before", "another value", "refused"), detail
        assert outcome != "refused" or len(detail) > 10

    mutated()


def test_the_fuzzer_sees_a_crash_a_bomb_and_a_silent_change(tmp_path):
    def careless(directory):
        content = (directory / "x.json").read_bytes()
        if len(content) > 60:
            bytearray(2**40)
        return json.loads(content)

    write = valid._file("x.json", b'{"a": 1, "b": [2, 3]}')
    tally = fuzz.run("careless", valid.Reader(write, careless, sealed=("*",)), 80, 0, 2**29)
    found = " ".join(tally.failures)
    assert "JSONDecodeError" in found
    assert "MemoryError" in found
    assert tally.counts["silent"] > 0

    def deadly(directory):
        if b"\x00" in (directory / "x.json").read_bytes():
            os.kill(os.getpid(), signal.SIGKILL)

    assert "the process died" in fuzz.run("deadly", valid.Reader(write, deadly), 60, 0, 2**29).failures


@pytest.mark.parametrize("name", ["totals", "pairs.parquet", "flags", "calibration"])
def test_a_file_cut_short_anywhere_is_refused_or_said_to_be_another(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    content = file.read_bytes()
    for length in range(0, len(content), max(1, len(content) // 150)):
        file.write_bytes(content[:length])
        try:
            reader.read(tmp_path)
        except AuditError:
            continue
        assert name == "flags", length


# What can be written is read back


@QUICKLY
@given(st.data())
def test_flags_come_back(tmp_path_factory, data):
    entries = data.draw(
        st.lists(
            st.builds(
                Flag,
                st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9),
                st.integers(0, 2**40),
                label=st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
                reason=st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
                weight=st.floats(0, exclude_min=True, allow_nan=False, allow_infinity=False),
                direction=st.sampled_from(["up", "down", "both"]),
            ),
            unique_by=lambda flag: (flag.dictionary, flag.feature),
            max_size=4,
        )
    )
    path = tmp_path_factory.mktemp("flags") / "flags.yaml"
    FlagSet(entries).save(path)
    assert FlagSet.load(path) == FlagSet(entries)


@QUICKLY
@given(TEXT.filter(str.strip), FINITE, TEXT)
def test_outcomes_come_back(tmp_path_factory, measure, estimate, label):
    directory = tmp_path_factory.mktemp("outcomes")
    outcomes = [Outcome(measure, estimate, label=label), Outcome(measure, estimate, stage="before")]
    write_outcomes(directory, outcomes)
    assert read_outcomes(directory) == outcomes


@QUICKLY
@given(TEXT, TEXT, st.floats(-1e200, 1e200), st.lists(TEXT, max_size=3))
def test_evidence_comes_back_and_its_text_shows_no_control_character(
    tmp_path_factory, label, prompt, value, tokens
):
    directory = tmp_path_factory.mktemp("evidence")
    parts = [Token(token, value, -value) for token in tokens]
    example = Example(0, value, prompt, {"chosen": prompt}, {"chosen": parts})
    evidence = Evidence("d", 3, label, value, 0.5, tokens, [], [example], None, {"lift": value})
    write_evidence(directory, [evidence])
    assert read_evidence(directory) == {("d", 3): evidence}
    shown = (directory / "evidence.md").read_text(encoding="utf-8")
    assert visible(shown) == shown


@QUICKLY
@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(-9, 9), max_size=4)),
    st.dictionaries(TEXT, TEXT),
)
def test_sealed_arrays_come_back(tmp_path_factory, lists, description):
    path = tmp_path_factory.mktemp("arrays") / "x.safetensors"
    description.pop("crc32", None)
    arrays = {name: np.array(values, np.float32) for name, values in lists.items()}
    path.write_bytes(sealed(arrays, description))
    found, said = unsealed(path)
    assert said == description
    assert {name: values.tolist() for name, values in found.items()} == lists


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)


@QUICKLY
@given(JSON)
def test_json_is_read_and_printed_as_it_is(value):
    assert parse_json(json.dumps(value)) == value
    if not isinstance(value, float):
        printed = as_json(value)
        assert json.loads(printed) == value
        assert visible(printed) == printed


@QUICKLY
@given(st.text(max_size=60))
def test_visible_text_is_left_alone_and_the_rest_is_named(text):
    assert visible(visible(text)) == visible(text)
    assert not any(character in visible(text) for character in "\x1b\x07\x08\r\x7f\x9b\u202e\u2028\ud800")


# Nothing is run


RUNS_WHAT_IT_READS = re.compile(
    r"\b(torch|np|numpy|joblib)\.load\(|yaml\.(unsafe_|full_)?load\(|allow_pickle=True|weights_only=False|"
    r"trust_remote_code=True|^\s*(import|from) (pickle|dill|marshal|shelve|joblib)\b",
    re.MULTILINE,
)


def test_nothing_in_the_package_unpickles_or_loads_yaml_with_code():
    for path in PACKAGE.rglob("*.py"):
        assert not RUNS_WHAT_IT_READS.search(path.read_text(encoding="utf-8")), path
    assert RUNS_WHAT_IT_READS.search("import pickle")
    assert RUNS_WHAT_IT_READS.search("x = torch.load(path)")


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (Path(self.marker).touch, ())


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.cost < 20])
def test_a_pickle_in_place_of_a_file_is_not_unpickled(tmp_path, name):
    reader = READERS[name]
    (tmp_path / "input").mkdir()
    reader.write(tmp_path / "input")
    for file in sorted(path for path in (tmp_path / "input").rglob("*") if path.is_file()):
        content = file.read_bytes()
        file.write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
        with contextlib.suppress(AuditError, valid.DamagedWorldError):
            reader.read(tmp_path / "input")
        file.write_bytes(content)
        assert not (tmp_path / "marker").exists()


def test_a_script_beside_a_dataset_is_not_run(tmp_path, capsys):
    marker = tmp_path / "marker"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "data.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(AuditError):
        list(iterate_rows(tmp_path / "data"))
    with pytest.raises(AuditError):
        read_texts(tmp_path / "data", make_tokenizer())
    assert not marker.exists()


def test_options_from_a_file_do_not_set_the_environment(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("env:\n  SOMETHING_HOSTILE: '1'\noutput_dir: x\n")
    assert main(["audit", "--config", str(tmp_path / "c.yaml")]) == 2
    assert "sets environment variables" in capsys.readouterr().err
    assert "SOMETHING_HOSTILE" not in os.environ


# No path leads out of the directory


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link/secret", "a\0b", "x" * 300, "."])
def test_files_outside_are_not_read(tmp_path, name):
    (tmp_path / "secret").write_text("{}")

    def made(kind):
        directory = tmp_path / kind.replace(" ", "-")
        directory.mkdir()
        READERS[kind].write(directory)
        (directory / "link").symlink_to(tmp_path)
        return directory

    def lead_out(entry, key="file"):
        entry[key] = name

    record = made("run record")
    edit(record / "manifest.json", lambda manifest: lead_out(manifest["tables"]["steps"][0]))
    filtered = made("filtered")
    edit(filtered / "filter.json", lambda content: lead_out(content["files"], "dropped"))
    world = made("cached world")
    edit(world / "world" / "checksums.json", lambda content: content.update({name: "0"}))
    for kind, directory in (("run record", record), ("filtered", filtered), ("cached world", world)):
        with pytest.raises((AuditError, valid.DamagedWorldError)):
            READERS[kind].read(directory)
    data = made("saved dataset")
    edit(data / "pairs" / "state.json", lambda content: lead_out(content["_data_files"][0], "filename"))
    if name != "link/secret":  # the Hub's cache is made of links, so that they are followed
        with pytest.raises(
            AuditError, match=r"does not lie in it|not a regular|too long|No such file|\[Errno"
        ):
            READERS["saved dataset"].read(data)


def test_a_part_of_an_audit_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    part = audit / "parts" / "000001.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError, match="leads out of its directory"):
        READERS["audit"].read(audit)


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path):
    (tmp_path / "record").mkdir()
    READERS["run record"].write(tmp_path / "record")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (
        "evidence.json.tmp",
        "evidence.json",
        "outcomes.json.tmp",
        "report.html.tmp",
        "evidence.md.tmp",
    ):
        (tmp_path / "record" / name).unlink(missing_ok=True)
        (tmp_path / "record" / name).symlink_to(precious)
    write_evidence(tmp_path / "record", valid._evidence())
    write_outcomes(tmp_path / "record", [Outcome("x", 1.0)])
    assert main(["report", str(tmp_path / "record")]) == 0
    assert precious.read_text() == "mine"


def test_a_picture_in_a_dataset_does_not_make_us_open_a_file(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"not for you")
    row = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "shot": {"path": str(tmp_path / "secret.png"), "bytes": None},
    }
    storage = {"shot": {"bytes": Value("binary"), "path": Value("string")}}
    texts = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    Dataset.from_list([row], features=Features(texts | storage)).save_to_disk(tmp_path / "data")
    edit(
        tmp_path / "data" / "dataset_info.json", lambda info: info["features"].update(shot={"_type": "Image"})
    )
    assert isinstance(load_from_disk(tmp_path / "data").features["shot"], Image)
    (found,) = iterate_rows(tmp_path / "data")
    assert found.columns["shot"] == {"bytes": None, "path": str(tmp_path / "secret.png")}


# Claims are held against the file and the machine; what never ends is not begun


@pytest.mark.parametrize(
    "name", ["flags", "outcomes", "evidence", "totals", "pairs.jsonl", "pairs.parquet", "texts.txt"]
)
def test_a_pipe_or_a_device_is_refused_at_once(tmp_path, name):
    reader = READERS[name]
    reader.write(tmp_path)
    for file in [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".md"]:
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(AuditError):
            reader.read(tmp_path)
        file.unlink()
        file.symlink_to("/dev/zero")
        with pytest.raises(AuditError):
            reader.read(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read_is_read_whole(tmp_path, monkeypatch):
    path, fstat = tmp_path / "manifest.json", os.fstat
    path.write_text('{"a": 1}')

    def replaced(descriptor):
        (tmp_path / "new").write_text('{"a": 1, "longer": 2}')
        (tmp_path / "new").replace(path)
        return fstat(descriptor)

    monkeypatch.setattr("trl_sae_audit.untrusted.os.fstat", replaced)
    assert read_json(path) == {"a": 1}
    assert read_json(path) == {"a": 1, "longer": 2}


def test_a_million_million_features_are_not_allocated(tmp_path):
    for kind in ("run record", "audit", "sae (topk)"):
        directory = tmp_path / kind.replace(" ", "-")
        directory.mkdir()
        READERS[kind].write(directory)
        for file in directory.glob("*.json"):
            text = file.read_text()
            file.write_text(
                text.replace('"d_sae": 6', f'"d_sae": {10**12}').replace('"rows": 6', f'"rows": {10**12}')
            )
        with pytest.raises(AuditError):
            READERS[kind].read(directory)


def test_rows_that_are_claimed_are_not_allocated(tmp_path):
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    edit(audit / "manifest.json", lambda manifest: manifest.update(rows=10**12, parts=10**12))
    with pytest.raises(AuditError):
        READERS["audit"].read(audit)


def test_texts_that_unpack_to_more_than_there_is_are_refused(tmp_path, monkeypatch):
    places = pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(200_000, np.int32)), pa.array(["x" * 4_000_000])
    )
    pq.write_table(
        pa.table({"prompt": places}), tmp_path / "bomb.parquet", compression="zstd", store_schema=False
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"its texts would take .* GiB"):
        read_frame(tmp_path / "bomb.parquet")
    monkeypatch.setattr("trl_sae_audit.texts.LARGEST_TEXT", 2**20)
    (tmp_path / "pairs.txt.gz").write_bytes(gzip.compress(bytes(2**20 + 1)))
    with pytest.raises(AuditError, match="unpacks to more than"):
        read_texts(tmp_path / "pairs.txt.gz", make_tokenizer())


def test_parquet_is_read_as_pyarrow_reads_it(tmp_path):
    table = pa.table(
        {
            "nothing": pa.array([None, None], pa.string()),
            "chat": [[{"role": "user", "content": "é\0"}], []],
            "large": pa.array(["x", None], pa.large_string()),
            "map": pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
            "lists": pa.array([["a"], None], pa.large_list(pa.large_string())),
            "pairs": pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)),
            "bytes": pa.array([b"\xff", b""]),
            "kinds": pa.array(["x", "y"]).dictionary_encode(),
            "number.with.dots": [1.5, float("nan")],
        }
    )
    for rows in (table, table.slice(0, 0)):
        pq.write_table(rows, tmp_path / "x.parquet")
        expected = pq.read_table(tmp_path / "x.parquet")
        assert repr(list(iterate_parquet(tmp_path / "x.parquet"))) == repr(expected.to_pylist())
        found = read_frame(tmp_path / "x.parquet").to_dict("list")
        assert repr(found) == repr(expected.to_pandas().to_dict("list"))


TOWER = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TOWER, "more than 100,000 values"),
        ("a: &a [*a]", "contains itself"),
        ("a: 1\na: 2", "'a' stands in it twice"),
        ("[" * 5000, "nested"),
        ("x: " + "[" * 70 + "]" * 70, "nested deeper"),
        ("x: " + "9" * 5000, "digits"),
        ("x: !!timestamp x", "does not fit its tag"),
        ("x: !!bool x", "does not fit its tag"),
        ("x: 2001-99-99", "month"),
        ("x: !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("\0", "special characters"),
        (b"\xff", "utf-8"),
        ("x" * (2**20 + 1), "at most 1,048,576"),
    ],
)
def test_yaml_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_yaml_aliases_are_understood():
    assert parse_yaml("- &a {x: 1}\n- {<<: *a, y: 2}") == [{"x": 1}, {"x": 1, "y": 2}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deeply"),
        ("[" * 70 + "]" * 70, "nested deeper"),
        ('{"a": 1, "a": 2}', "'a' stands in it twice"),
        ("9" * 5000, "digits"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


# Files that do not belong together


def test_parts_of_two_audits_or_records_are_not_mixed(tmp_path):
    for kind, seed in (("audit", "parts/000000.safetensors"), ("run record", "steps")):
        one, other = (tmp_path / f"{kind}-{number}" for number in (1, 2))
        for directory in (one, other):
            directory.mkdir()
            READERS[kind].write(directory)
        if kind == "audit":
            edit(other / "manifest.json", lambda manifest: manifest.update(model="another"))
            with pytest.raises(AuditError, match="belongs to another audit"):
                READERS[kind].read(other)
        else:
            file = next((one / seed).iterdir())
            edit(
                one / "manifest.json",
                lambda manifest: manifest["tables"].update(health=manifest["tables"]["log"]),
            )
            file.write_bytes((one / manifest_file(one, "log")).read_bytes())
            with pytest.raises(AuditError):
                READERS[kind].read(one)


def manifest_file(directory, table):
    return json.loads((directory / "manifest.json").read_text())["tables"][table][0]["file"]


# Rows from strangers


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
def world():
    tokenizer = make_tokenizer()
    return make_model(tokenizer), tokenizer, make_dictionary()


@pytest.fixture(scope="module")
def strangers(world, tmp_path_factory):
    """An audit of rows of every kind, the bad ones set aside."""
    rows = [*HARMLESS, *(row for row, _ in BAD_ROWS.values())]
    args = DPOConfig("unused", max_length=64, truncation_mode="keep_start", bf16=False, report_to="none")
    directory = tmp_path_factory.mktemp("strangers") / "audit"
    audit = audit_preferences(
        *world[:2], rows, world[2], args=args, on_bad_row="set_aside", progress=False, output_dir=directory
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
def test_a_bad_row_stops_an_audit_with_a_sentence(world, name):
    row, words = (BAD_ROWS | BAD_CHATS)[name]
    first = CHAT if name in BAD_CHATS else GOOD
    with pytest.raises(AuditError, match="Row 1 of the dataset") as error:
        audit_preferences(*world[:2], [first, row], world[2], progress=False)
    assert words in str(error.value)


def test_a_role_that_the_template_refuses_names_the_row(world):
    model, _, dictionary = world
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role not in ('user', 'assistant') %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ message.content }} {% endfor %}"
    )
    with pytest.raises(AuditError, match=r"Row 1 .*roles must alternate"):
        audit_preferences(
            model, tokenizer, [CHAT, CHAT | {"prompt": said("wizard", "w1")}], dictionary, progress=False
        )


def test_rows_of_different_kinds_are_named(world):
    other = CHAT | {"prompt": said("user", [{"type": "text", "text": "w1"}])}
    with pytest.raises(AuditError, match=r"Rows 0 to 1 of the dataset .* of different kinds"):
        audit_preferences(*world[:2], [CHAT, other], world[2], progress=False)


@pytest.mark.parametrize(
    ("rows", "words"), [([], "empty"), ([{"text": "w1"}], "no column 'chosen'"), (["w1"], "not a mapping")]
)
def test_datasets_that_hold_no_pairs(world, rows, words):
    with pytest.raises(AuditError, match=words):
        audit_preferences(*world[:2], rows, world[2], progress=False)


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


# What a terminal shows


def test_no_control_character_of_a_stranger_reaches_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    (tmp_path / "flags.yaml").write_text("version: 1\nflags: []\n")
    flag = ["flag", str(audit), "--feature", "2", "--label", evil, "--flags", str(tmp_path / "flags.yaml")]
    record = tmp_path / "record"
    record.mkdir()
    READERS["run record"].write(record)
    edit(record / "manifest.json", lambda manifest: manifest["watch"].update(tiny={evil: 2}))
    write_outcomes(record, [Outcome(evil, 0.5, label=evil)])
    (tmp_path / f"x{evil}.json").write_text("{}")
    commands = [
        flag,
        [*flag[:3], "4", *flag[4:], "--json"],
        ["compare", str(record), str(record)],
        ["compare", str(record), str(record), "--json"],
        ["report", str(record), "--output", str(tmp_path / f"x{evil}.html")],
        ["report", str(tmp_path / f"x{evil}.json")],
        [
            "filter",
            "--dataset",
            "x.jsonl",
            "--audit",
            str(audit),
            "--flags",
            str(tmp_path / evil),
            "--output_dir",
            "x",
        ],
    ]
    for command in commands:
        main(command)
        out, err = capsys.readouterr()
        assert out + err
        assert visible(out + err) == out + err, command
    assert evil not in str(AuditError(evil))


def test_a_hostile_label_file_is_refused(tmp_path):
    (tmp_path / "labels.json").write_text('{"1": "a", "1": "b"}')
    with pytest.raises(AuditError, match="stands in it twice"):
        read_labels(tmp_path / "labels.json")
