"""audit → flag → filter from the command line, and by two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import yaml
from datasets import load_from_disk
from helpers.worlds import pairs

from trl_sae_audit import Audit, Flag, FlagSet
from trl_sae_audit.cli.audit import default_directory
from trl_sae_audit.cli.main import main


def audit_command(workspace, out):
    return [
        "audit",
        "--model",
        str(workspace / "model"),
        "--dataset",
        str(workspace / "pairs.jsonl"),
        "--dictionary",
        str(workspace / "sae"),
        "--output_dir",
        str(out),
        "--part_size",
        "4",
        "--device",
        "cpu",
    ]


def test_audit_flag_filter(workspace, tmp_path, capsys):
    out = tmp_path / "audit"
    assert main([*audit_command(workspace, out), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "20 examples, 64 features" in shown
    assert "in the model's own answers, 4 to each of 5 prompts held out of the data" in " ".join(
        shown.split()
    )
    assert "Too few pairs to tell; audit more." in shown  # the pairs are noise
    assert "trl-sae-audit flag" not in shown
    assert f"  trl-sae-audit report {out}" in shown
    audit = Audit.load(out)
    assert "These effects say nothing" in shown  # of noise, and the table is ordered by selection
    top = int(audit.ranking()["feature"][0])
    rows = [line.split()[0] for line in shown.splitlines() if line.strip()[:1].isdigit() and "e-" in line]
    assert rows[0] == str(top)
    flags = tmp_path / "flags.yaml"
    flag = ["flag", str(out), "--feature", str(top), "--label", "flattery", "--reason", "a test"]
    flag += ["--direction", "both"]
    assert main([*flag, "--flags", str(flags)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Flagged flattery" in said
    assert said.index("effect size") < said.index("selection") < said.index("attribution")
    assert FlagSet.load(flags)[0].identity == audit.dictionary.identity
    assert main([*flag, "--flags", str(flags)]) == 2
    assert "already flags feature" in capsys.readouterr().err
    filtered = ["filter", str(workspace / "pairs.jsonl"), "--flags", str(flags)]
    assert main([*filtered, "--output_dir", str(tmp_path / "defaults")]) == 0, "the flags know their audit"
    assert "Predicted again on" in capsys.readouterr().out
    assert "check" in json.loads((tmp_path / "defaults" / "manifest.json").read_text())["summary"]
    more = ["--score", "attribution", "--weights", "flags", "--budget", "0.1", "--control", "--no_check"]
    assert main([*filtered, "--audit", str(out), *more, "--output_dir", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "18 of 20 rows kept" in shown
    assert "Predicted again" not in shown
    assert len((tmp_path / "out" / "control.jsonl").read_text().splitlines()) == 18
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["summary"]["dropped"] == 2


def test_options_come_from_a_file_too(workspace, tmp_path, capsys):
    command = audit_command(workspace, tmp_path / "audit")[1:]
    options = {
        name.removeprefix("--"): value for name, value in zip(command[::2], command[1::2], strict=True)
    }
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(options | {"part_size": 4}))
    assert main(["audit", "--config", str(tmp_path / "audit.yaml")]) == 0
    assert len(Audit.load(tmp_path / "audit")) == 20


def test_a_dataset_on_disk_with_splits(workspace, tmp_path, capsys):
    from datasets import DatasetDict

    DatasetDict(train=pairs(20), test=pairs(3)).save_to_disk(tmp_path / "data")
    command = audit_command(workspace, tmp_path / "audit")
    command[command.index("--dataset") + 1] = str(tmp_path / "data")
    assert main([*command, "--split", "validation"]) == 2
    assert "no split 'validation' but train, test" in capsys.readouterr().err
    assert main(command) == 0
    assert load_from_disk(tmp_path / "data")["train"].num_rows == len(Audit.load(tmp_path / "audit"))


def test_the_first_rows_only(workspace, tmp_path, capsys):
    lines = (workspace / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
    data, flags = tmp_path / "pairs.jsonl", str(tmp_path / "flags.yaml")
    data.write_text("\n".join([*lines[:3], "no pair", *lines[3:]]), encoding="utf-8")
    command = audit_command(workspace, tmp_path / "audit")
    command[command.index("--dataset") + 1] = str(data)
    assert main([*command, "--max_rows", "0"]) == 2
    assert main([*command, "--max_rows", "6", "--on_bad_row", "set_aside"]) == 0
    audit = Audit.load(tmp_path / "audit")
    assert (len(audit), [row for row, _ in audit.set_aside]) == (5, [3])
    assert main(["flag", str(tmp_path / "audit"), "--feature", "3", "--flags", flags]) == 0
    filtered = ["filter", "--dataset", str(data), "--audit", str(tmp_path / "audit"), "--flags", flags]
    filtered += ["--on_bad_row", "set_aside", "--budget", "1", "--score", "attribution", "--weights", "flags"]
    assert main([*filtered, "--max_rows", "6", "--output_dir", str(tmp_path / "six")]) == 0
    assert "4 of 6 rows kept" in capsys.readouterr().out
    assert main([*filtered, "--output_dir", str(tmp_path / "all")]) == 2
    capsys.readouterr()
    command[command.index("--output_dir") + 1] = str(tmp_path / "stopped")
    assert main([*command, "--max_rows", "6"]) == 2
    assert "ow 3 " in capsys.readouterr().err


def test_mistakes_end_in_a_sentence(workspace, tmp_path, capsys):
    command = audit_command(workspace, tmp_path / "audit")
    command[command.index("--dataset") + 1] = str(tmp_path / "none.jsonl")
    assert main(command) == 2
    assert "no dataset at" in capsys.readouterr().err
    assert main(["flag", str(tmp_path / "nothing"), "--feature", "3"]) == 2
    assert "is not an audit" in capsys.readouterr().err
    for name in ("audit", "flag", "filter"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "example:" in " ".join(capsys.readouterr().out.split())


@pytest.mark.processes
def test_two_processes_share_an_audit_and_get_what_one_gets(workspace, tmp_path):
    assert main(audit_command(workspace, tmp_path / "one")) == 0
    program = "import sys; from trl_sae_audit.cli.main import main; sys.exit(main(sys.argv[1:]))"
    (tmp_path / "run.py").write_text(program)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "29531",
    ]
    done = subprocess.run(
        [*torchrun, str(tmp_path / "run.py"), *audit_command(workspace, tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = Audit.load(tmp_path / "one"), Audit.load(tmp_path / "two")
    assert two.manifest["processes"] == 2
    assert one.manifest["dataset_sha256"] == two.manifest["dataset_sha256"]
    for part in sorted((tmp_path / "one" / "parts").iterdir()):
        assert part.read_bytes() == (tmp_path / "two" / "parts" / part.name).read_bytes()
    tables = [audit.features().set_index("feature").sort_index() for audit in (one, two)]
    pd.testing.assert_frame_equal(*tables, rtol=1e-5, atol=1e-8)


def test_lookahead_influence_and_evidence(workspace, tmp_path, capsys):
    pairs(4, seed=8).to_json(tmp_path / "probe.jsonl")
    flags = tmp_path / "flags.yaml"
    out = tmp_path / "audit"
    assert main([*audit_command(workspace, out), "--evidence", "2"]) == 0
    assert (out / "evidence.md").read_text().count("## Feature") == 2
    assert main(["flag", str(out), "--feature", "5", "--flags", str(flags)]) == 0
    capsys.readouterr()
    asked = [
        "--lookahead",
        str(tmp_path / "probe.jsonl"),
        "--learning_rate",
        "1e-4",
        "--influence",
        str(flags),
        *("--lookahead_samples", "2", "--max_new_tokens", "6", "--train_batch_size", "4"),
    ]
    assert main([*audit_command(workspace, out), *asked]) == 0
    shown = capsys.readouterr().out
    features = Audit.load(out).features()
    assert features["predicted_change"].abs().max() > 0
    rows = [line for line in shown.splitlines() if line.strip()[:1].isdigit() and "e-" in line]
    assert rows[0].split()[0] == str(Audit.load(out).ranking()["feature"][0])
    assert max(map(len, rows[:10])) <= 80
    filtered = [
        "filter",
        "--dataset",
        str(workspace / "pairs.jsonl"),
        "--audit",
        str(out),
        "--flags",
        str(flags),
    ]
    filtered += ["--score", '{"influence": 1, "attribution": 0.5}', "--quantile", "0.8"]
    assert main([*filtered, "--output_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "disparity" in told
    assert "attribution" in told
    assert "What they are active on" in told


def test_the_flags_say_which_audit_is_meant(tmp_path, capsys):
    flags = tmp_path / "flags.yaml"

    def refused(*audits):
        FlagSet([Flag("sae", number, audit=audit) for number, audit in enumerate(audits)]).save(flags)
        assert (
            main(["filter", "pairs.jsonl", "--flags", str(flags), "--output_dir", str(tmp_path / "out")]) == 2
        )
        return " ".join(capsys.readouterr().err.split())

    assert "do not say in which audit they were set; pass --audit" in refused(None)
    assert f"are of several audits ({tmp_path}/a, {tmp_path}/b); pass --audit" in refused(
        f"{tmp_path}/a", f"{tmp_path}/b"
    )
    assert "which is not there any more; pass --audit" in refused(f"{tmp_path}/a")


@pytest.mark.parametrize(
    ("model", "dataset", "expected"),
    [
        ("./models/tiny", "data/pairs.jsonl.gz", "runs/audit-tiny-pairs"),
        ("org/Model-1.5B", "org/data set", "runs/audit-Model-1.5B-data-set"),
    ],
)
def test_where_an_audit_goes_by_default(model: str, dataset: str, expected: str) -> None:
    assert default_directory(model, dataset) == expected
