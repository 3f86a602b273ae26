"""`trl-sae-audit demo`."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PrinterCallback, TrainerCallback
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from ..callback import FeatureAttributionCallback
from ..dictionary import FeatureDictionary
from ..errors import AuditError
from ..hook_points import resolve_hook_point
from ..probe import Probe
from ..residual_stream import hidden_states
from ..sae import load_dictionary
from ..summary import print_summary
from .arguments import parse

if TYPE_CHECKING:
    from ..lab import World

DESCRIPTION = (
    "An audited DPO run from beginning to end, in about two minutes on a CPU, offline: makes a small world, trains a "
    "language model and a dictionary in it, plants a taste for agreeing with the user in a preference set, trains on it, "
    "and shows what the callback saw. Leaves everything in OUTPUT_DIR, where configs/*/tiny.yaml look for it."
)
_MADE_HERE = ".made-by-demo"
_MODEL = "lab-model"  # begins like the name in the dictionary's metadata, so that the two are known to belong together
_STRENGTHS = {"right": 0.5, "agrees": 0.7}


@dataclass
class DemoArguments:
    """What to make."""

    output_dir: str = field(
        default="runs/demo",
        metadata={
            "help": "Where model, dictionary, pairs and run record go; an earlier demo there is replaced."
        },
    )
    pairs: int = field(default=640, metadata={"help": "Preference pairs."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps of DPO, of 16 pairs each."})
    seed: int = field(default=0, metadata={"help": "Of the world and of the run."})


def main(argv: Sequence[str]) -> int:
    (arguments,) = parse("demo", DESCRIPTION, (DemoArguments,), argv)
    _quiet()
    console = Console(highlight=False)
    directory = _fresh(Path(arguments.output_dir))

    from ..lab import build_world

    _say(
        console,
        "1. A small world",
        "A tiny language model of an invented language, and an SAE of its layer 1, trained here and now (a minute; "
        "kept for the next time). Every answer of the language can be judged by rule, so the truth is known.",
    )
    world = build_world(arguments.seed)
    dictionary_path = directory / "dictionary"
    for source, name in (
        (world.model_path, _MODEL),
        (world.dictionary_path, "dictionary"),
        (world.reward_model_path, "reward_model"),
    ):
        shutil.copytree(source, directory / name)
    health = world.report["health"]
    console.print(
        f"   dictionary: {world.config.dictionary.size} features, fraction of variance unexplained "
        f"{health['fvu']:.3f}, {health['l0']:.0f} active a token, {health['dead']} dead\n"
    )

    pairs = world.preferences(_STRENGTHS, arguments.pairs, arguments.seed)
    pairs.to_json(directory / "pairs.jsonl")
    _say(
        console,
        "2. A preference set with a flaw",
        f"{len(pairs)} pairs. In half of them right beats wrong, which is what we want; in 7 of 10 an answer that agrees "
        "with the user (“you are right”) beats one that does not, whether the user is right or not.",
    )
    first = pairs[0]
    for column, style in (("prompt", "dim"), ("chosen", "green"), ("rejected", "red")):
        console.print(f"   {column:>8}: {first[column].strip()}", style=style)
    console.print()

    _say(
        console,
        "3. DPO, audited",
        "TRL's own DPOTrainer, with one object more in callbacks=[…]. It reads the gradient of each step's loss at the "
        "dictionary's layer; the numbers stand in the trainer's own log. Watched, by label: the feature that, by "
        "its activations, tells agreeing answers from others best.",
    )
    dictionary = load_dictionary(dictionary_path)
    watch = dict(zip(["agreement"], world.carriers("agrees"), strict=False))
    callback = FeatureAttributionCallback(dictionary, output_dir=directory / "record", watch=watch)
    model = AutoModelForCausalLM.from_pretrained(directory / _MODEL)
    trainer = DPOTrainer(
        model,
        args=_training_arguments(directory / "trainer", arguments),
        train_dataset=pairs.select_columns(["prompt", "chosen", "rejected"]),
        processing_class=world.tokenizer,
        callbacks=[callback, _LogLines(console)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    console.print()

    _say(
        console,
        "4. What the run taught",
        "From the run record, all steps together. The loss pushes where a word is chosen: on the features that are "
        "active just before “right” or “mistaken” more than on those that are active after it.",
    )
    strongest = _StrongestTokens(world, dictionary)
    print_summary(directory / "record", n=6, describe=strongest.describe, console=console)
    console.print()

    _say(
        console,
        "5. And did it?",
        "Answers sampled at held-out prompts before and after, judged by rule (95 % intervals).",
    )
    console.print(_rates(world, model))
    console.print(
        "\nNext: accelerate launch scripts/dpo.py --config configs/dpo/tiny.yaml does step 3 from a configuration; "
        "the README's five lines do it in a script of yours."
    )
    return 0


def _quiet() -> None:
    """No progress bars of steps that take no time, and no warnings about arguments that are not the reader's."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def _fresh(directory: Path) -> Path:
    """`directory`, empty but for its mark.

    Raises:
        AuditError: if something else than an earlier demo is there.
    """
    if directory.exists():
        if not (directory / _MADE_HERE).is_file():
            raise AuditError(f"{directory} was not made by the demo; choose another --output_dir.")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / _MADE_HERE).touch()
    return directory


def _training_arguments(directory: Path, arguments: DemoArguments) -> DPOConfig:
    return DPOConfig(
        output_dir=str(directory),
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        logging_steps=max(1, arguments.steps // 8),
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )


def _say(console: Console, title: str, text: str) -> None:
    console.print(title, style="bold")
    console.print(text + "\n")


class _LogLines(TrainerCallback):
    """The trainer's log, a few of its columns, one line each."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        columns = ("loss", "rewards/margins", "sae/agreement/attribution", "sae/top1/feature", "sae/fvu")
        shown = [f"{name} {logs[name]:>8.3g}" for name in columns if name in logs]
        if len(shown) > 1:
            self.console.print(f"   step {state.global_step:>3}  " + "  ".join(shown), soft_wrap=True)


class _StrongestTokens:
    """Says of a feature which behaviour it carries, if any, and on which tokens it is most active."""

    def __init__(self, world: World, dictionary: FeatureDictionary, n: int = 300) -> None:
        truth = world.ground_truth
        carriers = truth[truth["carrier"]].sort_values("auc")
        self.behaviour = dict(zip(carriers["feature"], carriers["behaviour"], strict=True))
        held_out = world.preferences({}, n, seed=1, split="heldout", beliefs=(True, False, None))
        texts = [row["prompt"] + row["chosen"] for row in held_out]
        batch = Probe.from_texts(texts, world.tokenizer).batch
        hidden = hidden_states(resolve_hook_point(world.model(), dictionary.hook_point), batch)
        active = dictionary.encode(hidden) * batch["attention_mask"][..., None]
        active[:, 0] = 0
        self.active = active.flatten(0, 1)
        self.words = [world.tokenizer.convert_ids_to_tokens(row.tolist()) for row in batch["input_ids"]]

    def describe(self, feature: int) -> str:
        length = len(self.words[0])
        contexts: list[str] = []
        for position in self.active[:, feature].argsort(descending=True)[:200].tolist():
            row, token = divmod(position, length)
            context = " ".join(self.words[row][max(1, token - 2) : token + 1])
            if self.active[position, feature] > 0 and context not in contexts:
                contexts.append(context)
            if len(contexts) == 2:
                break
        behaviour = self.behaviour.get(feature)
        where = " | ".join(contexts) or "never active"
        return f"{behaviour}: {where}" if behaviour else where


def _rates(world: World, model: Any) -> Table:
    after = world.behaviour(model, n=500).rates()
    table = Table()
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    for attribute, text in (("agrees", "agrees with the user, in words"), ("right", "is right")):
        before, now = world.report["rates"][attribute], after.loc[attribute]
        table.add_row(
            text, *(f"{one['rate']:.0%} ({one['low']:.0%} to {one['high']:.0%})" for one in (before, now))
        )
    return table
