"""`trl-sae-audit cost`: what attribution adds to a training run, by arithmetic; docs/cost.md says how far it was checked.

F features, d width, n examples of a process in an optimizer step, R rows of T tokens, S steps projected at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Literal

from ..console import table
from ..errors import AuditError
from .options import OutputArguments
from .parser import option

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DESCRIPTION = "What would attribution cost this run? By arithmetic, without loading a weight; it prints what it assumes."
EXAMPLE = "trl-sae-audit cost --model ./model --features 65536 --processes 8"

FLOAT = 4
CHUNK, TOKENS = 128 * 2**20, 64 * 2**20  # bytes at a time: of a dictionary; of activations [tokens, F]
MOST_BUFFERED_SCORES = 2**22  # F·S
TOTALS, TOTALS_OF_TOKENS = 328, 16  # bytes of running totals a feature, and more with token scores
TOTALS_SECONDS = 3e-8  # a feature and step, in numpy on one core; measured
ROWS, ROW_BYTES = 22, 36  # a step's, on disk: seven scores, which do not compress, are 28; measured
STEPPED, ANSWERS, PER_PROMPT, ANSWER, LOOKED = (
    4096,
    256,
    4,
    64,
    128,
)  # of the default lookahead, and of a look
GROUPS, DERIVATIVE = (
    4,
    3.2,
)  # passes along the step, and a pass's products beside those of a forward pass: measured, bench_prompts.py
GPU_FLOPS, GPU_FLOAT32_FLOPS, LINK_BYTES = 400e12, 40e12, 12e9  # a second: assumed, for an H100

Rows = list[tuple[str, str, str]]
OBJECTIVES = {"dpo": (2, 1), "kto": (1, 2), "reward": (2, 0), "sft": (1, 0), "grpo": (1, 1), "rloo": (1, 2)}
"""Rows of an example, and forward passes beside the one that is differentiated: a reference, or generation."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder; `active` are the weights of its layers that a token is multiplied with, so without idle experts."""

    name: str
    layers: int
    width: int
    vocabulary: int
    parameters: int
    active: int
    attention_width: int

    def layer_flops(self, tokens: int, layers: int) -> float:
        """A forward pass of a row through some layers; attention over all T², as kernels without a causal mask do it."""
        a_layer = 2 * self.active / self.layers + 4 * self.attention_width * tokens
        return layers * tokens * a_layer

    def head_flops(self, tokens: int) -> float:
        return 2.0 * self.width * self.vocabulary * tokens


@dataclass(frozen=True)
class RunShape:
    """F, the layer the dictionary reads (from 1), the run (T with padding, tokens of the loss, n …), and the callback's settings."""

    features: int
    layer: int
    objective: str = "dpo"
    tokens: int = 1024
    answer_tokens: int = 512
    batch: int = 8
    processes: int = 1
    steps: int = 1000
    logging_steps: int = 10
    checkpointing: bool = True
    on_gpu: bool = True
    token_scores: bool = False
    health_tokens: int = 64
    probe_rows: int = 0
    probe_steps: int = 50
    selection_tokens: int = 0
    generations: bool = False
    generation_steps: int = 50
    weight_bytes: int = FLOAT
    offload: bool = False

    @property
    def rows(self) -> int:
        return self.batch * OBJECTIVES[self.objective][0]

    def buffered_steps(self) -> int:
        """S: steps are projected at a log, after 10, or after 4,194,304 scores."""
        return max(1, min(self.logging_steps, 10, MOST_BUFFERED_SCORES // self.features))


@dataclass(frozen=True)
class CostEstimate:
    """Of one process, by part: FLOPs and seconds of an optimizer step; bytes of memory, `mapped` ones once a machine; bytes of a step
    over the network and in the record; `audit` as a share of training's FLOPs on the same data, and the one with its default lookahead
    as a share of the whole run's."""

    train_flops: float
    train_seconds: float
    flops: dict[str, float]
    seconds: dict[str, float]
    gpu: dict[str, float]
    host: dict[str, float]
    mapped: float
    network: float
    disk_row: float
    disk_totals: float
    audit: float
    default_audit: float

    @property
    def flop_share(self) -> float:
        return sum(self.flops.values()) / self.train_flops

    @property
    def time_share(self) -> float:
        return sum(self.seconds.values()) / self.train_seconds


def estimate_cost(model: ModelShape, run: RunShape) -> CostEstimate:
    """All of it. Over the network go, in float64, the step's gradient, three counts, and of every feature four sums, with token
    scores two more. A record's time bins are as wide as the smallest power of two that makes 64 enough."""
    F, trained, flops = run.features, train_flops(model, run), extra_flops(model, run)
    gpu, host = memory(model, run)
    bins = -(-run.steps // 2 ** max(0, math.ceil(math.log2(run.steps / 64))))
    sums = model.width + 3 + 4 * F + run.token_scores * (2 * F + 1)
    return CostEstimate(
        train_flops=trained,
        train_seconds=trained / GPU_FLOPS,
        flops=flops,
        seconds=extra_seconds(sum(flops.values()), model, run),
        gpu=gpu,
        host=host,
        mapped=(run.offload or not run.on_gpu) * 2.0 * F * model.width * run.weight_bytes,
        network=8.0 * sums * (run.processes > 1),
        disk_row=float((ROW_BYTES + 8 * run.token_scores) * ROWS),
        disk_totals=float(F * (TOTALS - FLOAT * (64 - bins) + TOTALS_OF_TOKENS * run.token_scores)),
        audit=audit_flops(model, run) / trained,
        default_audit=default_audit_flops(model, run) / (trained * run.steps),
    )


def train_flops(model: ModelShape, run: RunShape) -> float:
    """`R·(layers·(3 + c + f) + head·(4 + f))`: a backward pass is two forward passes, c = 1 more with gradient checkpointing, f
    passes beside. TRL's fused head makes its logits once more in the backward pass."""
    beside = OBJECTIVES[run.objective][1]
    layers = model.layer_flops(run.tokens, model.layers) * (3 + run.checkpointing + beside)
    return run.rows * (layers + model.head_flops(run.answer_tokens) * (4 + beside))


def audit_flops(model: ModelShape, run: RunShape) -> float:
    """Of an audit, without lookahead, of a step's data: forward, backward above the hook point to the activations alone, and the
    answers encoded. The reference is the model itself and costs nothing."""
    layers = model.layer_flops(run.tokens, 2 * model.layers - run.layer)
    encoded = 2.0 * run.features * model.width * run.answer_tokens
    return run.rows * (layers + 2 * model.head_flops(run.answer_tokens) + encoded)


def default_audit_flops(model: ModelShape, run: RunShape) -> float:
    """Of an audit of the run's data with its default lookahead: a gradient of every parameter for at most 4,096 examples, the others as
    above; answers sampled, and differentiated along the step of each of four groups, which takes 3.2 times a forward pass's products. A
    prompt is read once for its answers."""
    examples = run.batch * run.steps
    stepped = min(STEPPED, examples)
    layers = 3 * model.layer_flops(run.tokens, model.layers) + 3 * model.head_flops(run.answer_tokens)
    encoded = 2.0 * run.features * model.width * run.answer_tokens
    rows = OBJECTIVES[run.objective][0]
    prompt = run.tokens - run.answer_tokens
    a_token = model.layer_flops(prompt + ANSWER, model.layers) / (prompt + ANSWER)
    read = (ANSWERS / PER_PROMPT * prompt + ANSWERS * ANSWER) * a_token + ANSWERS * model.head_flops(ANSWER)
    looked = (1 + GROUPS * DERIVATIVE) * read + 2.0 * run.features * model.width * ANSWERS * ANSWER
    return (
        stepped * rows * (layers + encoded)
        + (examples - stepped) / run.batch * audit_flops(model, run)
        + looked
    )


def selection_budget(model: ModelShape, run: RunShape) -> int:
    """Tokens that the callback encodes a step, as callbacks.token_budget decides."""
    step = 8 * model.parameters * run.batch * 128
    products = 2 * run.features * model.width * (3 if run.token_scores else 1)
    return min(1024, max(16, int(0.02 * step / products)))


def extra_flops(model: ModelShape, run: RunShape) -> dict[str, float]:
    """Projected: the sums of the step and of its sides, and each example's deviation. What does not grow with F is left out."""
    F, d = run.features, model.width
    probed = model.layer_flops(run.tokens, run.layer) + 2.0 * F * d * (run.tokens - 1)
    return {
        "projection": 2.0 * F * d * (3 + run.batch),
        "fit": run.health_tokens * F * (4.0 * d + 2) / run.logging_steps,
        "selection": 2.0 * F * d * min(run.selection_tokens, run.rows * run.answer_tokens),
        "token scores": run.token_scores * 4.0 * F * (d + 1) * run.rows * run.answer_tokens,
        "drift in generations": run.generations * _look_flops(model, run) / run.generation_steps,
        "probe": run.probe_rows * probed * (1 / run.steps + 1 / run.probe_steps),
    }


def _look_flops(model: ModelShape, run: RunShape) -> float:
    """A forward pass over 64 prompts, each read once, and four answers to each of at most 128 tokens."""
    prompt, answer = run.tokens - run.answer_tokens, LOOKED
    read = ANSWERS / PER_PROMPT * model.layer_flops(prompt, model.layers)
    return read + ANSWERS * (model.layer_flops(answer, model.layers) + model.head_flops(answer))


def extra_seconds(flops: float, model: ModelShape, run: RunShape) -> dict[str, float]:
    """An offloaded decoder is sent once for every S steps, its encoder once a log; six scores of a feature and step come back."""
    F, sends = run.features, 1 / run.buffered_steps() + (run.health_tokens > 0) / run.logging_steps
    sent = 6.0 * FLOAT * F + run.offload * F * model.width * run.weight_bytes * sends
    products, transfer = flops / GPU_FLOAT32_FLOPS, run.on_gpu * sent / LINK_BYTES
    return {"products": products, "totals (one core)": TOTALS_SECONDS * F, "transfer": transfer}


def memory(model: ModelShape, run: RunShape) -> tuple[dict[str, float], dict[str, float]]:
    """Bytes where the model is, and on the host of a GPU. The encoder has two matrices, and the decoder is kept once more,
    normalised. At a log a score takes 80 bytes, 64 more where processes add it up."""
    F, d, S = run.features, model.width, run.buffered_steps()
    chunk = max(1, min(F, CHUNK // (FLOAT * max(d, 3 * S, run.batch))))
    converted = run.weight_bytes != FLOAT or (run.offload and run.on_gpu)
    totals = TOTALS + TOTALS_OF_TOKENS * run.token_scores
    near = {
        "dictionary": (run.on_gpu and not run.offload) * 3.0 * F * d * run.weight_bytes,
        "norms and chunks": float(FLOAT * (F + chunk * (d * converted + max(3 * S, run.batch)))),
        "gradients between logs": float(FLOAT * d * ((3 + run.batch) * S + run.rows)),
        "scores at a log": float((80 + 64 * (run.processes > 1)) * S * F),
        "activations": 4.0 * max(TOKENS, FLOAT * F),
        "token scores": run.token_scores * 2.0 * FLOAT * F * (S + run.batch),
    }
    host = {
        "totals": float(totals * F),
        "means since the last log": 32.0 * F,
        "writing (main process)": 2.0 * totals * F,
        "copies of scores": run.on_gpu * float((6 + 2 * run.token_scores) * S * FLOAT * F),
    }
    return (near, host) if run.on_gpu else ({}, near | host)


def load_shape(name_or_path: str) -> ModelShape:
    """Of a directory with a config.json, or of a model on the Hub; AuditError for what is no language model."""
    from transformers import AutoConfig

    try:
        return shape_of(AutoConfig.from_pretrained(name_or_path), name_or_path)
    except (OSError, ValueError) as error:
        raise AuditError(
            f"The configuration of {name_or_path!r} cannot be used ({' '.join(str(error).split())}); give a language model's."
        ) from error


def shape_of(config: PreTrainedConfig, name: str) -> ModelShape:
    import torch  # the model is laid out on the device `meta`, which has no memory
    from transformers import AutoModelForCausalLM

    from ..models.hook_points import layer_lists

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    text, lists = config.get_text_config(), layer_lists(model)
    if not lists:
        raise AuditError(f"{type(model).__name__} has no list of decoder layers, so its cost is not known.")
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    mixed = hasattr(text, "num_experts_per_tok")
    used = [
        text.num_experts_per_tok / getattr(text, each) for each in experts if mixed and hasattr(text, each)
    ]
    weights = [pair for path in lists for pair in model.get_submodule(path).named_parameters()]
    active = sum(w.numel() * (used[0] if ".experts." in path else 1.0) for path, w in weights if w.ndim > 1)
    given = text.head_dim if hasattr(text, "head_dim") else None
    heads = text.num_attention_heads * (given or text.hidden_size // text.num_attention_heads)
    layers, parameters = sum(lists.values()), model.num_parameters()
    return ModelShape(name, layers, text.hidden_size, text.vocab_size, parameters, round(active), heads)


@dataclass
class CostArguments:
    """The run."""

    model: str = option(
        "Directory with a config.json, or a name on the Hub.", aliases=["--model_name_or_path"]
    )
    features: int = option("Features of the dictionary.")
    trainer: Literal["dpo", "kto", "reward", "sft", "grpo", "rloo"] = option("Of TRL.", "dpo", main=True)
    processes: int = option("One a GPU.", 1, main=True)
    batch_size: int = option("Examples of a process in an optimizer step.", 8)
    max_length: int = option("Tokens of a row, padding included; half of them enter the loss.", 1024)
    max_steps: int = option("Optimizer steps.", 1000)
    offload: bool = option("The dictionary stays on the host: load_dictionary(offload=True).", False)
    generations: bool = option(
        "Look at sampled answers every 50 steps: generations=Sampling(answers=4).", False
    )


OPTIONS = (CostArguments, OutputArguments)


def run(arguments: CostArguments, output: OutputArguments) -> int:
    counts = (arguments.max_length, arguments.batch_size, arguments.processes, arguments.max_steps)
    if min(arguments.features, *counts) < 1:
        raise AuditError("A number of the run is 0 or less; each must be at least 1.")
    model = load_shape(arguments.model)
    layer, half = (model.layers + 1) // 2, counts[0] // 2
    given = (arguments.features, layer, arguments.trainer, counts[0], half, *counts[1:])
    shape = RunShape(*given, offload=arguments.offload, generations=arguments.generations)
    if not arguments.offload:
        shape = replace(shape, selection_tokens=selection_budget(model, shape))
    found = estimate_cost(model, shape)
    rows = [
        ("FLOPs of a step", format_count(found.train_flops), ""),
        *_parts("+ ", found.flops, format_count, found.train_flops),
        ("time of a step, by FLOPs", format_seconds(found.train_seconds), ""),
        *_parts("+ ", found.seconds, format_seconds, found.train_seconds),
        *_parts("", {"network, a step": found.network}, format_size, 2.0 * model.parameters),
        *_parts("GPU: ", found.gpu, format_size),
        *_parts("host: ", {**found.host, "dictionary, shared by processes": found.mapped}, format_size),
        ("record on disk, at the end", format_size(found.disk_row * shape.steps + found.disk_totals), ""),
        ("an audit before it, without lookahead", "", format_share(found.audit)),
        ("an audit of the run's data, by default", "", format_share(found.default_audit)),
    ]
    output.show(
        {"model": model, "run": shape, "cost": asdict(found)},
        table("A process", {"": "left", "attribution adds": "right", "to training's": "right"}, rows),
        f"Assumed: a dictionary in float32, after layer {layer} of {model.layers}; a log every {shape.logging_steps} steps; gradient "
        "checkpointing; no token scores, no probe; an H100: 400 TFLOP/s in training, 40 in float32, 12 GB/s from the host.",
    )
    return 0


def _parts(start: str, parts: dict[str, float], show: Callable[[float], str], whole: float = 0.0) -> Rows:
    return [(start + k, show(v), format_share(v / whole) if whole else "") for k, v in parts.items() if v]


def format_count(value: float, base: int = 1000, units: Sequence[str] = " kMGTPE") -> str:
    """1.23e12 → 1.23 T."""
    power = min(int(math.log(max(value, 1), base)), len(units) - 1)
    return f"{value / base**power:.{3 if value < 999.5 * base**power else 4}g} {units[power]}"


def format_size(value: float) -> str:
    return format_count(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def format_seconds(value: float) -> str:
    return f"{value / 3600:.3g} h" if value >= 600 else format_count(1e6 * value, 1000, ("µs", "ms", "s"))


def format_share(value: float) -> str:
    return "< 0.001 %" if value < 1e-5 else f"{100 * value:{'.2g' if value < 0.995 else ',.0f'}} %"
