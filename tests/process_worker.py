"""Trainings in one and in several processes, on the same examples; leaves what every process saw and kept.

    python process_worker.py DIRECTORY PLAN…

A plan is CASES:PROCESSES or CASES:PROCESSES:ENGINE, with CASES separated by commas. The libraries are imported once and the
processes forked from there; started by torchrun, this is one of the processes itself and PLAN has its cases only.
"""

from __future__ import annotations

import copy
import functools
import gc
import os
import random
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from reference import StepRecorder
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from worlds import D_SAE, WORDS, make_dictionary, make_model, make_tokenizer

from trl_sae_audit import AuditError, FeatureAttributionCallback, FeatureScorer
from trl_sae_audit.record_writer import RecordWriter

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "gather", "scatter", "all_gather", "all_gather_into_tensor"),
    *(
        "reduce_scatter",
        "reduce_scatter_tensor",
        "all_to_all",
        "all_to_all_single",
        "barrier",
        "send",
        "recv",
    ),
    *(
        "all_gather_object",
        "gather_object",
        "broadcast_object_list",
        "scatter_object_list",
        "monitored_barrier",
    ),
)


class OwnCollectives:
    """What the package itself sends between processes while this is on: a (name, shape) each."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...] | None]] = []

    def __enter__(self) -> OwnCollectives:
        self._originals = {name: vars(torch.distributed)[name] for name in COLLECTIVES}
        for name, original in self._originals.items():
            setattr(torch.distributed, name, self._counted(name, original))
        return self

    def __exit__(self, *error: Any) -> None:
        for name, original in self._originals.items():
            setattr(torch.distributed, name, original)

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def collective(*args: Any, **kwargs: Any) -> Any:
            if _asked_by_the_package():
                shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else None
                self.calls.append((name, shape))
            return original(*args, **kwargs)

        return collective


def _asked_by_the_package() -> bool:
    """Whether the innermost frame that is neither torch's nor accelerate's is of the package."""
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "accelerate.", __name__)):
            return module.startswith("trl_sae_audit.")
        frame = frame.f_back
    return False


def run(
    trainer: Any,
    directory: Path,
    *,
    dictionaries: tuple[Any, ...] = (),
    recorder: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """Train with the callback, and say what was seen on this process."""
    callback = FeatureAttributionCallback(
        dictionaries or make_dictionary(),
        directory / "record",
        watch={"one": ("tiny", 1), "last": ("tiny", D_SAE - 1)},
        top_k=D_SAE,
        **{"examples": True, **options},
    )
    trainer.add_callback(callback)
    with OwnCollectives() as own:
        trainer.train()
    accelerator = trainer.accelerator
    return {
        "steps": [] if recorder is None else recorder.steps,
        "world_size": accelerator.num_processes,
        "engine": accelerator.distributed_type.value,
        "collectives": own.calls,
        "weights": weights(trainer.model),
        "writes": any(type(thing) is RecordWriter for thing in gc.get_objects()),
        "refusal": refusal(trainer.model),
    }


def refusal(model: Any) -> str | None:
    """What one is told who reads the model outside its training; None where that can be done."""
    try:
        FeatureScorer(model, make_tokenizer(), make_dictionary())
    except AuditError as error:
        return str(error)
    return None


def weights(model: Any) -> list[torch.Tensor]:
    """Of the whole model where it is FSDP's, of this process's part where it is ZeRO-3's."""
    whole = [
        parameter.full_tensor()
        if isinstance(parameter, DTensor)
        else vars(parameter).get("ds_tensor", parameter)
        for parameter in model.parameters()
    ]
    return [parameter.detach().clone() for parameter in whole]


def recorded(trainer: Any) -> StepRecorder:
    recorder = StepRecorder()
    recorder.watch(trainer)
    return recorder


# What trains: the same global batch in however many processes

GLOBAL_BATCH = 8
SETTINGS: dict[str, Any] = {"learning_rate": 0.05, "optim": "sgd", "max_grad_norm": 0.0}


def share_of_batch() -> int:
    return GLOBAL_BATCH // int(os.environ["WORLD_SIZE"])


def plain(directory: Path, **overrides: Any) -> Any:
    """DPO with plain gradient descent: 24 pairs, so that the second window of two micro-batches is a short one."""
    from trainers import BUILDERS

    settings = {**SETTINGS, "max_steps": 4, "per_device_train_batch_size": share_of_batch(), **overrides}
    return BUILDERS["DPO"](directory, **settings)


def dpo(directory: Path) -> dict[str, Any]:
    return run_all(plain(directory), directory)


def run_all(trainer: Any, directory: Path) -> dict[str, Any]:
    """With all that the callback can do: two dictionaries, token scores, examples and, where there may be one, a probe."""
    other = make_dictionary(seed=4, hook_point="model.layers.0", name="lower")
    probe = {"probe": ["w1 w2 w3", "w4 w5"], "probe_steps": 2}
    return run(
        trainer,
        directory,
        dictionaries=(make_dictionary(), other),
        token_scores=True,
        **({} if "zero3" in directory.parent.name else probe),
    )


def dpo_logged(directory: Path) -> dict[str, Any]:
    return run(plain(directory, logging_steps=1), directory, examples=False, token_scores=True)


def dpo_without(directory: Path) -> dict[str, Any]:
    trainer = plain(directory)
    trainer.train()
    return {"weights": weights(trainer.model), "world_size": trainer.accelerator.num_processes}


def dpo_loaded(directory: Path) -> dict[str, Any]:
    """The policy sharded with FSDP2 by transformers while it is loaded; accelerate leaves it as it is."""
    from trainers import arguments, pairs
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
    from trainers import BUILDERS

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
    from trainers import BUILDERS

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
    from trainers import arguments, labelled
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


def written(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """What a policy that ignores its weights answers: given by the prompt, the place in its group and the step."""
    tokenizer = trainer.processing_class
    answers, places = [], {}
    for prompt in prompts:
        place = places[prompt] = places.get(prompt, -1) + 1
        choose = random.Random(f"{prompt} {place % 4} {trainer.state.global_step}")
        words = " ".join(choose.choices(WORDS, k=choose.randint(1, 5)))
        answers.append([*tokenizer(words)["input_ids"], tokenizer.eos_token_id])
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": answers,
        "logprobs": None,
    }


def grpo_trainer(directory: Path, rewards: Any) -> Any:
    from trainers import arguments, prompts
    from trl import GRPOConfig, GRPOTrainer

    settings = {
        **SETTINGS,
        "per_device_train_batch_size": 16 // int(os.environ["WORLD_SIZE"]),
        "gradient_accumulation_steps": 1,
        "num_generations": 4,
        "max_completion_length": 6,
        "beta": 0.0,
    }
    return GRPOTrainer(
        make_model(make_tokenizer()),
        reward_funcs=rewards,
        args=GRPOConfig(**arguments(directory, **settings)),
        train_dataset=prompts(24),
        processing_class=make_tokenizer(),
        rollout_func=written,
    )


def grpo(directory: Path) -> dict[str, Any]:
    from trainers import reward_by_length

    return run(grpo_trainer(directory, reward_by_length), directory, token_scores=True)


def grpo_sampled(directory: Path) -> dict[str, Any]:
    """Every process samples answers of its own."""
    from trainers import BUILDERS

    trainer = BUILDERS["GRPO"](
        directory,
        learning_rate=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,
    )
    return run(trainer, directory, recorder=recorded(trainer), token_scores=True)


def grpo_one_sided(directory: Path) -> dict[str, Any]:
    """Process 0 has groups with better and worse answers, the others only groups whose answers are all alike."""
    from trainers import reward_by_length

    def rewards(completions: list[str], **columns: Any) -> list[float]:
        alike = int(os.environ["RANK"]) > 0
        return [1.0] * len(completions) if alike else reward_by_length(completions)

    return run(grpo_trainer(directory, rewards), directory, token_scores=True)


def scorer(directory: Path) -> dict[str, Any]:
    """Calibrated on 4 texts that count, for a first token does not; in 4 processes two have none of them."""
    PartialState(cpu=True)
    tokenizer = make_tokenizer()
    texts = ["w1 w2 w3", "w9 w4", "w20", "", "w7 w8 w9 w10", "w33 w1"]
    scores = FeatureScorer(make_model(tokenizer), tokenizer, make_dictionary()).calibrate(texts, shared=True)
    return {"size": scores.calibration_size, "mean": scores.mean, "deviation": scores.deviation}


def ppo(directory: Path) -> dict[str, Any]:
    """Prompts in their order, the likeliest answers, of one length, advantages as they are: nothing depends on the partition."""
    from ppo import ppo as build
    from trl.experimental.ppo import ppo_trainer

    def likeliest(model: Any, queries: Any, batch: int, pad: int, config: Any) -> Any:
        config = copy.deepcopy(config)
        config.do_sample, config.min_new_tokens = False, config.max_new_tokens
        return sampled(model, queries, batch, pad, config)

    sampled, ppo_trainer.batch_generation = ppo_trainer.batch_generation, likeliest
    ppo_trainer.masked_whiten = lambda values, mask, shift_mean=True: values
    loader = ppo_trainer.DataLoader
    ppo_trainer.DataLoader = lambda *args, **kwargs: loader(*args, **{**kwargs, "shuffle": False})
    trainer = build(
        directory,
        per_device_train_batch_size=share_of_batch() // 2,
        gradient_accumulation_steps=2,
        num_mini_batches=1,
        total_episodes=2
        * GLOBAL_BATCH,  # of the last batch there is accelerate makes a step of every micro-batch
        stop_token=None,
        **SETTINGS,
    )
    return run(trainer, directory, token_scores=True)


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    case.__name__: case
    for case in [
        *(dpo, dpo_logged, dpo_without, dpo_loaded, dpo_windows, sft_short, kto),
        *(grpo, grpo_sampled, grpo_one_sided, scorer, ppo),
    ]
}


# Engines that accelerate offers on GPUs only, under a trainer on CPUs


def launched_with(engine: str) -> None:
    """The environment in which `accelerate launch --config_file configs/accelerate/ENGINE.yaml` starts its processes."""
    path = Path(__file__).parent.parent / "configs" / "accelerate" / f"{engine}.yaml"
    options = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    options, defaults, _ = _validate_launch_command(options)
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        os.environ.update(prepare_deepspeed_cmd_env(options)[1])
    else:
        os.environ.update(prepare_multi_gpu_env(options))


def fsdp2() -> None:
    """accelerate's FSDP2, which it leaves out on CPUs without a word: the type of the run is put right before it looks."""
    launched_with("fsdp2")
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def zero(engine: str) -> None:
    """DeepSpeed over gloo, without the shared-memory operation that it would compile."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launched_with(engine)
    SETTINGS.update(use_cpu=False, ddp_backend="gloo")


ENGINES: dict[str, Callable[[], None]] = {
    "fsdp2": fsdp2,
    "zero2": functools.partial(zero, "zero2"),
    "zero3": functools.partial(zero, "zero3"),
}


# Processes


def one_process(rank: int, directory: Path, cases: list[str], processes: int, engine: str, port: int) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        LOCAL_WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    try:
        if engine:
            ENGINES[engine]()
        leave(directory / f"{engine or 'ddp'}{processes}", cases, rank)
    except BaseException:
        traceback.print_exc()
        raise


def leave(directory: Path, cases: list[str], rank: int) -> None:
    if torch.cuda.is_available():
        SETTINGS["use_cpu"] = False
    for name in cases:
        (directory / name).mkdir(parents=True, exist_ok=True)
        torch.save(CASES[name](directory / name), directory / name / f"rank{rank}.pt")


def main(directory: Path, plans: list[str]) -> None:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        leave(directory, plans, int(os.environ["RANK"]))
        return
    if any("zero" in plan for plan in plans):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401, once for all processes
    import trl  # noqa: F401, likewise

    for plan in plans:
        cases, processes, engine = (plan + ":").split(":")[:3]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(
            one_process,
            (directory, cases.split(","), int(processes), engine, port),
            int(processes),
            start_method="fork",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
