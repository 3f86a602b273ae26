"""The command line, as a user meets it."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.pages import all_known
from helpers.sae_training import make_texts, save_narrow_model

from trl_sae_audit import AuditError, __version__
from trl_sae_audit.cli import main as cli
from trl_sae_audit.cli.parser import parse_options

CONFIGS = Path(__file__).parents[2] / "configs"


def command_module(name: str) -> Any:
    return importlib.import_module(f"trl_sae_audit.cli.{cli.COMMANDS[name].module}")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from trl_sae_audit.cli.main import main; raise SystemExit(main())",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and preference pairs."""
    root = tmp_path_factory.mktemp("cli")
    save_narrow_model(root / "model")
    texts = make_texts(120)
    rows = [
        {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model": "model",
        "dataset": "pairs.jsonl",
        "hook_point": "blocks.1.hook_resid_post",
        "output_dir": "sae",
        "d_sae": 64,
        "k": 6,
        "training_tokens": 30_000,
        "sae_batch_size": 256,
        "lr": "1e-3",
    }
    (root / "train_sae.yaml").write_text(yaml.safe_dump(settings))
    return root


@pytest.fixture(scope="module")
def trained(directory: Path) -> subprocess.CompletedProcess[str]:
    """A dictionary in `directory/sae`, and what training it printed."""
    done = run("train-sae", "--config", "train_sae.yaml", "--seed", "5", cwd=directory)
    assert done.returncode == 0, done.stderr
    return done


class TestCommands:
    """A dictionary is trained and examined."""

    def test_train_sae(self, directory: Path, trained: subprocess.CompletedProcess[str]) -> None:
        done = trained
        for part in ("Saved in sae", "64 at model.layers.1", "FVU", "L0", "dead", "held-out"):
            assert part in done.stdout
        assert not done.stderr  # no progress bars where nobody looks
        metadata = json.loads((directory / "sae" / "cfg.json").read_text())["metadata"]
        assert (metadata["seed"], metadata["dataset_path"]) == (5, "pairs.jsonl")
        assert metadata["model_name"] == "model"

    @pytest.mark.usefixtures("trained")
    def test_an_sae_is_trained_again_from_its_manifest(self, directory: Path) -> None:
        done = run("train-sae", "--config", "sae", "--output_dir", "again", cwd=directory)
        assert done.returncode == 0, done.stderr
        one, two = (directory / name / "sae_weights.safetensors" for name in ("sae", "again"))
        assert one.read_bytes() == two.read_bytes()

    @pytest.mark.usefixtures("trained")
    def test_doctor(self, directory: Path) -> None:
        arguments = ("--model", "model", "--dataset", "pairs.jsonl", "--dictionary", "sae", "--json")
        done = run("doctor", *arguments, cwd=directory)
        assert done.returncode == 0, done.stderr
        diagnosis = json.loads(done.stdout)
        assert diagnosis["fits"] is True
        assert diagnosis["health"]["fvu"] < 0.5

    def test_dead_sae_ends_with_an_error(self, directory: Path) -> None:
        changes = ("--output_dir", "dead", "--architecture", "standard", "--sparsity_coefficient", "1e4")
        done = run("train-sae", "--config", "train_sae.yaml", *changes, cwd=directory)
        assert done.returncode == cli.USAGE_ERROR
        assert done.stderr.splitlines()[-1].startswith("trl-sae-audit: The SAE is dead")
        assert "Traceback" not in done.stderr
        assert (directory / "dead.failed").is_dir()
        assert not (directory / "dead").exists()


class TestTopLevel:
    def test_help_names_every_command(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--help"]) == 0
        printed = capsys.readouterr().out
        assert all(name in printed for name in cli.COMMANDS)

    def test_no_arguments_is_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([]) == 0
        assert capsys.readouterr().out.startswith("usage: trl-sae-audit COMMAND")

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"trl-sae-audit {__version__}\n"

    @pytest.mark.parametrize(
        ("name", "hint"), [("docter", "did you mean 'doctor'?"), ("xyz", "the commands are ")]
    )
    def test_unknown_command(self, name: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([name]) == cli.USAGE_ERROR
        error = capsys.readouterr().err
        assert f"There is no command {name!r}" in error
        assert hint in error


@pytest.mark.parametrize("command", cli.COMMANDS)
class TestEveryCommand:
    def test_help_explains_every_option(
        self, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        assert printed.startswith(f"usage: trl-sae-audit {command}")
        assert "example:" in printed
        assert "--config FILE.yaml" in printed
        assert "default: None" not in printed
        assert max(map(len, printed.splitlines())) <= 80
        for group in command_module(command).OPTIONS:
            for each in fields(group):
                assert (
                    f"--{each.name}" in printed
                    or f"--no_{each.name}" in printed
                    or each.metadata.get("positional")
                )

    def test_its_example_can_be_pasted(self, command: str) -> None:
        """Every line of it is a command that the parser accepts."""
        module = command_module(command)
        for line in module.EXAMPLE.replace("\\\n", " ").splitlines():
            program, name, *words = shlex.split(line)
            assert (program, name) == ("trl-sae-audit", command)
            parse_options(name, "", "", module.OPTIONS, words, known=all_known(module))

    def test_an_unknown_option(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main([command, "--confg", "x"]) == cli.USAGE_ERROR
        assert "There is no option --confg; did you mean --config?" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train-sae", "doctor"])
def test_missing_options(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--model", "m"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "--dataset" in error
    assert "--model" not in error
    assert error.count("\n") == 1


def test_the_same_words_everywhere() -> None:
    """What several commands take has one name."""
    names = {
        name: {each.name for group in command_module(name).OPTIONS for each in fields(group)}
        for name in cli.COMMANDS
    }
    for one in ("audit", "verify", "report"):
        assert {"model", "dataset", "dictionary", "sae_id", "hook_point", "split", "max_rows"} <= names[
            one
        ], one
    assert {"model", "dataset"} <= names["train-sae"] & names["doctor"]
    for command, options in names.items():
        assert not options & {"model_name_or_path", "dataset_name", "sae", "texts"}, command


def test_errors_are_one_sentence(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    common = ["--dataset", "pairs.jsonl", "--dictionary", "nowhere"]
    assert cli.main(["doctor", "--model", "model", *common]) == cli.USAGE_ERROR
    assert "'nowhere' is not a directory" in capsys.readouterr().err
    train = ["train-sae", "--dataset", "pairs.jsonl", "--hook_point", "model.layers.1", "--output_dir", "new"]
    assert cli.main([*train, "--model", "no/model"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "The model 'no/model' cannot be loaded" in error
    assert error.count("\n") == 1


def test_an_unknown_architecture_in_a_file_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    settings = yaml.safe_load((directory / "train_sae.yaml").read_text())
    (directory / "bad.yaml").write_text(yaml.safe_dump({**settings, "architecture": "magic"}))
    assert cli.main(["train-sae", "--config", "bad.yaml"]) == cli.USAGE_ERROR
    assert "'magic' is not one of topk" in capsys.readouterr().err


def test_exit_code_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake", "…"))
    module = type(sys)("trl_sae_audit.cli.fake")
    module.__dict__.update(DESCRIPTION="", EXAMPLE="", OPTIONS=(), run=lambda: 1)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert cli.main(["fake"]) == 1

    def fail() -> int:
        raise AuditError("No.")

    module.run = fail  # type: ignore[attr-defined]
    assert cli.main(["fake"]) == cli.USAGE_ERROR


def test_example_configuration_is_accepted() -> None:
    module = command_module("train-sae")
    _, texts, config, _ = parse_options(
        "train-sae", "", "", module.OPTIONS, ["--config", str(CONFIGS / "train_sae.yaml")]
    )
    assert texts.dataset == "pairs.jsonl"
    assert (config.k, config.lr) == (48, 1e-3)
