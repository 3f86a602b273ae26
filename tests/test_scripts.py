"""The scripts as a user starts them: own processes, real trainers, a tiny model on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from transformers import LlamaForSequenceClassification

from trl_sae_audit import AuditError, RunRecord
from trl_sae_audit.arguments import AttributionArguments, load_dictionaries, parse_watch
from trl_sae_audit.datafiles import load_rows

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "configs").glob("[!a]*/*.yaml"))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with model, reward_model, dictionary and pairs.jsonl, as `make demo` leaves one."""
    directory = tmp_path_factory.mktemp("parts")
    tokenizer = worlds.make_tokenizer()
    model = worlds.make_model(tokenizer)
    reward_model = worlds.make_reward_model(tokenizer)
    assert isinstance(reward_model, LlamaForSequenceClassification)
    for name, one in (("model", model), ("reward_model", reward_model)):
        one.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="tiny", hook_name="blocks.1.hook_resid_post")
    sae = StandardSAE(StandardSAEConfig(d_in=worlds.D_MODEL, d_sae=worlds.D_SAE, metadata=metadata))
    sae.save_model(directory / "dictionary")
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
    assert record.manifest["watch"] == {"dictionary": {"praise": 7}}
    watched = record.steps().query("label == 'praise'")
    assert watched["step"].tolist() == [1, 2, 3]


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
        *("--reward", "brevity", "tests.worlds:reward_by_length"),
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


def test_no_dictionary() -> None:
    with pytest.raises(AuditError, match="pass --dictionary"):
        load_dictionaries(AttributionArguments(dictionary=[]))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet", "pairs.csv", "saved"])
def test_rows_of_every_kind_of_file(name: str, tmp_path: Path) -> None:
    rows = worlds.pairs(3)
    path = tmp_path / name
    if name == "saved":
        rows.save_to_disk(path)
    elif name.endswith("parquet"):
        rows.to_parquet(path)
    elif name.endswith("csv"):
        rows.to_csv(path)
    else:
        rows.to_json(path, compression="gzip" if name.endswith("gz") else None)
    assert load_rows(str(path), columns=("prompt",)).to_list() == rows.to_list()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    with pytest.raises(AuditError, match=r"has no column chosen and no column rejected \(it has prompt\)"):
        load_rows(str(path), columns=("prompt", "chosen", "rejected"))


def test_no_rows_there(tmp_path: Path) -> None:
    with pytest.raises(AuditError, match="no data file"):
        load_rows(str(tmp_path / "absent.jsonl"))
    with pytest.raises(AuditError, match="--dataset_name"):
        load_rows(None)
