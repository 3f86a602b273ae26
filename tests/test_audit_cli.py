"""audit → flag → filter from the command line, and by two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from datasets import load_from_disk
from sae_lens import SAE
from worlds import D_MODEL, HOOK_POINT, make_model, make_tokenizer, pairs

from trl_sae_audit import Audit, FlagSet
from trl_sae_audit.cli import main


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    directory = tmp_path_factory.mktemp("world")
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(directory / "model")
    tokenizer.save_pretrained(directory / "model")
    pairs(20).to_json(directory / "pairs.jsonl")
    config = {
        "architecture": "topk",
        "d_in": D_MODEL,
        "d_sae": 64,
        "k": 4,
        "dtype": "float32",
        "device": "cpu",
    }
    config |= {"metadata": {"hook_name": HOOK_POINT}}
    SAE.from_dict(config).save_model(directory / "sae")
    return directory


def audit_command(world, out):
    return [
        "audit",
        "--model_name_or_path",
        str(world / "model"),
        "--dataset",
        str(world / "pairs.jsonl"),
        "--sae",
        str(world / "sae"),
        "--output_dir",
        str(out),
        "--part_size",
        "4",
        "--device",
        "cpu",
    ]


def test_audit_flag_filter(world, tmp_path, capsys):
    out = tmp_path / "audit"
    assert main([*audit_command(world, out), "--top", "3"]) == 0
    shown = capsys.readouterr().out
    assert "20 examples, 64 features" in shown
    audit = Audit.load(out)
    top = int(audit.features()["feature"][0])
    assert str(top) in shown
    flags = tmp_path / "flags.yaml"
    flag = ["flag", str(out), "--feature", str(top), "--label", "flattery", "--reason", "a test"]
    assert main([*flag, "--flags", str(flags)]) == 0
    assert "Flagged flattery" in capsys.readouterr().out
    assert FlagSet.load(flags)[0].identity == audit.dictionary.identity
    assert main([*flag, "--flags", str(flags)]) == 2
    assert "flagged twice" in capsys.readouterr().err
    filtered = ["filter", "--dataset", str(world / "pairs.jsonl"), "--audit", str(out), "--flags", str(flags)]
    assert (
        main([*filtered, "--budget", "0.1", "--control", "true", "--output_dir", str(tmp_path / "out")]) == 0
    )
    assert "18 of 20 rows kept" in capsys.readouterr().out
    assert len((tmp_path / "out" / "control.jsonl").read_text().splitlines()) == 18
    assert json.loads((tmp_path / "out" / "filter.json").read_text())["summary"]["dropped"] == 2


def test_options_come_from_a_file_too(world, tmp_path, capsys):
    command = audit_command(world, tmp_path / "audit")[1:]
    options = {
        name.removeprefix("--"): value for name, value in zip(command[::2], command[1::2], strict=True)
    }
    (tmp_path / "audit.yaml").write_text(yaml.safe_dump(options | {"part_size": 4}))
    assert main(["audit", "--config", str(tmp_path / "audit.yaml")]) == 0
    assert len(Audit.load(tmp_path / "audit")) == 20


def test_a_dataset_on_disk_with_splits(world, tmp_path, capsys):
    from datasets import DatasetDict

    DatasetDict(train=pairs(20), test=pairs(3)).save_to_disk(tmp_path / "data")
    command = audit_command(world, tmp_path / "audit")
    command[command.index("--dataset") + 1] = str(tmp_path / "data")
    assert main([*command, "--split", "validation"]) == 2
    assert "no split 'validation' but train, test" in capsys.readouterr().err
    assert main(command) == 0
    assert load_from_disk(tmp_path / "data")["train"].num_rows == len(Audit.load(tmp_path / "audit"))


def test_mistakes_end_in_a_sentence(world, tmp_path, capsys):
    command = audit_command(world, tmp_path / "audit")
    command[command.index("--dataset") + 1] = str(tmp_path / "none.jsonl")
    assert main(command) == 2
    assert "no dataset at" in capsys.readouterr().err
    assert main(["flag", str(tmp_path / "nothing"), "--feature", "3"]) == 2
    assert "holds no audit" in capsys.readouterr().err
    for name in ("audit", "flag", "filter"):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert "Example:" in " ".join(capsys.readouterr().out.split())


@pytest.mark.processes
def test_two_processes_share_an_audit_and_get_what_one_gets(world, tmp_path):
    assert main(audit_command(world, tmp_path / "one")) == 0
    program = "import sys; from trl_sae_audit.cli import main; sys.exit(main(sys.argv[1:]))"
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
        [*torchrun, str(tmp_path / "run.py"), *audit_command(world, tmp_path / "two")],
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
    assert one.features().equals(two.features())


def test_lookahead_influence_and_evidence(world, tmp_path, capsys):
    pairs(4, seed=8).to_json(tmp_path / "probe.jsonl")
    flags = tmp_path / "flags.yaml"
    out = tmp_path / "audit"
    assert main([*audit_command(world, out), "--evidence", "2"]) == 0
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
    assert main([*audit_command(world, out), *asked]) == 0
    shown = capsys.readouterr().out
    features = Audit.load(out).features()
    assert features["predicted_change"].abs().max() > 0
    written = features.set_index("feature")["predicted_sampled_change"].abs()
    assert written.max() > 0
    rows = shown[shown.index("writes") :].splitlines()[2:]
    assert rows[0].split()[0] == str(written.idxmax())
    assert max(map(len, rows[:10])) <= 80
    filtered = ["filter", "--dataset", str(world / "pairs.jsonl"), "--audit", str(out), "--flags", str(flags)]
    filtered += ["--score", '{"influence": 1, "attribution": 0.5}', "--quantile", "0.8"]
    assert main([*filtered, "--output_dir", str(tmp_path / "out")]) == 0
    assert "attribution before" in capsys.readouterr().out
