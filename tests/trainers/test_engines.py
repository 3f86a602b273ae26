"""Engines under a trainer: what is refused, what accelerate makes of our configurations, and DeepSpeed where it is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
)
from accelerate.utils import DistributedType
from helpers.processes import TESTS, assert_same_record, kept, start
from helpers.trainers import BUILDERS

from trl_sae_audit import AuditError
from trl_sae_audit.trainers.engines import check_deepspeed, check_engine, check_probe, gradient_divisor

pytestmark = pytest.mark.newest

CONFIGURATIONS = TESTS.parent / "configs" / "accelerate"


@pytest.mark.parametrize(
    ("name", "environment"),
    [
        ("cpu", {"ACCELERATE_USE_CPU": "True"}),
        ("gpus", {}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}),
    ],
)
def test_accelerate_reads_our_configurations(
    monkeypatch: pytest.MonkeyPatch, name: str, environment: dict[str, str]
) -> None:
    """As `accelerate launch --config_file` does, up to the environment of the processes it starts."""
    options = launch_command_parser().parse_args(
        ["--config_file", str(CONFIGURATIONS / f"{name}.yaml"), "script.py"]
    )
    options, defaults, _ = _validate_launch_command(options)
    if options.use_deepspeed:
        options.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        started = prepare_deepspeed_cmd_env(options)[1]
    elif options.use_cpu:
        started = {"ACCELERATE_USE_CPU": str(options.use_cpu)}
    else:
        started = prepare_multi_gpu_env(options)
    assert environment.items() <= started.items()
    assert options.use_fsdp == (name == "fsdp2")
    assert options.num_processes == (1 if name == "cpu" else 2)


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in CONFIGURATIONS.glob("*.yaml")} == {"cpu", "gpus", "fsdp2", "zero2", "zero3"}


class TestRefusals:
    @pytest.fixture
    def trainer(self, tmp_path: Path) -> Any:
        trainer = BUILDERS["DPO"](tmp_path)
        check_engine(trainer)
        return trainer

    def test_processes_that_share_rows(self, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        layout = ParallelismConfig(tp_size=2, cp_size=4)
        monkeypatch.setitem(type(trainer.accelerator.state)._shared_state, "parallelism_config", layout)
        with pytest.raises(AuditError, match="in groups of 8 its processes work on the same rows"):
            check_engine(trainer)

    def test_several_devices_in_one_process(self, trainer: Any) -> None:
        trainer.args._n_gpu = 2
        with pytest.raises(AuditError, match=r"2 GPUs .*start a process for each GPU"):
            check_engine(trainer)

    @pytest.mark.parametrize(
        ("kind", "name"), [(DistributedType.MEGATRON_LM, "Megatron-LM"), (DistributedType.XLA, "PyTorch/XLA")]
    )
    def test_engines_whose_gradients_are_not_known(
        self, trainer: Any, monkeypatch: pytest.MonkeyPatch, kind: DistributedType, name: str
    ) -> None:
        monkeypatch.setitem(type(trainer.accelerator.state)._shared_state, "distributed_type", kind)
        with pytest.raises(AuditError, match=f"uses {name}, whose gradients are not read here"):
            check_engine(trainer)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"gradient_allreduce_op": "sum"}, "is not 'mean'"),
            ({"tensor_parallel": {"autotp_size": 2}}, "section tensor_parallel"),
            ({"torch_autocast": {"enabled": True}}, "section torch_autocast"),
        ],
    )
    def test_options_of_deepspeed(self, config: dict[str, Any], words: str) -> None:
        with pytest.raises(AuditError, match=words):
            check_deepspeed(config)


def deepspeed(stage: int, scale: float | None) -> Any:
    """What is read of an accelerator on DeepSpeed, which need not be installed here."""
    optimizer = SimpleNamespace(cur_scale=scale)
    engine = SimpleNamespace(optimizer=optimizer, fp16_enabled=lambda: scale is not None)
    return SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        num_processes=4,
        scaler=None,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
        deepspeed_engine_wrapped=SimpleNamespace(engine=engine),
    )


def test_no_probe_under_zero_3() -> None:
    check_probe(deepspeed(2, None))
    with pytest.raises(AuditError, match="A probe cannot be used with DeepSpeed ZeRO-3"):
        check_probe(deepspeed(3, None))


def test_the_loss_scale_is_deepspeeds_own() -> None:
    assert gradient_divisor(deepspeed(2, None)) == 4
    assert gradient_divisor(deepspeed(2, 1024.0)) == 4096


@pytest.mark.deepspeed
@pytest.mark.processes
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_deepspeed_records_what_one_process_does(tmp_path: Path, stage: str) -> None:
    start(str(TESTS / "helpers" / "process_worker.py"), str(tmp_path), "dpo:1", f"dpo,dpo_without:2:{stage}")
    audited, alone = kept(tmp_path / f"{stage}2" / "dpo"), kept(tmp_path / f"{stage}2" / "dpo_without")
    assert [rank["engine"] for rank in audited] == ["DEEPSPEED", "DEEPSPEED"]
    assert [rank["refusal"] is None for rank in audited] == [stage == "zero2"] * 2
    assert_same_record(tmp_path / f"{stage}2" / "dpo", tmp_path / "ddp1" / "dpo")
    for one, other in zip(audited, alone, strict=True):
        assert all(map(torch.equal, one["weights"], other["weights"]))
