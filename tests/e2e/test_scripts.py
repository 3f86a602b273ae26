"""The scripts as a user starts them: own processes, real trainers, a tiny model on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import worlds
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

from trl_sae_audit import AuditError, RunRecord, Sampling
from trl_sae_audit.callbacks.arguments import (
    AttributionArguments,
    attribution_callback,
    load_dictionaries,
    parse_watch,
)
from trl_sae_audit.cli import main as cli
from trl_sae_audit.data.opener import open_dataset

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("[!a]*/*.yaml"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model, reward_model, dictionary and pairs.jsonl, as `make demo` leaves one."""
    directory = tmp_path_factory.mktemp("parts")
    tokenizer = worlds.make_tokenizer()
    worlds.save_model(worlds.make_model(tokenizer), tokenizer, directory / "model")
    worlds.save_model(worlds.make_reward_model(tokenizer), tokenizer, directory / "reward_model")
    worlds.save_sae(directory / "dictionary", model_name="tiny", hook_name="blocks.1.hook_resid_post")
    worlds.pairs(32).to_json(directory / "pairs.jsonl")
    return directory


def launch(*command: str | Path, parts: Path, output: Path, n: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a script on `parts` in `n` processes: by accelerate if one, by torchrun if several."""
    script, config, *options = map(str, command)
    scripts = Path(sys.executable).parent
    launcher = (
        [scripts / "accelerate", "launch", "--cpu", "--num_processes", "1"]
        if n == 1
        else [scripts / "torchrun", "--standalone", "--nproc_per_node", str(n)]
    )
    finished = subprocess.run(
        [
            *(*launcher, ROOT / "scripts" / script, "--config", ROOT / "configs" / config),
            *("--model_name_or_path", parts / "model", "--dataset_name", parts / "pairs.jsonl"),
            *("--dictionary", parts / "dictionary", "--output_dir", output, *options),
        ],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "120", "ACCELERATE_USE_CPU": "true"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    print(finished.stdout, finished.stderr, sep="\n")
    return finished


def check_run(
    finished: subprocess.CompletedProcess[str], record: Path, trainer: str, steps: int
) -> RunRecord:
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert "What the run taught" in finished.stdout
    assert finished.stdout.count("run record:") == 1, "one process speaks"
    read = RunRecord.load(record)
    assert (read.status, read.last_step, read.manifest["trainer"]) == ("finished", steps, trainer)
    assert (read.features()["attribution"] != 0).any()
    return read


def test_dpo(parts: Path, tmp_path: Path) -> None:
    finished = launch(
        *("dpo.py", "dpo/tiny.yaml", "--max_steps", "3", "--per_device_train_batch_size", "2"),
        *("--logging_steps", "1", "--watch", "praise=7", "--record_dir", tmp_path / "record"),
        parts=parts,
        output=tmp_path / "out",
    )
    record = check_run(finished, tmp_path / "record", "DPOTrainer", steps=3)
    assert "sae/praise/attribution" in finished.stdout
    assert record.manifest["config"]["watch"] == {"dictionary": {"praise": 7}}
    watched = record.steps().query("label == 'praise'")
    assert watched["step"].tolist() == [1, 2, 3]


@pytest.mark.newest
def test_a_second_run_has_a_directory_of_its_own_and_its_next_commands_work(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max_steps", "2", "--per_device_train_batch_size", "2", "--learning_rate", "1e-2")
    for seed, name in enumerate(("run", "run-2")):
        finished = launch(
            *("dpo.py", "dpo/tiny.yaml", *options, "--seed", str(seed)), parts=parts, output=tmp_path / "run"
        )
        record = tmp_path / name / "sae_audit"
        check_run(finished, record, "DPOTrainer", steps=2)
        assert f"run record: {record} (2 optimizer steps)" in finished.stdout
    assert f"{tmp_path / 'run'} has the model or checkpoints of an earlier run" in finished.stderr
    commands = finished.stdout[finished.stdout.index("next:") :].splitlines()[:2]
    for command, name in zip(commands, ("report", "verify"), strict=True):
        words = shlex.split(command.removeprefix("next:"))
        assert words == ["trl-sae-audit", name, str(record)]
        assert cli.main(words[1:]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "R²" in printed
    assert "These are pairs that the run trained on (the first 200" in printed
    assert cli.main(["diff", str(record), "--samples", "1", "--max_new_tokens", "8"]) == 0
    assert "What they write" in capsys.readouterr().out

    first = tmp_path / "run" / "sae_audit"
    document = verified(capsys, first)
    assert document["after"] == str(tmp_path / "run")
    assert verified(capsys, record)["after"] == str(tmp_path / "run-2")
    shutil.copy(tmp_path / "run-2" / "model.safetensors", tmp_path / "run" / "model.safetensors")
    for command in ("verify", "diff"):
        assert cli.main([command, str(first)]) == cli.USAGE_ERROR
        said = " ".join(capsys.readouterr().err.split())
        assert f"The model in {tmp_path / 'run'} is not the one that the run in {first} ended with" in said
    assert verified(capsys, first, "--after", str(tmp_path / "run-2"))["after"] == str(tmp_path / "run-2")


def verified(capsys: pytest.CaptureFixture[str], record: Path, *options: str) -> dict[str, Any]:
    """What `verify` of a run's record says, as a document."""
    assert cli.main(["verify", str(record), "--json", "--samples", "0", *options]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.newest
def test_a_run_that_did_not_finish_or_saved_nothing_names_no_model(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--max_steps", "2", "--per_device_train_batch_size", "2")
    launch("dpo.py", "dpo/tiny.yaml", *options, parts=parts, output=tmp_path / "run")
    manifest = tmp_path / "run" / "sae_audit" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"status": "running"}))
    for command, option in (("verify", "--after"), ("diff", "AFTER")):
        assert cli.main([command, str(manifest.parent)]) == cli.USAGE_ERROR
        said = " ".join(capsys.readouterr().err.split())
        assert "has not finished (it is 'running', at step 2)" in said
        assert f"as {option}." in said
    manifest.write_text(json.dumps(content))
    (tmp_path / "run" / "config.json").unlink()
    assert cli.main(["verify", str(manifest.parent)]) == cli.USAGE_ERROR
    said = " ".join(capsys.readouterr().err.split())
    assert f"trained into {tmp_path / 'run'}, but there is no model: trainer.save_model() saves it" in said


@pytest.mark.newest
@pytest.mark.processes
def test_dpo_in_two_processes_with_lora_saves_the_adapter(parts: Path, tmp_path: Path) -> None:
    finished = launch(
        *("dpo.py", "dpo/tiny.yaml", "--max_steps", "2", "--per_device_train_batch_size", "2"),
        *("--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj", "--save_strategy", "steps"),
        parts=parts,
        output=tmp_path,
        n=2,
    )
    record = check_run(finished, tmp_path / "sae_audit", "DPOTrainer", steps=2)
    assert record.manifest["processes"] == 2
    assert (tmp_path / "adapter_model.safetensors").is_file()


@pytest.mark.newest
def test_grpo_with_a_rule_and_a_function_of_ones_own(parts: Path, tmp_path: Path) -> None:
    finished = launch(
        *("grpo.py", "grpo/tiny.yaml", "--max_steps", "2", "--per_device_train_batch_size", "4"),
        *("--num_generations", "4", "--max_completion_length", "8"),
        *("--reward", "brevity", "tests.helpers.worlds:reward_by_length"),
        parts=parts,
        output=tmp_path,
    )
    check_run(finished, tmp_path / "sae_audit", "GRPOTrainer", steps=2)


@pytest.mark.ppo
def test_ppo(parts: Path, tmp_path: Path) -> None:
    finished = launch(
        *("ppo.py", "ppo/tiny.yaml", "--total_episodes", "8", "--per_device_train_batch_size", "2"),
        *("--gradient_accumulation_steps", "2", "--num_mini_batches", "1", "--response_length", "8"),
        *("--reward_model_path", parts / "reward_model"),
        parts=parts,
        output=tmp_path,
    )
    check_run(finished, tmp_path / "sae_audit", "PPOTrainer", steps=4)


@pytest.mark.newest
def test_ppo_says_what_to_install_where_trl_has_none() -> None:
    finished = subprocess.run(
        [sys.executable, ROOT / "scripts" / "ppo.py", "--help"], capture_output=True, text=True, check=False
    )
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1] == (
        "This TRL has no PPO (the last release with it is 1.12): pip install 'trl-sae-audit[ppo]'"
    )


# Configurations


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=[pytest.mark.ppo] if path.parent.name == "ppo" else [],
            id=f"{path.parent.name}/{path.stem}",
        )
        for path in CONFIGS
    ],
)
def test_every_configuration_is_read_by_its_script(path: Path) -> None:
    """Every name in it is an argument of the script; no model is loaded."""
    from trl import DPOConfig, GRPOConfig, ModelConfig, ScriptArguments, TrlParser

    sys.path.insert(0, str(ROOT))
    try:
        from scripts.grpo import RULES, GRPOArguments
    finally:
        sys.path.remove(str(ROOT))
    trainers = {"dpo": (ScriptArguments, DPOConfig), "grpo": (GRPOArguments, GRPOConfig)}
    if path.parent.name == "ppo":
        from trl.experimental.ppo import PPOConfig

        trainers["ppo"] = (ScriptArguments, PPOConfig)
    parser = TrlParser((*trainers[path.parent.name], ModelConfig, AttributionArguments))
    script, _, model, attribution = parser.parse_args_and_config(
        ["--config", str(path), "--use_cpu", "--bf16", "false"]
    )
    assert model.model_name_or_path
    assert script.dataset_name
    assert isinstance(attribution.dictionary, list)
    rewards = getattr(script, "reward", [])
    assert set([rewards] if isinstance(rewards, str) else rewards) <= set(RULES)
    for release in attribution.dictionary:
        for sae_id in attribution.sae_id or []:
            described = get_pretrained_saes_directory()[release]
            assert sae_id in described.saes_map
            assert described.model == model.model_name_or_path


# Arguments and rows


def test_arguments_in_every_form_yaml_allows() -> None:
    arguments = AttributionArguments(dictionary="a", sae_id="b", watch={"praise": 7, "markdown": 9})  # type: ignore[arg-type]
    assert (arguments.dictionary, arguments.sae_id) == (["a"], ["b"])
    assert parse_watch(arguments.watch or []) == {"praise": 7, "markdown": 9}


def test_every_argument_explains_itself() -> None:
    assert all(field.metadata["help"].endswith(".") for field in dataclasses.fields(AttributionArguments))


def test_watch_of_several_dictionaries() -> None:
    assert parse_watch(["praise=layer/12:7"]) == {"praise": ("layer/12", 7)}


@pytest.mark.parametrize("entry", ["praise", "praise=", "=7", "praise=seven", "praise=-7"])
def test_watch_that_cannot_be_read(entry: str) -> None:
    with pytest.raises(AuditError, match="write label=feature"):
        parse_watch([entry])


def test_a_label_given_twice() -> None:
    with pytest.raises(AuditError, match="'praise' is given to two"):
        parse_watch(["praise=7", "praise=8"])


def test_several_layers_from_directories(parts: Path) -> None:
    directory = str(parts / "dictionary")
    arguments = AttributionArguments(
        dictionary=[directory, directory], hook_point=["model.layers.0", "model.layers.2"]
    )
    assert [one.hook_point for one in load_dictionaries(arguments)] == ["model.layers.0", "model.layers.2"]


def test_as_many_hook_points_as_dictionaries(parts: Path) -> None:
    arguments = AttributionArguments(dictionary=[str(parts / "dictionary")], hook_point=["a", "b"])
    with pytest.raises(AuditError, match="1 dictionaries but 2 values of hook_point"):
        load_dictionaries(arguments)


def test_generations_with_prompts_from_a_file(parts: Path, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "w1"}]
    prompts = {"lines.txt": "w1 w2\n\nw3\n", "rows.jsonl": json.dumps({"prompt": talk}) + "\n"}
    for name, content in prompts.items():
        (tmp_path / name).write_text(content)
        arguments = AttributionArguments(
            dictionary=[str(parts / "dictionary")],
            generations=3,
            generation_tokens=9,
            generation_steps=7,
            generation_prompts=str(tmp_path / name),
        )
        config = attribution_callback(arguments).config
        assert config.generations == Sampling(answers=3, max_new_tokens=9)
        assert config.generation_steps == 7
        assert config.generation_prompts == {"lines.txt": ["w1 w2", "w3"], "rows.jsonl": [talk]}[name]
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(AuditError, match="no JSON object with a prompt"):
        attribution_callback(arguments)


def test_no_dictionary() -> None:
    with pytest.raises(AuditError, match="pass --dictionary"):
        load_dictionaries(AttributionArguments(dictionary=[]))


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    with pytest.raises(AuditError, match=r"has no column chosen and no column rejected \(it has prompt\)"):
        open_dataset(str(path), columns=("prompt", "chosen", "rejected"))


def test_no_rows_there(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="There is no dataset at"):
        open_dataset(str(tmp_path / "absent.jsonl"))
    with pytest.raises(AuditError, match="--dataset_name"):
        open_dataset(None)
