"""Started by torchrun: GRPO on a shaped reward; leaves what every process paid and knew."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from helpers.trainers import arguments
from helpers.worlds import make_dictionary, make_model, make_tokenizer, prompts, reward_by_length
from trl_sae_audit import AdaptivePenalty, FeatureScorer, Flag, FlagSet, ShapedReward, ShapingCallback

FLAGS = FlagSet([Flag("tiny", 3, "flattery"), Flag("tiny", 50, "length", weight=2.0, direction="down")])
CALIBRATION = [(f"w{i} w{i + 1} ", f"w{i + 2} w{(7 * i) % 50} w{i + 3}") for i in range(20)]


def scorer() -> FeatureScorer:
    tokenizer = make_tokenizer()
    return FeatureScorer(make_model(tokenizer, seed=5), tokenizer, make_dictionary()).calibrate(CALIBRATION)


class Asked(ShapedReward):
    """Keeps each batch: prompts, completions, what was paid, and the coefficients it was paid at."""

    def __call__(self, prompts: Any, completions: Any, **kwargs: Any) -> Any:
        answer = super().__call__(prompts, completions, **kwargs)
        batch = (prompts, completions, answer, self.shaper.penalty.coefficients())
        self.batches = [*vars(self).get("batches", []), batch]
        return answer


def main(directory: Path) -> None:
    shaped = Asked(reward_by_length, scorer(), FLAGS, AdaptivePenalty(target=-1.0))
    trainer = GRPOTrainer(
        make_model(make_tokenizer()),
        reward_funcs=shaped,
        args=GRPOConfig(
            **arguments(
                directory,
                num_generations=4,
                max_completion_length=6,
                beta=0.0,
                gradient_accumulation_steps=1,
                max_steps=4,
                save_strategy="steps",
                save_steps=4,
                logging_steps=1,
            )
        ),
        train_dataset=prompts(24),
        processing_class=make_tokenizer(),
        callbacks=[ShapingCallback(shaped)],
    )
    trainer.train()
    accelerator = trainer.accelerator
    left = {
        "batches": shaped.batches,
        "state": shaped.shaper.penalty.state_dict(),
        "log": trainer.state.log_history,
        "world_size": accelerator.num_processes,
    }
    torch.save(left, directory / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
