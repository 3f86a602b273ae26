"""What the studies on a real model share: the model, how it is trained, and what training would do."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.models.batches import batched
from trl_sae_audit.saes.compatibility import check_dictionary
from trl_sae_audit.saes.dictionary import FeatureDictionary

Pair = dict[str, Any]
WARMUP = 4
"""Steps over which the learning rate rises, from 0 in the first; without them AdamW's first steps, which go by the sign of
one batch's gradient, make up much of a short run."""
ADAPTER = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
"""What is trained where not all weights are."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The arguments every study on a real model takes."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "model", type=Path, help="directory of the model, see scripts/smollm.py and scripts/gemma.py"
    )
    made.add_argument("dictionary", type=Path, help="directory of its SAE, see trl-sae-audit train-sae")
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument(
        "--name", default=None, help="of the results; give another for a trial, so that none is overwritten"
    )
    return made


def add_sizes(
    made: argparse.ArgumentParser, sizes: Mapping[str, tuple[int, str]], learning_rate: float
) -> None:
    """Arguments of a study that trains: sizes (name → default, what it is) and the learning rate."""
    for name, (default, text) in sizes.items():
        made.add_argument(f"--{name}", type=int, default=default, help=text)
    made.add_argument("--learning_rate", type=float, default=learning_rate)


def parser_of_arms(
    description: str | None, sizes: Mapping[str, tuple[int, str]], arms: Iterable[str]
) -> argparse.ArgumentParser:
    """The arguments of a study of arms: pairs, sizes (name → default, what it is), learning rate, and which arms."""
    made = parser(description)
    made.add_argument(
        "pairs",
        type=Path,
        help="real preference pairs, as JSON lines; their answers tell the model's quality",
    )
    add_sizes(made, sizes, 5e-4)
    made.add_argument("--arms", nargs="+", choices=list(arms), default=list(arms))
    return made


def load_model(directory: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32 with its embeddings and head frozen, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        part.weight.requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(directory)


def dpo_config(directory: str | Path, **settings: Any) -> DPOConfig:
    """DPO on a CPU as both studies run it: AdamW, the learning rate constant after `WARMUP` steps, nothing saved."""
    return DPOConfig(output_dir=str(directory), precompute_ref_log_probs=True, **(_on_a_cpu() | settings))


def sft_config(directory: str | Path, **settings: Any) -> SFTConfig:
    """SFT likewise, on the completions alone."""
    return SFTConfig(output_dir=str(directory), completion_only_loss=True, **(_on_a_cpu() | settings))


def grpo_config(directory: str | Path, **settings: Any) -> GRPOConfig:
    """GRPO likewise: TRL's loss and advantages, no KL term."""
    return GRPOConfig(output_dir=str(directory), **(_on_a_cpu() | settings))


def _on_a_cpu() -> dict[str, Any]:
    return {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARMUP,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }


def train_dpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    args: DPOConfig,
    shape: Callable[[Dataset], Dataset] | None = None,
    adapter: LoraConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train `model` in place; returns the trainer's log, a row a step. `shape` may change the prepared dataset.

    With an `adapter` only that is trained, and merged into the weights at the end.
    """
    rows = Dataset.from_list(
        [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in pairs]
    )
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter,
        callbacks=list(callbacks),
    )
    if shape is not None:
        trainer.train_dataset = shape(trainer.train_dataset)
    return trained(trainer)


def trained(trainer: Trainer) -> list[dict[str, float]]:
    """Train, and merge the adapter if there is one; returns the log, a row a step."""
    trainer.train()
    if isinstance(trainer.model, PeftModel):
        trainer.model.merge_and_unload()
    return [row for row in trainer.state.log_history if "loss" in row]


def train_sft(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    answered: Sequence[Pair],
    args: SFTConfig,
    adapter: LoraConfig | None = None,
) -> list[dict[str, float]]:
    """Teach `model` the completions of rows of `prompt` and `completion`, in place; returns the log as `train_dpo` does."""
    rows = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in answered])
    return trained(
        SFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=adapter)
    )


def train_grpo(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    reward: Callable[..., list[float | None]],
    args: GRPOConfig,
    adapter: LoraConfig | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Teach `model` what the reward pays for, in place; `prompts` has a column prompt and whatever the reward reads."""
    return trained(
        GRPOTrainer(
            model,
            reward_funcs=reward,
            args=args,
            train_dataset=prompts,
            processing_class=tokenizer,
            peft_config=adapter,
            callbacks=list(callbacks),
        )
    )


def usual_step(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dictionary: FeatureDictionary,
    pairs: Sequence[Pair],
    probe: Sequence[Pair],
    args: DPOConfig,
) -> Lookahead:
    """A lookahead to the usual step of a run with these arguments, in the run's own mini-batches."""
    loss = PreferenceLoss(tokenizer, args)
    audited, held_out = (loss.tokenize(list(enumerate(rows))) for rows in (pairs, probe))
    return Lookahead(
        model,
        check_dictionary(dictionary, model),
        dictionary,
        loss,
        UpdateRule.from_args(args),
        lambda: batched(audited, args.per_device_train_batch_size),
        lambda: batched(held_out, 16),
    )
