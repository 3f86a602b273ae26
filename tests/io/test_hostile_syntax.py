"""YAML and JSON that are refused, each with what is wrong."""

from __future__ import annotations

import pytest

from trl_sae_audit import AuditError
from trl_sae_audit.audit.evidence import read_labels
from trl_sae_audit.io.untrusted import parse_json, parse_yaml

TOWER = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (TOWER, "more than 100,000 values"),
        ("a: &a [*a]", "nested deeper"),
        ("a: 1\na: 2", "'a' appears in it twice"),
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
        ('{"a": 1, "a": 2}', "'a' appears in it twice"),
        ("9" * 5000, "digits"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_json(text)


def test_a_hostile_label_file_is_refused(tmp_path):
    (tmp_path / "labels.json").write_text('{"1": "a", "1": "b"}')
    with pytest.raises(AuditError, match="appears in it twice"):
        read_labels(tmp_path / "labels.json")
