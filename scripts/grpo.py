# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sae-audit"]
#
# [tool.uv.sources]
# trl-sae-audit = { path = ".." }
# ///
"""GRPO with SAE feature attribution of every optimizer step.

    accelerate launch scripts/grpo.py --config configs/grpo/tiny.yaml
    accelerate launch scripts/grpo.py --help

The dataset has a column prompt, and whatever else the reward reads: a file, a folder, what `save_to_disk` wrote, or one on the Hub.
The reward is one of the rules below, or any function of yours, named as my.module:function.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_sae_audit import AuditError
from trl_sae_audit.callbacks.arguments import AttributionArguments, attribution_callback
from trl_sae_audit.callbacks.output_dir import take_output_dir
from trl_sae_audit.callbacks.summary import diff_command, print_summary, report_command
from trl_sae_audit.data.opener import open_dataset
from trl_sae_audit.models.rewards import load_reward, names_function

Reward = Callable[..., list[float]]


def brevity(completions: list[Any], **columns: Any) -> list[float]:
    """A tenth of a point off for every word."""
    return [-0.1 * len(text_of(completion).split()) for completion in completions]


def finishes(completions: list[Any], **columns: Any) -> list[float]:
    """One point for ending with a full stop, an exclamation mark or a question mark."""
    return [float(text_of(completion).rstrip().endswith((".", "!", "?"))) for completion in completions]


def contains_answer(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """One point for saying, anywhere, what the data set's column `answer` holds."""
    return [
        float(str(right).strip().lower() in text_of(completion).lower())
        for completion, right in zip(completions, answer, strict=True)
    ]


RULES: dict[str, Reward] = {rule.__name__: rule for rule in (brevity, finishes, contains_answer)}


@dataclass
class GRPOArguments(ScriptArguments):
    reward: list[str] = field(
        default_factory=lambda: ["brevity"],
        metadata={
            "help": "What is rewarded: brevity (fewer words), finishes (ends a sentence), contains_answer (the data set's "
            "column answer), or a function of yours as my.module:function. Several are added up."
        },
    )


def main(
    script_args: GRPOArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    attribution_args: AttributionArguments,
) -> None:
    take_output_dir(training_args, attribution_args)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side="left"
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )
    rewards = [script_args.reward] if isinstance(script_args.reward, str) else script_args.reward
    attribution = attribution_callback(attribution_args, model, script_args.dataset_name)
    trainer = GRPOTrainer(
        model,
        reward_funcs=[find_reward(name) for name in rewards],
        args=training_args,
        train_dataset=open_dataset(
            script_args.dataset_name,
            config=script_args.dataset_config,
            split=script_args.dataset_train_split,
            columns=("prompt",),
        ),
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[attribution],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if (record := attribution.record_directory) is not None:  # one process writes it
        print_summary(record, next_commands=[report_command(record), diff_command(record)])


def find_reward(name: str) -> Reward:
    """A rule of this script by its name, or `module:function` of a module installed or in the current directory.

    Raises:
        AuditError: if it is neither.
    """
    if name in RULES:
        return RULES[name]
    if not names_function(name):
        raise AuditError(
            f"There is no reward {name!r}; take one of {', '.join(RULES)} or name a function as my.module:function."
        )
    return load_reward(name)


def text_of(completion: Any) -> str:
    """A completion's text, whether it came as a string or as a list of messages."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


if __name__ == "__main__":
    parser = TrlParser((GRPOArguments, GRPOConfig, ModelConfig, AttributionArguments))
    main(*parser.parse_args_and_config())
