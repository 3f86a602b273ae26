"""No control character of a stranger reaches the terminal."""

from __future__ import annotations

from helpers.hostile import QUICKLY, READERS, edit
from hypothesis import given
from hypothesis import strategies as st

from trl_sae_audit import AuditError
from trl_sae_audit.cli.main import main
from trl_sae_audit.outcomes import Outcome, write_outcomes
from trl_sae_audit.text import sanitize


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
    edit(record / "manifest.json", lambda manifest: manifest["config"]["watch"].update(tiny={evil: 2}))
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
        assert sanitize(out + err) == out + err, command
    assert evil not in str(AuditError(evil))


@QUICKLY
@given(st.text(max_size=60))
def test_harmless_text_is_left_alone_and_the_rest_is_named(text):
    assert sanitize(sanitize(text)) == sanitize(text)
    assert not any(character in sanitize(text) for character in "\x1b\x07\x08\r\x7f\x9b\u202e\u2028\ud800")
