# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sae-audit[ppo]"]
#
# [tool.uv.sources]
# trl-sae-audit = { path = ".." }
# ///
"""PPO with SAE feature attribution of every optimizer step, of the policy only.

    pip install "trl-sae-audit[ppo]"        # TRL 1.12, the last release with PPO
    accelerate launch scripts/ppo.py --config configs/ppo/tiny.yaml
    accelerate launch scripts/ppo.py --help

The dataset has a column prompt: a file, a folder, what `save_to_disk` wrote, or one on the Hub. The policy and its reference are
--model_name_or_path; the reward model, and the value model that starts from it, are --reward_model_path.
"""

import sys
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_sae_audit.callbacks.arguments import AttributionArguments, attribution_callback
from trl_sae_audit.callbacks.output_dir import take_output_dir
from trl_sae_audit.callbacks.summary import diff_command, print_summary, report_command
from trl_sae_audit.data.opener import open_dataset

try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ModuleNotFoundError:
    sys.exit("This TRL has no PPO (the last release with it is 1.12): pip install 'trl-sae-audit[ppo]'")


def main(
    script_args: ScriptArguments,
    training_args: PPOConfig,
    model_args: ModelConfig,
    attribution_args: AttributionArguments,
) -> None:
    take_output_dir(training_args, attribution_args)
    peft_config = get_peft_config(model_args)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision, padding_side="left"
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token

    def policy() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path,
            revision=model_args.model_revision,
            dtype=model_args.dtype,
            attn_implementation=model_args.attn_implementation,
        )

    def scorer() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(
            training_args.reward_model_path, num_labels=1, dtype=model_args.dtype
        )

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = row["prompt"]
        if isinstance(prompt, str):
            return {"input_ids": tokenizer(prompt)["input_ids"]}
        return {
            "input_ids": tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        }

    rows = open_dataset(
        script_args.dataset_name,
        config=script_args.dataset_config,
        split=script_args.dataset_train_split,
        columns=("prompt",),
    )
    prompts = rows.map(tokenize, remove_columns=rows.column_names)
    attribution = attribution_callback(attribution_args, dataset=script_args.dataset_name)
    trainer = PPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy(),
        ref_model=None
        if peft_config
        else policy(),  # with an adapter, the policy without it is the reference
        reward_model=scorer(),
        value_model=scorer(),
        train_dataset=prompts,
        # PPOTrainer cannot do without; it samples from them num_sample_generations times in a run.
        eval_dataset=prompts.select(range(min(len(prompts), training_args.per_device_eval_batch_size))),
        peft_config=peft_config,
        callbacks=[attribution],
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
    if (record := attribution.record_directory) is not None:  # one process writes it
        print_summary(record, next_commands=[report_command(record), diff_command(record)])


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, PPOConfig, ModelConfig, AttributionArguments))
    main(*parser.parse_args_and_config())
