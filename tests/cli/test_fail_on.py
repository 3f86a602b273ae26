"""`audit --fail_on`: an exit code for a build server."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trl_sae_audit import Audit, AuditError
from trl_sae_audit.cli.fail_on import Finding, Rule, check_rules, exit_code, parse_rules
from trl_sae_audit.cli.main import main

pytestmark = pytest.mark.newest


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("sycophancy>0.1", Rule("sycophancy", ">", 0.1)),
        (" agrees with the user < -.5e-1 ", Rule("agrees with the user", "<", -0.05)),
        ("1423>2", Rule("1423", ">", 2.0)),
    ],
)
def test_rules_are_read(words: str, expected: Rule) -> None:
    assert parse_rules([words], ["Sycophancy", "agrees with the user"]) == [expected]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("sycophancy", "write a label or a feature's number, > or <, and an effect size"),
        ("sycophancy>x", "write a label"),
        (">1", "write a label"),
        ("sycophanzy>1", "'sycophanzy', which no feature has; did you mean 'sycophancy'"),
        ("dates>1", "give --labels a file that has it"),
    ],
)
def test_what_is_no_rule_is_refused(words: str, said: str) -> None:
    with pytest.raises(AuditError, match=said):
        parse_rules([words], ["sycophancy"])


@pytest.mark.parametrize(
    ("sign", "limit", "broken"),
    [
        (">", 0.1, True),
        (">", 0.2, False),
        (">", 0.3, False),
        ("<", 0.5, True),
        ("<", 0.4, False),
        ("<", 0.3, False),
    ],
)
def test_the_nearer_end_of_the_interval_decides(sign: str, limit: float, broken: bool) -> None:
    row = {"feature": 3, "effect_size": 0.3, "effect_size_low": 0.2, "effect_size_high": 0.4}
    found = Finding.of(Rule("x", sign, limit), row)
    assert found.broken is broken
    assert ("FAILED" in str(found)) is broken
    assert exit_code([found]) == int(broken)
    unknown = Finding.of(Rule("x", sign, limit), {**row, "effect_size_low": math.nan})
    assert unknown.broken is None
    assert "cannot be said" in str(unknown)
    assert exit_code([found, unknown]) == (1 if broken else 2)


def test_an_audit_answers_a_build_server(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = tmp_path / "audit"
    command = [
        "audit",
        "--model",
        str(workspace / "model"),
        "--dataset",
        str(workspace / "pairs.jsonl"),
        "--dictionary",
    ]
    command += [
        str(workspace / "sae"),
        "--output_dir",
        str(where),
        "--max_new_tokens",
        "4",
        "--device",
        "cpu",
    ]
    assert main([*command, "--fail_on", "dates>1"]) == 2  # before anything is made
    assert not where.exists()
    assert main(command) == 0
    table = Audit.load(where).features()
    known = table[table["effect_size"].notna()]
    first = known.iloc[0]
    feature, low = int(first["feature"]), float(first["effect_size_low"])
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({str(feature): "flattery"}))
    command += ["--labels", str(labels)]
    capsys.readouterr()
    below, above = f"Flattery>{low - abs(low) / 2}", f"{feature}>{float(first['effect_size_high'])}"
    assert main([*command, "--fail_on", above]) == 0
    assert "holds; feature" in capsys.readouterr().out
    assert main([*command, "--fail_on", above, "--fail_on", below]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert f"FAILED, the lower end is above {low - abs(low) / 2:g}; feature {feature} has effect size" in said
    assert "holds" in said
    assert main([*command, "--fail_on", below, "--json"]) == 1
    (entry,) = json.loads(capsys.readouterr().out)["fail_on"]
    assert (entry["feature"], entry["broken"]) == (feature, True)
    assert (Audit.load(where).features().set_index("feature")["label"][feature]) == "flattery"
    assert main([*command, "--no_lookahead", "--fail_on", above]) == 2
    assert "does not look ahead to" in capsys.readouterr().err
    with pytest.raises(AuditError, match="has features 0 to"):
        check_rules([Rule("100000", ">", 1.0)], Audit.load(where))
