"""`trl-sae-audit doctor --plan`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import RenderableType

from ..channel import OFFLOADED_TOKENS
from ..errors import AuditError
from ..plan import (
    OBJECTIVES,
    DictionaryShape,
    Machine,
    ModelShape,
    Options,
    Plan,
    RunShape,
    plan,
)
from ..terminal import OutputArguments, table
from .arguments import parse

DESCRIPTION = (
    "What would attribution cost this run? Extra FLOPs, time, memory, network and disk, by arithmetic, without loading a weight. The "
    "model is read from its configuration, or given in numbers. docs/cost.md says how far the figures were checked. "
    "Example: trl-sae-audit doctor --plan --parameters 70.6e9 --layers 80 --hidden_size 8192 --vocab_size 128256 "
    "--d_sae 65536 --processes 64"
)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass
class PlanModelArguments:
    """The model: its name, or numbers."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Directory with a config.json, or a name on the Hub. No weights are read."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model. Only for models you trust."}
    )
    parameters: float | None = field(
        default=None,
        metadata={"help": "Weights, such as 70.6e9; default 12 x layers x hidden_size^2 and embeddings."},
    )
    layers: int | None = field(default=None, metadata={"help": "Decoder layers."})
    hidden_size: int | None = field(default=None, metadata={"help": "Width of the residual stream."})
    vocab_size: int | None = field(default=None, metadata={"help": "Vocabulary."})

    def shape(self) -> ModelShape:
        if self.model_name_or_path is not None:
            from ..model_shape import load_shape  # transformers' models take seconds to import

            return load_shape(self.model_name_or_path, trust_remote_code=self.trust_remote_code)
        if self.layers is None or self.hidden_size is None or self.vocab_size is None:
            raise AuditError(
                "The model is not given: pass --model_name_or_path, or --layers, --hidden_size and --vocab_size."
            )
        parameters = None if self.parameters is None else round(self.parameters)
        _at_least(1, layers=self.layers, hidden_size=self.hidden_size, vocab_size=self.vocab_size)
        shape = ModelShape.of_numbers("the model", self.layers, self.hidden_size, self.vocab_size, parameters)
        if shape.active <= 0:
            raise AuditError(
                f"{self.parameters:g} parameters are fewer than embedding and head of {self.vocab_size} x "
                f"{self.hidden_size} take; correct one of them."
            )
        return shape


@dataclass
class PlanRunArguments:
    """The run, in TRL's words, and the dictionary."""

    d_sae: int | None = field(default=None, metadata={"help": "Features of the dictionary."})
    sae: str | None = field(
        default=None, metadata={"help": "Or a directory saved by sae-lens, whose cfg.json says it."}
    )
    dictionary_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "The type the dictionary is kept in."}
    )
    offload: bool = field(
        default=False,
        metadata={"help": "The dictionary stays in the host's memory (load_dictionary(offload=True))."},
    )
    layer: int | None = field(
        default=None, metadata={"help": "The layer whose output it reads, from 1; default the middle one."}
    )
    trainer: Literal["dpo", "kto", "reward", "sft", "grpo", "rloo"] = field(
        default="dpo",
        metadata={
            "help": "GRPO's and RLOO's generation is counted by its FLOPs, which is less than its time."
        },
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens a row, padding included."})
    answer_length: int | None = field(
        default=None, metadata={"help": "Those of them that enter the loss; default half."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Examples of a micro-batch."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Micro-batches of a step."})
    processes: int = field(default=1, metadata={"help": "Processes, one a GPU."})
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps."})
    logging_steps: int = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    gradient_checkpointing: bool = field(default=True, metadata={"help": "As TRL does by default."})
    record_top: int = field(
        default=20, metadata={"help": "Features recorded a step besides the watched ones."}
    )
    watched: int = field(default=1, metadata={"help": "Watched features."})
    token_scores: bool = field(
        default=False, metadata={"help": "Token share and activation attribution too."}
    )
    health_tokens: int = field(
        default=64, metadata={"help": "Tokens a log on which the SAE's fit is measured."}
    )
    probe_rows: int = field(
        default=0, metadata={"help": "Texts of max_length tokens in the probe; 0 for none."}
    )
    probe_steps: int = field(default=50, metadata={"help": "Optimizer steps between two looks at the probe."})
    flush_seconds: float = field(
        default=30.0, metadata={"help": "Seconds between two writings of the record."}
    )


@dataclass
class MachineArguments:
    """What a process computes with. Put in your own figures where you have them."""

    device: Literal["gpu", "cpu"] = field(default="gpu", metadata={"help": "Where the model lies."})
    tflops: float = field(
        default=400.0,
        metadata={"help": "Sustained by a training step, in 10^12 FLOPs a second (H100, bfloat16)."},
    )
    float32_tflops: float = field(
        default=40.0, metadata={"help": "Sustained by products in float32, in which scores are computed."}
    )
    link: float = field(default=12.0, metadata={"help": "10^9 bytes a second from the host to the GPU."})


def main(argv: Sequence[str]) -> int:
    model_arguments, run, machine, output = parse(
        "doctor --plan",
        DESCRIPTION,
        (PlanModelArguments, PlanRunArguments, MachineArguments, OutputArguments),
        argv,
    )
    model = model_arguments.shape()
    shapes = shapes_of(run, model)
    planned = plan(model, *shapes, machine_of(machine))
    output.show(document(model, *shapes, planned), *shown(model, *shapes, planned))
    return 0


def shapes_of(arguments: PlanRunArguments, model: ModelShape) -> tuple[RunShape, DictionaryShape, Options]:
    """What the arguments say, checked."""
    features = arguments.d_sae if arguments.sae is None else _d_sae(Path(arguments.sae), model)
    if features is None:
        raise AuditError(
            "The dictionary is not given: pass --d_sae, or --sae with a directory saved by sae-lens."
        )
    layer = (model.layers + 1) // 2 if arguments.layer is None else arguments.layer
    if not 1 <= layer <= model.layers:
        raise AuditError(f"There is no layer {layer}; the model has 1 to {model.layers}.")
    _at_least(
        1,
        d_sae=features,
        max_length=arguments.max_length,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        processes=arguments.processes,
        max_steps=arguments.max_steps,
        logging_steps=arguments.logging_steps,
        record_top=arguments.record_top,
        probe_steps=arguments.probe_steps,
    )
    _at_least(
        0, watched=arguments.watched, health_tokens=arguments.health_tokens, probe_rows=arguments.probe_rows
    )
    if arguments.token_scores and arguments.offload:
        raise AuditError(OFFLOADED_TOKENS)
    run = RunShape(
        objective=arguments.trainer,
        tokens=arguments.max_length,
        answer_tokens=arguments.answer_length or arguments.max_length // 2,
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        processes=arguments.processes,
        steps=arguments.max_steps,
        logging_steps=arguments.logging_steps,
        checkpointing=arguments.gradient_checkpointing,
    )
    dictionary = DictionaryShape(
        features, layer, _BYTES[arguments.dictionary_dtype], offload=arguments.offload
    )
    options = Options(
        top_k=min(arguments.record_top, features),
        watched=arguments.watched,
        token_scores=arguments.token_scores,
        health_tokens=arguments.health_tokens,
        probe_rows=arguments.probe_rows,
        probe_steps=arguments.probe_steps,
        flush_seconds=arguments.flush_seconds,
    )
    return run, dictionary, options


def machine_of(arguments: MachineArguments) -> Machine:
    for name in ("tflops", "float32_tflops", "link"):
        if not getattr(arguments, name) > 0:
            raise AuditError(f"{name} is {getattr(arguments, name)}; it must be above 0.")
    return Machine(
        accelerator=arguments.device == "gpu",
        flops=arguments.tflops * 1e12,
        float32_flops=arguments.float32_tflops * 1e12,
        link_bytes=arguments.link * 1e9,
    )


def document(
    model: ModelShape, run: RunShape, dictionary: DictionaryShape, options: Options, planned: Plan
) -> dict[str, Any]:
    """For --json: what was planned for, and every figure."""
    shares = {"flop_share": planned.flop_share, "time_share": planned.time_share}
    return {
        "model": model,
        "run": run,
        "dictionary": dictionary,
        "options": options,
        "plan": vars(planned) | shares,
    }


def shown(
    model: ModelShape, run: RunShape, dictionary: DictionaryShape, options: Options, planned: Plan
) -> Iterable[RenderableType]:
    """Two tables of 80 columns, and what they are of."""
    rows = OBJECTIVES[run.objective].rows
    kept = {4: "float32", 2: "16 bits"}[dictionary.weight_bytes]
    yield (
        f"{model.name}: {count(model.parameters)} weights, {model.layers} layers of {model.width:,}, vocabulary {model.vocabulary:,}\n"
        f"{run.objective.upper()}: {run.steps:,} steps, a log every {run.logging_steps}\n"
        f"a step: {run.processes:,} processes x {run.accumulation} x {run.batch} examples of {rows} x {run.tokens:,} tokens\n"
        f"dictionary: {dictionary.features:,} features after layer {dictionary.layer}, kept in {kept}"
        f"{', offloaded' if dictionary.offload else ''}"
    )
    step = [
        ("FLOPs of training", count(planned.train_flops), ""),
        *_parts("FLOPs", planned.flops, planned.train_flops, count),
        ("FLOPs, extra in all", count(sum(planned.flops.values())), percent(planned.flop_share)),
        ("time of training", seconds(planned.train_seconds), ""),
        *_parts("time", planned.seconds, planned.train_seconds, seconds),
        ("time, extra in all", seconds(sum(planned.seconds.values())), percent(planned.time_share)),
    ]
    if planned.network:
        share = percent(planned.network / planned.train_network)
        step.append(("network: gradients, added up", size(planned.train_network), ""))
        step.append(("network: scores, added up", size(planned.network), share))
    step.append(("disk: rows of the record", size(planned.disk_row), ""))
    yield table(
        "A step of one process",
        {"": "left", "amount": "right", "of training's": "right"},
        step,
    )
    held = [
        (f"{place}: {name}", size(value))
        for place, parts in (
            ("GPU", planned.device_memory),
            ("host", planned.host_memory),
            ("host, shared by its processes", planned.shared_memory),
        )
        for name, value in parts.items()
        if value >= 2**20 / 2
    ]
    totals = [
        (f"{place}, in all", size(sum(parts.values())))
        for place, parts in (("GPU", planned.device_memory), ("host", planned.host_memory))
        if parts
    ]
    yield table("Memory of a process", {"": "left", "bytes": "right"}, [*held, *totals])
    yield table(
        "The run",
        {"": "left", "amount": "right"},
        [
            ("time of training, by FLOPs alone", seconds(planned.run_seconds)),
            ("record on disk, at the end", size(planned.disk_row * run.steps + planned.disk_totals)),
            ("written, with every flush", size(planned.written)),
            ("an audit of the data before it, of training on them", percent(planned.audit)),
        ],
    )


def _parts(kind: str, parts: dict[str, float], whole: float, show: Any) -> Iterable[tuple[str, str, str]]:
    for name, value in parts.items():
        if value / whole >= 5e-6:
            yield f"{kind}: {name}", show(value), percent(value / whole)


def count(value: float) -> str:
    """1.23e12 → 1.23 T."""
    for factor, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value:.3g}"


def size(value: float) -> str:
    """Bytes, in powers of 1024."""
    for factor, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= factor:
            return (
                f"{value / factor:,.3g} {unit}" if value / factor < 1000 else f"{value / factor:,.0f} {unit}"
            )
    return f"{value:.0f} B"


def seconds(value: float) -> str:
    """A duration."""
    if value < 1e-3:
        return f"{1e6 * value:.3g} µs"
    if value < 1:
        return f"{1e3 * value:.3g} ms"
    if value < 600:
        return f"{value:.3g} s"
    return f"{value / 3600:.3g} h"


def percent(value: float) -> str:
    """A share, with two digits that count."""
    if value < 1e-5:
        return "< 0.001 %"
    return f"{100 * value:.2g} %" if value < 0.995 else f"{100 * value:,.0f} %"


def _d_sae(directory: Path, model: ModelShape) -> int:
    try:
        config = json.loads((directory / "cfg.json").read_text())
        features, width = int(config["d_sae"]), int(config["d_in"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AuditError(
            f"{directory} is no SAE saved by sae-lens ({error}); pass --d_sae instead."
        ) from error
    if width != model.width:
        raise AuditError(
            f"The SAE in {directory} reads {width} dimensions, but the model's width is {model.width}."
        )
    return features


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise AuditError(f"{name} is {value}; it must be at least {least}.")
