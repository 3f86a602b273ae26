"""Every code block of README and docs: Python is run, shell lines are parsed by the programs they call.

`pages.py` says how a page marks what cannot be run.
"""

from __future__ import annotations

import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
import yaml
from conftest import ELSEWHERE
from datasets import Dataset
from helpers import pages, worlds
from helpers.pages import PAGES, ROOT, Block, blocks
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import trl_sae_audit
from trl_sae_audit import Audit, FeatureScorer, Flag, FlagSet, audit_preferences, load_dictionary

HAS_PPO = ELSEWHERE == "newest"
MOST_NOT_RUN = 6
RELEASED = re.compile(r'load_dictionary\("([\w.-]+)", "([\w.-]+)"[,)]')
FEATURES, ACTIVE = 2048, 400  # so that whichever index a page names, there is something to see of it


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a model, a dictionary, pairs, an audit of them, flags."""
    root = tmp_path_factory.mktemp("reader")
    tokenizer = worlds.make_tokenizer()
    for name, model in (
        ("model", worlds.make_model(tokenizer)),
        ("trained", worlds.make_model(tokenizer, seed=9)),
        ("reward_model", worlds.make_reward_model(tokenizer)),
    ):
        worlds.save_model(model, tokenizer, root / name)
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="model", hook_name="blocks.1.hook_resid_post")
    sae = TopKSAE(TopKSAEConfig(d_in=worlds.D_MODEL, d_sae=FEATURES, k=ACTIVE, metadata=metadata))
    sae.save_model(root / "sae")
    sae.save_model(root / "path" / "to" / "sae")
    worlds.pairs(12).to_json(root / "pairs.jsonl")
    worlds.pairs(6, seed=4).to_json(root / "held_out.jsonl")
    dictionary = load_dictionary(root / "sae")
    audit_preferences(
        AutoModelForCausalLM.from_pretrained(root / "model"),
        tokenizer,
        worlds.pairs(12),
        dictionary,
        output_dir=root / "runs" / "audit",
        lookahead=worlds.pairs(6, seed=4),
        progress=False,
    )
    flag = Flag(
        dictionary.name, 1423, "sycophancy", "agrees with a wrong belief", identity=dictionary.identity
    )
    FlagSet([flag]).save(root / "flags.yaml")
    return root


class Reader(dict[str, Any]):
    """The names a page uses without saying where they come from: what a TRL script has already.

    Public names of this package and of TRL, and the objects below, each made when it is first used.
    """

    def __init__(self) -> None:
        super().__init__(__name__="__main__")
        self.made: dict[str, Callable[[], Any]] = {
            "model": lambda: AutoModelForCausalLM.from_pretrained("model"),
            "reference_model": lambda: AutoModelForCausalLM.from_pretrained("model"),
            "reward_model": lambda: AutoModelForSequenceClassification.from_pretrained("reward_model"),
            "tokenizer": lambda: AutoTokenizer.from_pretrained("model"),
            "reward_tokenizer": lambda: AutoTokenizer.from_pretrained("reward_model"),
            "dictionary": lambda: load_dictionary("sae"),
            "dataset": lambda: Dataset.from_json("pairs.jsonl"),
            "pairs": lambda: Dataset.from_json("pairs.jsonl"),
            "held_out_pairs": lambda: Dataset.from_json("held_out.jsonl"),
            "prompts": lambda: worlds.prompts(16),
            "held_out_prompts": lambda: worlds.prompts(4),
            "audit": lambda: Audit.load("runs/audit"),
            "flags": lambda: FlagSet.load("flags.yaml"),
            "scorer": lambda: FeatureScorer(
                self["reference_model"], self["tokenizer"], self["dictionary"], pooling="mean"
            ),
            "my_reward": lambda: worlds.reward_by_length,
            "args": lambda: trl.DPOConfig("out", **SMALL),
        }

    def __missing__(self, name: str) -> Any:
        if name in self.made:
            self[name] = self.made[name]()
        elif name in trl_sae_audit.__all__:
            self[name] = getattr(trl_sae_audit, name)
        elif name in ("PPOConfig", "PPOTrainer") and HAS_PPO:
            self[name] = getattr(importlib.import_module("trl.experimental.ppo"), name)
        elif name.endswith(("Trainer", "Config")) and hasattr(trl, name):
            self[name] = getattr(trl, name)
        else:
            raise KeyError(name)
        return self[name]


SMALL = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


@pytest.fixture
def small_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a page asks of a trainer, two small steps on the CPU must do."""
    kinds = [trl.DPOConfig, trl.GRPOConfig, trl.RLOOConfig, trl.KTOConfig, trl.SFTConfig, trl.RewardConfig]
    if HAS_PPO:
        kinds.append(importlib.import_module("trl.experimental.ppo").PPOConfig)
    for kind in kinds:
        monkeypatch.setattr(kind, "__init__", _small(kind.__init__, kind.__name__))


def _small(original: Callable[..., None], kind: str) -> Callable[..., None]:
    own: dict[str, Any] = dict(SMALL)
    if kind in ("GRPOConfig", "RLOOConfig"):
        own |= {"num_generations": 4, "max_completion_length": 6}
    if kind == "PPOConfig":
        own |= {"total_episodes": 8, "response_length": 6, "num_sample_generations": 0}
        own |= {"per_device_train_batch_size": 2, "local_rollout_forward_batch_size": 8, "max_steps": -1}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        original(self, *args, **{**kwargs, **own})

    return __init__


def _here(block: Block) -> bool:
    return block.mark is None or (block.mark == "TRL 1.12" and HAS_PPO)


def _runs_here(page: Path) -> bool:
    found = blocks(page)
    if not any(block.language == "python" for block in found):
        return False
    return not HAS_PPO or any(block.mark == "TRL 1.12" for block in found)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if _runs_here(page)], ids=name_of)
def test_python_runs(
    page: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_training: None
) -> None:
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    reader = Reader()
    for block in blocks(page):
        if block.language != "python":
            continue
        # as many empty lines before it as the page has lines, so that a traceback names the page's line
        code = compile("\n" * (block.line - 1) + block.code, name_of(page), "exec")
        if _here(block):
            exec(code, reader)
    if page.name == "README.md":
        assert (reader["record"].status, reader["record"].last_step) == ("finished", 2)
        assert "sae/sycophancy/attribution" in reader["trainer"].state.log_history[0]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shell_lines_are_what_the_programs_take(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    shown = [block.code for block in blocks(page) if block.language in pages.SHELLS and _here(block)]
    for code in [*shown, *pages.inline_commands(page)]:
        for words in pages.shell_lines(code):
            if ("scripts/ppo.py" in words) != HAS_PPO:
                continue
            try:
                pages.check_command(words, monkeypatch)
            except (pages.LineError, SystemExit) as error:
                pytest.fail(f"{' '.join(words)}: {error}\n{capsys.readouterr().err}")


@pytest.mark.newest
def test_other_blocks_are_valid_and_few_are_not_run() -> None:
    found = [block for page in PAGES for block in blocks(page)]
    assert len(found) > 20
    not_run = [block for block in found if block.mark == "not run"]
    assert all(block.reason for block in not_run)
    assert len(not_run) <= MOST_NOT_RUN, [block.where for block in not_run]
    named = [pair for block in not_run for pair in RELEASED.findall(block.code)]
    assert named, "the names of released dictionaries are shown somewhere"
    for release, sae_id in named:
        assert sae_id in get_pretrained_saes_directory()[release].saes_map
    for block in found:
        if block.language in ("yaml", "yml"):
            yaml.safe_load(block.code)
        assert block.language in ("python", "yaml", "yml", "json", "text", "", *pages.SHELLS), block.where


@pytest.mark.newest
@pytest.mark.parametrize(
    "line",
    [
        "trl-sae-audit audit --modle ./model --dataset pairs.jsonl --dictionary ./sae --output_dir runs/audit",
        "trl-sae-audit audti",
        "trl-sae-audit flag --family 3 --label nothing",
        "accelerate launch scripts/dpo.py --config configs/dpo/tiny.yaml --watchh a=1",
        "python scripts/no_such.py",
        "make tests",
        "pip install .[everything]",
        "frobnicate --all",
    ],
)
def test_a_wrong_line_is_found(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (words,) = pages.shell_lines(line)
    with pytest.raises((pages.LineError, SystemExit, FileNotFoundError, ValueError)):
        pages.check_command(words, monkeypatch)
