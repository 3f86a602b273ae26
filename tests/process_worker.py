"""Started by torchrun: trains with the callback and leaves what every process saw beside the record."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from reference import StepRecorder
from trainers import BUILDERS
from worlds import D_SAE, make_dictionary

from trl_sae_audit import FeatureAttributionCallback


def main(name: str, directory: Path) -> None:
    trainer = BUILDERS[name](
        directory,
        learning_rate=0.0,
        per_device_train_batch_size=2 if name == "DPO" else 4,
        gradient_accumulation_steps=3 if name == "DPO" else 1,
        max_steps=-1 if name == "DPO" else 2,
        num_train_epochs=1,
    )
    recorder = StepRecorder()
    recorder.watch(trainer)
    trainer.add_callback(
        FeatureAttributionCallback(
            make_dictionary(),
            directory / "record",
            watch={"one": 1},
            top_k=D_SAE,
            examples=True,
            token_scores=True,
        )
    )
    trainer.train()
    accelerator = trainer.accelerator
    torch.save(
        {
            "steps": recorder.steps,
            "world_size": accelerator.num_processes,
            "distributed": accelerator.use_distributed,
        },
        directory / f"rank{accelerator.process_index}.pt",
    )


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
