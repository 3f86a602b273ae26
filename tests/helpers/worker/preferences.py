"""DPO, KTO and SFT, whose examples stand in a dataset."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from helpers.worker.observed import recorded, run, run_all, weights
from helpers.worker.settings import GLOBAL_BATCH, SETTINGS, share_of_batch
from helpers.worlds import labelled, make_dictionary, make_model, make_sae_dictionary, make_tokenizer, pairs
from torch.utils.data import SequentialSampler

from trl_sae_audit import FeatureAttributionCallback, Sampling
from trl_sae_audit.errors import AuditError


def plain(directory: Path, **overrides: Any) -> Any:
    """DPO with plain gradient descent: 24 pairs, so that the second window of two micro-batches is a short one."""
    from helpers.trainers import BUILDERS

    settings = {**SETTINGS, "max_steps": 4, "per_device_train_batch_size": share_of_batch(), **overrides}
    return BUILDERS["DPO"](directory, **settings)


def dpo(directory: Path) -> dict[str, Any]:
    return run_all(plain(directory), directory)


def dpo_logged(directory: Path) -> dict[str, Any]:
    return run(plain(directory, logging_steps=1), directory, examples=False, token_scores=True)


def dpo_worded(directory: Path) -> dict[str, Any]:
    """The same micro-batches of two pairs in however many processes, with a dictionary that has an encoder, and so contexts."""
    steps = GLOBAL_BATCH // 2 // int(os.environ["WORLD_SIZE"])
    trainer = plain(
        directory, per_device_train_batch_size=2, gradient_accumulation_steps=steps, logging_steps=1
    )
    dictionary = make_sae_dictionary(name="tiny")
    return run(trainer, directory, dictionaries=(dictionary,), token_scores=True)


def dpo_without(directory: Path) -> dict[str, Any]:
    trainer = plain(directory)
    trainer.train()
    return {"weights": weights(trainer.model), "world_size": trainer.accelerator.num_processes}


def dpo_generating_far(directory: Path) -> dict[str, Any]:
    """To where the answers of the start say too little, so that they are sampled again."""
    return dpo_generating(directory, learning_rate=0.05, optim="adamw_torch")


def dpo_generating(directory: Path, **settings: Any) -> dict[str, Any]:
    """With the drift in generations; where that is refused, what the user is told."""
    trainer = plain(directory, **settings)
    trainer.add_callback(
        FeatureAttributionCallback(
            make_dictionary(),
            directory / "record",
            generations=Sampling(answers=3, max_new_tokens=6),
            generation_steps=2,
        )
    )
    try:
        trainer.train()
    except AuditError as error:
        return {"refusal": str(error)}
    return {"weights": weights(trainer.model), "world_size": trainer.accelerator.num_processes}


def dpo_loaded(directory: Path) -> dict[str, Any]:
    """The policy sharded with FSDP2 by transformers while it is loaded; accelerate leaves it as it is."""
    from helpers.trainers import arguments
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from trl import DPOConfig, DPOTrainer

    saved, processes = directory / "model", PartialState(cpu=True)
    if processes.is_main_process:
        make_model(make_tokenizer()).save_pretrained(saved)
    processes.wait_for_everyone()
    policy = AutoModelForCausalLM.from_pretrained(
        saved, distributed_config=DistributedConfig(fsdp_size=int(os.environ["WORLD_SIZE"]))
    )
    settings = {"max_length": 64, "max_steps": 4, "per_device_train_batch_size": share_of_batch(), **SETTINGS}
    trainer = DPOTrainer(
        policy,
        make_model(make_tokenizer(), seed=5),
        args=DPOConfig(**arguments(directory, **settings)),
        train_dataset=pairs(24),
        processing_class=make_tokenizer(),
    )
    return run_all(trainer, directory)


def dpo_windows(directory: Path) -> dict[str, Any]:
    """20 pairs by two and two, three micro-batches a step: the last window has two."""
    from helpers.trainers import BUILDERS

    trainer = BUILDERS["DPO"](
        directory,
        learning_rate=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_steps=-1,
        num_train_epochs=1,
    )
    trainer.train_dataset = trainer.train_dataset.select(range(20))
    return run(trainer, directory, recorder=recorded(trainer), token_scores=True)


def sft_short(directory: Path) -> dict[str, Any]:
    """22 texts by 8: the last batch has 6, of which in two processes the second gets two."""
    from helpers.trainers import BUILDERS

    trainer = BUILDERS["SFT"](
        directory,
        per_device_train_batch_size=share_of_batch(),
        gradient_accumulation_steps=1,
        max_steps=-1,
        num_train_epochs=1,
        accelerator_config={"even_batches": False},
        **SETTINGS,
    )
    trainer.train_dataset = trainer.train_dataset.select(range(22))
    return run(trainer, directory, token_scores=True)


def kto(directory: Path) -> dict[str, Any]:
    """In two or more processes one process has desirable rows only, another undesirable ones."""
    from helpers.trainers import arguments
    from trl import KTOConfig, KTOTrainer

    rows = labelled(24)
    rows = rows.remove_columns("label").add_column(
        "label", [(i % GLOBAL_BATCH) < GLOBAL_BATCH // 2 for i in range(24)]
    )
    tokenizer = make_tokenizer()
    trainer = KTOTrainer(
        make_model(tokenizer),
        make_model(tokenizer, seed=5),
        args=KTOConfig(
            **arguments(
                directory,
                max_length=64,
                beta=0.5,
                loss_type="apo_zero_unpaired",
                per_device_train_batch_size=share_of_batch(),
                gradient_accumulation_steps=1,
                **SETTINGS,
            )
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer._get_train_sampler = lambda *args: SequentialSampler(trainer.train_dataset)
    return run(trainer, directory)
