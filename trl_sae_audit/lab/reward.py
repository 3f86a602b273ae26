"""The lab's reward model: TRL's RewardTrainer on biased preferences."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from .wording import EOS

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RewardConfig:
    """Data and training of the reward model."""

    strengths: Mapping[str, float] = field(
        default_factory=lambda: {"right": 0.5, "agrees": 0.5, "padded": 0.5}
    )
    """The behaviours that its preference data rewards, and how strongly; see `preferences`."""
    pairs: int = 2000
    """Number of preference pairs it is trained on, once."""
    heldout_pairs: int = 500
    """Number of held-out pairs its accuracy is measured on."""
    batch_size: int = 32
    """Pairs in a step."""
    learning_rate: float = 1e-3
    """Learning rate of AdamW, falling linearly to 0."""


def train_reward_model(
    config: RewardConfig,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    dataset: "Dataset",
    seed: int,
) -> LlamaForSequenceClassification:
    """Train a reward model on a preference set with TRL's RewardTrainer, starting from the language model's weights.

    Args:
        config: Training.
        model: The language model; it is not changed.
        tokenizer: Its tokenizer.
        dataset: Columns `prompt`, `chosen`, `rejected`.
        seed: Of the new head and the order of the data.

    Returns:
        The reward model, in evaluation mode.
    """
    from trl import RewardConfig as RewardTrainingArguments
    from trl import RewardTrainer

    torch.manual_seed(seed)
    reward_config = type(model.config).from_dict({**model.config.to_dict(), "num_labels": 1})
    reward_model = LlamaForSequenceClassification(reward_config)
    reward_model.model.load_state_dict(model.model.state_dict())
    with tempfile.TemporaryDirectory() as scratch:
        trainer = RewardTrainer(
            model=reward_model,
            args=RewardTrainingArguments(
                output_dir=scratch,
                num_train_epochs=1,
                per_device_train_batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                lr_scheduler_type="linear",
                seed=seed,
                data_seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                dataloader_pin_memory=False,
                disable_tqdm=True,
            ),
            train_dataset=dataset.select_columns(["prompt", "chosen", "rejected"]),
            processing_class=tokenizer,
        )
        trainer.train()
    reward_model.config.use_cache = True
    return reward_model.eval()


@torch.no_grad()
def reward_scores(
    reward_model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    answers: list[str],
    batch_size: int = 256,
) -> torch.Tensor:
    """The reward of each answer, [n] float32."""
    texts = [f"{prompt} {answer} {EOS}" for prompt, answer in zip(prompts, answers, strict=True)]
    scores = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            texts[start : start + batch_size], padding=True, padding_side="right", return_tensors="pt"
        )
        batch = batch.to(reward_model.device)
        output = reward_model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        scores.append(output.logits[:, 0].float().cpu())
    return torch.cat(scores)
