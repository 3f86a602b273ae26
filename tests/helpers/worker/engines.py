"""Engines that accelerate offers on GPUs only, under a trainer on CPUs."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from helpers.worker.settings import SETTINGS


def launched_with(engine: str) -> None:
    """The environment in which `accelerate launch --config_file configs/accelerate/ENGINE.yaml` starts its processes."""
    path = Path(__file__).parents[3] / "configs" / "accelerate" / f"{engine}.yaml"
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
