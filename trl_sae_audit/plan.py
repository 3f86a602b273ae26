"""What attribution costs a training run, by arithmetic: FLOPs, memory, network and disk. Numbers in, numbers out.

Symbols, in every docstring: F features, d width of the residual stream, n examples of a process in an optimizer step, R rows and
T tokens of each, N processes, S optimizer steps between two projections, P weights, V vocabulary. A product of [a, b] with
[b, c] is 2abc FLOPs. Where a constant was measured and not derived, its comment says so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .totals import BYTES_PER_EXTRA, BYTES_PER_FEATURE

FLOAT = 4
MIB = 2**20
BLOCK = 128 * MIB
"""Of a dictionary, and of what it is multiplied with, at a time; see `FeatureDictionary.blocks`."""

TOKENS = 64 * MIB
"""Of activations [tokens, F] at a time; see `FeatureDictionary.tokens_at_once`."""

MOST_BUFFERED_SCORES = 2**22
"""Features times steps projected at once."""

HOST_SECONDS = 3e-8
"""A feature and an optimizer step: totals and window in numpy, one core. Measured; see docs/cost.md."""

ROW_BYTES = 36
"""A row of the record on disk: seven scores, which do not compress, are 28. Measured; see docs/cost.md."""


@dataclass(frozen=True)
class Objective:
    """How often a trainer runs the model over an example.

    Attributes:
        rows: sequences of an example.
        forwards: passes beside the one that is differentiated: the reference, or the tokens generated one by one.
    """

    rows: int
    forwards: int


OBJECTIVES = {
    "dpo": Objective(2, 1),
    "kto": Objective(
        1, 2
    ),  # policy and reference on another's answer for the KL term: two, and the reference
    "reward": Objective(2, 0),
    "sft": Objective(1, 0),
    "grpo": Objective(1, 1),  # generation; its default has no reference
    "rloo": Objective(1, 2),  # generation and the reference
}


@dataclass(frozen=True)
class ModelShape:
    """A decoder.

    Attributes:
        name: what to call it.
        layers, width, vocabulary: L, d, V.
        parameters: weights in all.
        active: weights of the layers that a token is multiplied with: all but embedding, head and idle experts.
        attention_width: heads × head dimension.
    """

    name: str
    layers: int
    width: int
    vocabulary: int
    parameters: int
    active: int
    attention_width: int

    @classmethod
    def of_numbers(
        cls, name: str, layers: int, width: int, vocabulary: int, parameters: int | None = None
    ) -> ModelShape:
        """From the usual proportions: 12·d² weights a layer; or `parameters` less embedding and head, 2·V·d."""
        outside = 2 * vocabulary * width
        inside = 12 * layers * width**2 if parameters is None else parameters - outside
        return cls(name, layers, width, vocabulary, inside + outside, inside, width)

    def layer_flops(self, tokens: int, layers: int | None = None) -> float:
        """A forward pass of a row of T tokens through l layers: `(2·P + 4·A·L·T)·T·l/L`.

        P the layers' active weights, A the attention width; attention is counted over all T², as kernels without a causal mask do.
        """
        share = 1.0 if layers is None else layers / self.layers
        return share * tokens * (2 * self.active + 4 * self.attention_width * self.layers * tokens)

    def head_flops(self, tokens: int) -> float:
        """The language-model head on some tokens: `2·d·V` each."""
        return 2.0 * self.width * self.vocabulary * tokens


@dataclass(frozen=True)
class RunShape:
    """A training run.

    Attributes:
        objective: a key of `OBJECTIVES`.
        tokens: T of a row, padding included.
        answer_tokens: those of them whose logits enter the loss.
        batch, accumulation: examples of a micro-batch of one process, micro-batches of an optimizer step.
        processes: N, each with a copy (or a shard) of the model.
        steps, logging_steps: optimizer steps in all, and between two logs.
        checkpointing: layers are run forward again in the backward pass (TRL's default).
        weight_bytes: of a weight's gradient, as the processes add them up.
    """

    objective: str = "dpo"
    tokens: int = 1024
    answer_tokens: int = 512
    batch: int = 4
    accumulation: int = 1
    processes: int = 1
    steps: int = 1000
    logging_steps: int = 10
    checkpointing: bool = True
    weight_bytes: int = 2

    @property
    def examples(self) -> int:
        """n: of one process in an optimizer step."""
        return self.batch * self.accumulation

    @property
    def rows(self) -> int:
        """R: of one process in an optimizer step."""
        return self.examples * OBJECTIVES[self.objective].rows


@dataclass(frozen=True)
class DictionaryShape:
    """A dictionary: F, the type its matrices are kept in, the layer whose output it reads (counted from 1), and where it lies."""

    features: int
    layer: int
    weight_bytes: int = 4
    encoder: bool = True
    offload: bool = False


@dataclass(frozen=True)
class Options:
    """What is asked of the callback; as `FeatureAttributionCallback` has them."""

    top_k: int = 20
    watched: int = 1
    token_scores: bool = False
    health_tokens: int = 64
    probe_rows: int = 0
    probe_steps: int = 50
    flush_seconds: float = 30.0


@dataclass(frozen=True)
class Machine:
    """What a process computes with; to be set to one's own measurements.

    Attributes:
        accelerator: whether the model lies on a GPU; the host's memory is apart from its own then.
        flops: sustained by a training step, a second.
        float32_flops: sustained by products in float32, in which scores are computed.
        link_bytes: a second from the host's memory to the accelerator, pageable.
    """

    accelerator: bool = True
    flops: float = 400e12
    float32_flops: float = 40e12
    link_bytes: float = 12e9


@dataclass(frozen=True)
class Plan:
    """One dictionary in one run. FLOPs, seconds and network are those of one process and one optimizer step, on average.

    Attributes:
        train_flops: of the step without the callback.
        flops: extra, by part. seconds: extra, by part. train_seconds: of the step without.
        device_memory, host_memory: extra bytes of a process, by part; host memory that is shared by the processes of a
            machine, as a mapped file is, is in `shared_memory`.
        network: bytes that a process adds up with the others; `train_network` those of the gradients.
        disk_row: bytes of rows a step. disk_totals: bytes of the file of totals, which is replaced at every flush.
        written: bytes written in the whole run.
        run_seconds: of the whole run without.
        audit: of an audit of as many examples before training: its cost as a share of training on them once.
    """

    train_flops: float
    flops: dict[str, float]
    train_seconds: float
    seconds: dict[str, float]
    device_memory: dict[str, float]
    host_memory: dict[str, float]
    shared_memory: dict[str, float]
    network: float
    train_network: float
    disk_row: float
    disk_totals: float
    written: float
    run_seconds: float
    audit: float

    @property
    def flop_share(self) -> float:
        """Extra FLOPs as a share of the step's."""
        return sum(self.flops.values()) / self.train_flops

    @property
    def time_share(self) -> float:
        """Extra seconds as a share of the step's."""
        return sum(self.seconds.values()) / self.train_seconds


def train_flops(model: ModelShape, run: RunShape) -> float:
    """A step without the callback: `R·(layers·(3 + c + f) + head·(4 + f))`.

    A backward pass is two forward passes, c = 1 more with gradient checkpointing, f passes beside. The head, on the answer's
    tokens, makes its logits once more in the backward pass instead of keeping them (TRL's fused head). Checkpointing that is not
    reentrant stops before a layer's last product, which makes the step up to 5 % cheaper than this.
    """
    others = OBJECTIVES[run.objective].forwards
    layers = model.layer_flops(run.tokens) * (3 + run.checkpointing + others)
    return run.rows * (layers + model.head_flops(run.answer_tokens) * (4 + others))


def extra_flops(
    model: ModelShape, run: RunShape, dictionary: DictionaryShape, options: Options
) -> dict[str, float]:
    """Products that the callback adds to a step.

    projection `2·F·d·(3 + n)`: the sums of the step, of each side, and each example's deviation for the standard error.
    sums by side `2·3·R·d`: two sides and the whole out of the rows' gradients.
    coverage `2·k·d`: the gradient in the span of the k features logged (its singular values are not counted).
    health, once a log: `(4·d + 2)·F` a token, to encode it, to decode it, to count what is active.
    token scores `4·F·d` a token of the loss: projected and encoded.
    probe, before training and every so many steps: the layers up to the dictionary's, and `2·F·d` a token to encode it, but for
    the first of each row.
    """
    F, d = dictionary.features, model.width
    flops = {
        "projection": 2.0 * F * d * (3 + run.examples),
        "sums by side": 2.0 * 3 * run.rows * d,
        "coverage": 2.0 * options.top_k * d,
    }
    if options.health_tokens and dictionary.encoder:
        flops["health"] = options.health_tokens * F * (4.0 * d + 2) / run.logging_steps
    if options.token_scores:
        flops["token scores"] = 4.0 * F * d * run.rows * run.answer_tokens
    if options.probe_rows:
        below = model.layer_flops(run.tokens, dictionary.layer) + 2.0 * F * d * (run.tokens - 1)
        flops["probe"] = options.probe_rows * below * (1 / run.steps + 1 / options.probe_steps)
    return flops


def buffered_steps(features: int, logging_steps: int) -> int:
    """S: steps are projected at a log, after 64, or after 4,194,304 / F."""
    return max(1, min(logging_steps, 64, MOST_BUFFERED_SCORES // features))


def dictionary_bytes(model: ModelShape, dictionary: DictionaryShape) -> float:
    """Decoder and encoder as they are kept, `F·d` weights each."""
    return (1.0 + dictionary.encoder) * dictionary.features * model.width * dictionary.weight_bytes


def device_memory(
    model: ModelShape, run: RunShape, dictionary: DictionaryShape, options: Options, machine: Machine
) -> dict[str, float]:
    """Where the model is, in bytes.

    dictionary: nothing if it is offloaded, or mapped because the model is on the host; else decoder, and with an encoder both
    its matrices, `F·d` each.
    norms `4·F`. blocks: 128 MiB of rows where they are converted or sent, and as much of products `[max(3S, n), w]`.
    gradients between logs: `4·d·(3 + n)` a step, and a row's sum `4·d·R` while a step is under way.
    scores at a log: 80 bytes for each of `[S, F]`: four kinds in float64 and what they are made of, then the scores in float32; 64
    more where they are added up over processes.
    activations, with health, probe or token scores: four of 64 MiB. token scores: `8·F` a buffered step and micro-batch.
    """
    F, d = dictionary.features, model.width
    S = buffered_steps(F, run.logging_steps)
    width = max(1, min(F, BLOCK // (FLOAT * max(d, 3 * S, run.examples))))
    converted = dictionary.weight_bytes != FLOAT or (dictionary.offload and machine.accelerator)
    memory = {
        "norms": float(FLOAT * F),
        "blocks": float(FLOAT * width * (d * converted + max(3 * S, run.examples))),
        "gradients between logs": float(FLOAT * d * ((3 + run.examples) * S + run.rows)),
        "scores at a log": float((80 + 64 * (run.processes > 1)) * S * F),
    }
    if machine.accelerator and not dictionary.offload:
        memory["dictionary"] = dictionary_bytes(model, dictionary) * (1.5 if dictionary.encoder else 1.0)
    if (options.health_tokens and dictionary.encoder) or options.probe_rows or options.token_scores:
        memory["activations"] = 4.0 * max(TOKENS, FLOAT * F)
    if options.token_scores:
        memory["token scores"] = 2.0 * FLOAT * F * (S + run.accumulation)
    return memory


def host_memory(
    run: RunShape, dictionary: DictionaryShape, options: Options, machine: Machine
) -> dict[str, float]:
    """Of each process, in bytes.

    totals: 328 a feature (eight sums in float64, two counts, 64 time bins in float32), 16 more with token scores.
    window: means since the last log, four in float64. writing: the totals twice over, on the main process while it flushes.
    copies: scores of S steps, six of `[S, F]`, where the model is not on the host.
    """
    F = dictionary.features
    totals = BYTES_PER_FEATURE + (2 * BYTES_PER_EXTRA if options.token_scores else 0)
    memory = {"totals": float(totals * F), "window": 32.0 * F, "writing (main process)": 2.0 * totals * F}
    if machine.accelerator:
        copies = 6 + 2 * options.token_scores
        memory["copies of scores"] = float(copies * buffered_steps(F, run.logging_steps) * FLOAT * F)
    return memory


def network_bytes(model: ModelShape, dictionary: DictionaryShape, options: Options) -> float:
    """What the processes add up in a step, in float64: `8·(d + 3 + 4·F)`, and `8·(2·F + 1)` more with token scores.

    The step's gradient, three counts, and of every feature its sum, those of the sides and the second moment. In a ring each
    process sends `2·(N − 1)/N` times that.
    """
    F = dictionary.features
    return 8.0 * (model.width + 3 + 4 * F + (2 * F + 1 if options.token_scores else 0))


def disk_bytes(dictionary: DictionaryShape, options: Options, steps: int) -> tuple[float, float]:
    """Of the record: rows a step, `36·(k + watched + 1)`, and the totals at the end, `72 + 4·bins` a feature.

    A time bin is as many steps wide as the smallest power of two that makes 64 of them enough.
    """
    extras = 2 * BYTES_PER_EXTRA if options.token_scores else 0
    row = (ROW_BYTES + (8 if options.token_scores else 0)) * (options.top_k + options.watched + 1)
    width = 2 ** max(0, math.ceil(math.log2(steps / 64)))
    bins = -(-steps // width)
    return float(row), float(dictionary.features * (BYTES_PER_FEATURE - FLOAT * (64 - bins) + extras))


def extra_seconds(
    flops: dict[str, float],
    model: ModelShape,
    run: RunShape,
    dictionary: DictionaryShape,
    options: Options,
    machine: Machine,
) -> dict[str, float]:
    """Time that the callback adds to a step of a process.

    products: the FLOPs at float32's rate. totals: `3e-8·F` seconds of one core (measured). transfer: of an offloaded
    dictionary, its decoder once for every S steps, and its encoder for health once a log and for every 64 MiB of the probe's
    activations (token scores are refused then); scores come back, six of `4·F` a step.
    """
    F = dictionary.features
    seconds = {
        "products": sum(flops.values()) / machine.float32_flops,
        "totals (one core)": HOST_SECONDS * F,
    }
    if machine.accelerator:
        sent = 6.0 * FLOAT * F
        if dictionary.offload:
            one = float(F * model.width * dictionary.weight_bytes)
            sent += one / buffered_steps(F, run.logging_steps)
            sent += one / run.logging_steps if options.health_tokens and dictionary.encoder else 0.0
            passes = -(-options.probe_rows * run.tokens // max(1, TOKENS // (FLOAT * F)))
            sent += one * passes / options.probe_steps
        seconds["transfer"] = sent / machine.link_bytes
    return seconds


def audit_share(model: ModelShape, run: RunShape, dictionary: DictionaryShape) -> float:
    """FLOPs of an audit of some examples before training, as a share of those of training on them once.

    Forward, and backward above the hook point without the weights' gradients: one forward pass of those layers, one of the head.
    The reference is the model itself and costs nothing; one of its own would be another forward pass. `2·F·d` a token of the
    answer, to encode it.
    """
    above = model.layer_flops(run.tokens) - model.layer_flops(run.tokens, dictionary.layer)
    once = model.layer_flops(run.tokens) + above + 2 * model.head_flops(run.answer_tokens)
    encoded = 2.0 * dictionary.features * model.width * run.answer_tokens if dictionary.encoder else 0.0
    return run.rows * (once + encoded) / train_flops(model, run)


def plan(
    model: ModelShape,
    run: RunShape,
    dictionary: DictionaryShape,
    options: Options | None = None,
    machine: Machine | None = None,
) -> Plan:
    """All of it."""
    options, machine = options or Options(), machine or Machine()
    flops = extra_flops(model, run, dictionary, options)
    seconds = extra_seconds(flops, model, run, dictionary, options, machine)
    trained = train_flops(model, run)
    train_seconds = trained / machine.flops
    device = device_memory(model, run, dictionary, options, machine)
    host = host_memory(run, dictionary, options, machine)
    row, totals = disk_bytes(dictionary, options, run.steps)
    run_seconds = run.steps * train_seconds
    flushes = 1 + min(run_seconds / max(options.flush_seconds, 1e-9), run.steps / run.logging_steps)
    alone = run.processes == 1
    mapped = dictionary_bytes(model, dictionary) if dictionary.offload or not machine.accelerator else 0.0
    return Plan(
        train_flops=trained,
        flops=flops,
        train_seconds=train_seconds,
        seconds=seconds,
        device_memory=device if machine.accelerator else {},
        host_memory=host if machine.accelerator else device | host,
        shared_memory={"dictionary, mapped": mapped} if mapped else {},
        network=0.0 if alone else network_bytes(model, dictionary, options),
        train_network=0.0 if alone else float(model.parameters * run.weight_bytes),
        disk_row=row,
        disk_totals=totals,
        written=row * run.steps + totals * flushes,
        run_seconds=run_seconds,
        audit=audit_share(model, run, dictionary),
    )
