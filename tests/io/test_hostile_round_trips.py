"""What can be written is read back, whatever stands in it."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.hostile import QUICKLY
from hypothesis import given
from hypothesis import strategies as st

from trl_sae_audit import Flag, FlagSet
from trl_sae_audit.audit.evidence_files import Context, Evidence, read_evidence, write_evidence
from trl_sae_audit.io.tables import load_checked, read_frame, read_parquet, save_checked
from trl_sae_audit.io.untrusted import parse_json
from trl_sae_audit.outcomes import Outcome, read_outcomes, write_outcomes
from trl_sae_audit.text import sanitize, sanitize_json

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
    contexts = [Context("strongest", "chosen", 0, value, prompt, token, token, prompt) for token in tokens]
    evidence = Evidence("d", 3, label, value, 0.5, tokens, [], contexts, None, {"lift": value}, prompt)
    write_evidence(directory, [evidence])
    assert read_evidence(directory) == {("d", 3): evidence}
    shown = (directory / "evidence.md").read_text(encoding="utf-8")
    assert sanitize(shown) == shown


@QUICKLY
@given(
    st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(-9, 9), max_size=4)),
    st.dictionaries(TEXT, TEXT),
)
def test_sealed_arrays_come_back(tmp_path_factory, lists, description):
    path = tmp_path_factory.mktemp("arrays") / "x.safetensors"
    description.pop("crc32", None)
    arrays = {name: np.array(values, np.float32) for name, values in lists.items()}
    path.write_bytes(save_checked(arrays, description))
    found, said = load_checked(path)
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
        printed = sanitize_json(value)
        assert json.loads(printed) == value
        assert sanitize(printed) == printed


def test_parquet_is_read_as_pyarrow_reads_it(tmp_path):
    table = pa.table(
        {
            "nothing": pa.array([None, None], pa.string()),
            "text": ["é\0", None],
            "large": pa.array(["x", None], pa.large_string()),
            "bytes": pa.array([b"\xff", b""]),
            "kinds": pa.array(["x", "y"]).dictionary_encode(),
            "number.with.dots": [1.5, float("nan")],
        }
    )
    path = tmp_path / "x.parquet"
    for rows in (table, table.slice(0, 0)):
        pq.write_table(rows, path)
        expected = pq.read_table(path)
        assert read_parquet(path).schema.equals(expected.schema)
        assert repr(read_parquet(path).to_pylist()) == repr(expected.to_pylist())
        assert repr(read_frame(path).to_dict("list")) == repr(expected.to_pandas().to_dict("list"))
    pq.write_table(pa.table({"lists": [["a"]]}), path)
    with pytest.raises(ValueError, match="column of lists"):
        read_parquet(path)
