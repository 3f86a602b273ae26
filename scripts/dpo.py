# /// script
# requires-python = ">=3.11"
# dependencies = ["trl-sae-audit"]
#
# [tool.uv.sources]
# trl-sae-audit = { path = ".." }
# ///
"""DPO with SAE feature attribution of every optimizer step.

    accelerate launch scripts/dpo.py --config configs/dpo/tiny.yaml
    accelerate launch scripts/dpo.py --help

The dataset is a file, a folder, what `save_to_disk` wrote, or one on the Hub, with columns chosen and rejected, and prompt
unless the prompt is in them.
"""

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import (
    DPOConfig,
    DPOTrainer,
    ModelConfig,
    ScriptArguments,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)

from trl_sae_audit.callbacks.arguments import AttributionArguments, attribution_callback
from trl_sae_audit.callbacks.output_dir import take_output_dir
from trl_sae_audit.callbacks.summary import print_summary, report_command, verify_command
from trl_sae_audit.data.opener import open_dataset


def main(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    attribution_args: AttributionArguments,
) -> None:
    take_output_dir(training_args, attribution_args)
    tokenizer = AutoTokenizer.from_pretrained(
        model_args.model_name_or_path, revision=model_args.model_revision
    )
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        revision=model_args.model_revision,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        quantization_config=get_quantization_config(model_args),
    )

    def rows(split: str):
        return open_dataset(
            script_args.dataset_name,
            config=script_args.dataset_config,
            split=split,
            columns=("chosen", "rejected"),
        )

    attribution = attribution_callback(attribution_args, model, script_args.dataset_name)
    trainer = DPOTrainer(
        model,
        args=training_args,
        train_dataset=rows(script_args.dataset_train_split),
        eval_dataset=rows(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[attribution],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    if (record := attribution.record_directory) is not None:  # one process writes it
        print_summary(record, next_commands=[report_command(record), verify_command(record)])


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, AttributionArguments))
    main(*parser.parse_args_and_config())
