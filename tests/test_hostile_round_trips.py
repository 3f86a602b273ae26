"""What can be written is read back, whatever stands in it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hostile import QUICKLY
from hypothesis import given
from hypothesis import strategies as st

from trl_sae_audit import Flag, FlagSet
from trl_sae_audit.evidence_files import Evidence, Example, Token, read_evidence, write_evidence
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.untrusted import parse_json
from trl_sae_audit.untrusted_tables import iterate_parquet, read_frame, sealed, unsealed
from trl_sae_audit.visible_text import as_json, visible

TEXT = st.text(max_size=30)
FINITE = st.floats(allow_nan=False, allow_infinity=False)


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
