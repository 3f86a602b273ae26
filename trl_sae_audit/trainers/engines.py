"""What the engines that accelerate can put under a trainer (DDP, FSDP, DeepSpeed) mean for a gradient read in one process.

All engines supported here give every process its own rows, and the optimizer the mean of the processes' gradients;
where that is not so, the run is refused. FSDP and DeepSpeed's ZeRO-3 also keep only a part of the parameters in each process and
gather the others when the whole model runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import Trainer

from ..errors import AuditError
from ..models.residual_stream import Forward
from ..models.sharding import is_sharded

_REFUSED = {
    DistributedType.XLA: "PyTorch/XLA",
    DistributedType.MEGATRON_LM: "Megatron-LM",
}


def check_engine(trainer: Trainer) -> None:
    """Raises:
    AuditError: if the engine under the trainer divides a batch or a model in a way in which sums over the processes are
        not the gradient the optimizer uses.
    """
    accelerator = trainer.accelerator
    if accelerator.distributed_type in _REFUSED:
        raise AuditError(
            f"The run uses {_REFUSED[accelerator.distributed_type]}, whose gradients are not read here; train with DDP, FSDP or "
            "DeepSpeed."
        )
    if trainer.args.n_gpu > 1:
        raise AuditError(
            f"One process trains on {trainer.args.n_gpu} GPUs (torch.nn.DataParallel), whose copies of the model run at the "
            "same time, so their rows cannot be told apart; start a process for each GPU with accelerate launch or torchrun, "
            "or show it one GPU with CUDA_VISIBLE_DEVICES=0."
        )
    layout = accelerator.parallelism_config
    if layout is not None and layout.non_data_parallel_size > 1:
        raise AuditError(
            f"The run uses tensor, context or sequence parallelism: in groups of {layout.non_data_parallel_size} its processes "
            "work on the same rows, or each on a part of them, which the attribution would count wrongly. Use processes for "
            "data parallelism only (DDP, FSDP, DeepSpeed ZeRO)."
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_deepspeed(accelerator.state.deepspeed_plugin.deepspeed_config)


def check_deepspeed(config: Mapping[str, object]) -> None:
    """The same of DeepSpeed's own configuration."""
    if config.get("gradient_allreduce_op", "mean") != "mean":
        raise AuditError(
            "DeepSpeed's gradient_allreduce_op is not 'mean': the optimizer gets another multiple of the gradient than is "
            "recorded here; take it out of the DeepSpeed configuration."
        )
    for section in ("tensor_parallel", "torch_autocast"):
        if config.get(section):
            raise AuditError(
                f"The DeepSpeed configuration has a section {section}, with which the gradient read here may not be the "
                "optimizer's; take it out."
            )


def gradient_divisor(accelerator: Accelerator) -> float:
    """What a sum over processes of the gradients of the next backward pass is to be divided by, to be the optimizer's.

    Read it before the backward pass: DeepSpeed takes the optimizer step inside it, after which the loss scale is another.
    """
    return accelerator.num_processes * _loss_scale(accelerator)


def _loss_scale(accelerator: Accelerator) -> float:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        engine = accelerator.deepspeed_engine_wrapped.engine
        return float(engine.optimizer.cur_scale) if engine.fp16_enabled() else 1.0
    return 1.0 if accelerator.scaler is None else float(accelerator.scaler.get_scale())


def check_probe(accelerator: Accelerator) -> None:
    """Raises:
    AuditError: if the model cannot be run between two steps without disturbing the training.
    """
    if _is_zero3(accelerator):
        raise AuditError(
            "A probe cannot be used with DeepSpeed ZeRO-3: what it fetches for a forward pass of its own breaks the next "
            "backward pass. Take probe= out, or train with FSDP or ZeRO-2."
        )


def has_whole_head(trainer: Trainer) -> bool:
    """Whether the language head can be run by itself, in one process, between two steps."""
    return not _is_zero3(trainer.accelerator) and whole_forward(trainer) is None


def _is_zero3(accelerator: Accelerator) -> bool:
    return (
        accelerator.distributed_type == DistributedType.DEEPSPEED
        and accelerator.state.deepspeed_plugin.zero_stage == 3
    )


def whole_forward(trainer: Trainer) -> Forward | None:
    """How to run the model outside a step where its parameters are spread over the processes; None where they are not.

    FSDP gathers them for a forward pass of the whole model, in all processes at once.
    """
    if trainer.accelerator.distributed_type != DistributedType.FSDP and not is_sharded(trainer.model):
        return None
    device = trainer.accelerator.device

    def forward(batch: Mapping[str, Tensor]) -> object:
        return trainer.model_wrapped(
            **{name: value.to(device) for name, value in batch.items()}, use_cache=False
        )

    return forward
