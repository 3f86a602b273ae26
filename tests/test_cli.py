"""The command line, as a user meets it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from small_model import make_texts, save_model

from trl_sae_audit import AuditError, __version__, cli

CONFIGS = Path(__file__).parents[1] / "configs"


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from trl_sae_audit.cli import main; raise SystemExit(main())",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300, check=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model and preference pairs."""
    root = tmp_path_factory.mktemp("cli")
    save_model(root / "model")
    texts = make_texts(120)
    rows = [
        {"prompt": prompt + " ", "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(texts[::3], texts[1::3], texts[2::3], strict=True)
    ]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": "model",
        "texts": "pairs.jsonl",
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
def trained(world: Path) -> subprocess.CompletedProcess[str]:
    """A dictionary in `world/sae`, and what training it printed."""
    done = run("train-sae", "--config", "train_sae.yaml", "--seed", "5", cwd=world)
    assert done.returncode == 0, done.stderr
    return done


class TestCommands:
    """A dictionary is trained and examined."""

    def test_train_sae(self, world: Path, trained: subprocess.CompletedProcess[str]) -> None:
        done = trained
        for part in ("Saved in sae", "64 at model.layers.1", "FVU", "L0", "dead", "held-out"):
            assert part in done.stdout
        assert not done.stderr  # no progress bars where nobody looks
        metadata = json.loads((world / "sae" / "cfg.json").read_text())["metadata"]
        assert (metadata["seed"], metadata["dataset_path"]) == (5, "pairs.jsonl")
        assert metadata["model_name"] == "model"

    @pytest.mark.usefixtures("trained")
    def test_doctor(self, world: Path) -> None:
        arguments = ("--model_name_or_path", "model", "--texts", "pairs.jsonl", "--sae", "sae", "--json")
        done = run("doctor", *arguments, cwd=world)
        assert done.returncode == 0, done.stderr
        diagnosis = json.loads(done.stdout)
        assert diagnosis["fits"] is True
        assert diagnosis["health"]["fvu"] < 0.5

    def test_dead_sae_ends_with_an_error(self, world: Path) -> None:
        changes = ("--output_dir", "dead", "--architecture", "standard", "--sparsity_coefficient", "1e4")
        done = run("train-sae", "--config", "train_sae.yaml", *changes, cwd=world)
        assert done.returncode == cli.USAGE_ERROR
        assert done.stderr.splitlines()[-1].startswith("trl-sae-audit: The SAE is dead")
        assert "Traceback" not in done.stderr
        assert (world / "dead.failed").is_dir()
        assert not (world / "dead").exists()


class TestTopLevel:
    def test_help_is_fast_and_names_every_command(self) -> None:
        started = time.monotonic()
        done = run("--help")
        assert time.monotonic() - started < 3  # 0.1 s on an idle machine; torch alone takes several
        assert done.returncode == 0
        assert all(name in done.stdout for name in cli.COMMANDS)

    def test_help_imports_nothing_heavy(self) -> None:
        code = (
            "import sys; from trl_sae_audit.cli import main; main(['--help']); print('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "False"

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
        assert f"there is no command {name!r}" in error
        assert hint in error


@pytest.mark.parametrize("command", ["train-sae", "doctor"])
class TestEveryCommand:
    def test_help_explains_every_option(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
        printed = capsys.readouterr().out
        for part in (
            f"usage: trl-sae-audit {command}",
            "Example:",
            "--config FILE.yaml",
            "--model_name_or_path",
        ):
            assert part in printed
        assert "(default: None)" not in printed

    def test_missing_options(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main([command])
        assert end.value.code == 2
        assert "--model_name_or_path" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "the file of --config cannot be read"),
            ("a: [1", "is not valid YAML"),
            ("- a", "must contain a YAML mapping"),
            ("nonsense: 1", "nonsense"),
        ],
    )
    def test_bad_config_file(
        self,
        command: str,
        content: str | None,
        message: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        file = tmp_path / "config.yaml"
        if content is not None:
            file.write_text(content)
        required = ["--model_name_or_path", "m", "--texts", "t"]
        required += ["--sae", "s"] if command == "doctor" else ["--hook_point", "h", "--output_dir", "o"]
        assert cli.main([command, "--config", str(file), *required]) == cli.USAGE_ERROR
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

    def test_config_without_a_file(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            cli.main([command, "--config"])
        assert "--config: expected a file" in capsys.readouterr().err


def test_errors_are_one_sentence(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    common = ["--texts", "pairs.jsonl", "--sae", "nowhere"]
    assert cli.main(["doctor", "--model_name_or_path", "model", *common]) == cli.USAGE_ERROR
    assert "'nowhere' is not a directory" in capsys.readouterr().err
    train = ["train-sae", "--texts", "pairs.jsonl", "--hook_point", "model.layers.1", "--output_dir", "new"]
    assert cli.main([*train, "--model_name_or_path", "no/model"]) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert "the model 'no/model' cannot be loaded" in error
    assert error.count("\n") == 1


def test_an_unknown_architecture_in_a_file_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(world)
    settings = yaml.safe_load((world / "train_sae.yaml").read_text())
    (world / "bad.yaml").write_text(yaml.safe_dump({**settings, "architecture": "magic"}))
    assert cli.main(["train-sae", "--config", "bad.yaml"]) == cli.USAGE_ERROR
    assert "architecture is 'magic'; choose one of topk" in capsys.readouterr().err


def test_exit_code_of_a_command_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.COMMANDS, "fake", cli.Command("fake", "…"))
    module = type(sys)("trl_sae_audit.commands.fake")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.main = lambda argv: len(argv)  # type: ignore[attr-defined]
    assert cli.main(["fake", "a"]) == 1

    def fail(argv: object) -> int:
        raise AuditError("no")

    module.main = fail  # type: ignore[attr-defined]
    assert cli.main(["fake"]) == cli.USAGE_ERROR


def test_example_configuration_is_accepted() -> None:
    from trl_sae_audit.commands.arguments import ModelArguments, TextArguments, parse
    from trl_sae_audit.train_sae_config import TrainSAEConfig

    dataclasses = (ModelArguments, TextArguments, TrainSAEConfig)
    _, texts, config = parse("train-sae", "", dataclasses, ["--config", str(CONFIGS / "train_sae.yaml")])
    assert texts.texts == "pairs.jsonl"
    assert (config.k, config.lr) == (48, 1e-3)
