"""DPO with SAE feature attribution of every optimizer step.

    accelerate launch scripts/dpo.py --config configs/dpo/tiny.yaml
    accelerate launch scripts/dpo.py --help

The data set is a JSONL or Parquet file, or one on the hub, with columns chosen and rejected, and prompt unless the
prompt is in them.
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

from trl_sae_audit.arguments import AttributionArguments, attribution_callback
from trl_sae_audit.datafiles import load_rows
from trl_sae_audit.summary import print_summary


def main(
    script_args: ScriptArguments,
    training_args: DPOConfig,
    model_args: ModelConfig,
    attribution_args: AttributionArguments,
) -> None:
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
        return load_rows(
            script_args.dataset_name,
            config=script_args.dataset_config,
            split=split,
            columns=("chosen", "rejected"),
        )

    trainer = DPOTrainer(
        model,
        args=training_args,
        train_dataset=rows(script_args.dataset_train_split),
        eval_dataset=rows(script_args.dataset_test_split) if training_args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        callbacks=[attribution_callback(attribution_args)],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.save_strategy != "no":
        trainer.save_model()
    if trainer.accelerator.is_main_process:
        print_summary(attribution_args.record_dir or f"{training_args.output_dir}/sae_audit")


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig, AttributionArguments))
    main(*parser.parse_args_and_config())
