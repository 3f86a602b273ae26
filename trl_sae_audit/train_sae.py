"""Train a dictionary on the residual stream of one's own model, with sae-lens."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .activation_buffer import ActivationBuffer
from .errors import AuditError
from .health import Health, health_of, unknown_health
from .hook_points import HookPoint, layer_lists, residual_width, resolve_hook_point
from .residual_stream import TokenRules, residual_stream, token_windows
from .sae import load_dictionary
from .untrusted import read_json

Architecture = Literal["topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "standard", "gated"]
_DEFAULT_SPARSITY = {"jumprelu": 1.0, "standard": 3.0, "gated": 3.0}
_PEFT_PREFIX = "base_model.model."


@dataclass
class TrainSAEConfig:
    """How a dictionary is trained."""

    hook_point: str = field(
        metadata={
            "help": "Where to read the residual stream: a module path such as model.layers.9, or TransformerLens' "
            "blocks.9.hook_resid_post."
        }
    )
    output_dir: str = field(
        metadata={"help": "Directory for the trained SAE, in sae-lens' format. It must not exist yet."}
    )
    architecture: Architecture = field(
        default="topk",
        metadata={
            "help": "sae-lens architecture. topk and batchtopk learn untuned; jumprelu, standard and gated may need "
            "another sparsity_coefficient. batchtopk and matryoshka_batchtopk are saved as jumprelu."
        },
    )
    d_sae: int | None = field(
        default=None, metadata={"help": "Number of features; default 8 times the model's width."}
    )
    k: int = field(
        default=32,
        metadata={
            "help": "Features active a token (topk), on average a token (batchtopk), the target (jumprelu); not used by "
            "standard and gated."
        },
    )
    sparsity_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the sparsity loss of jumprelu (default 1), standard and gated (default 3); not used by "
            "the topk family."
        },
    )
    context_size: int = field(
        default=256, metadata={"help": "Tokens of a window; longer texts are cut into several."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass of the model."})
    skip_special_tokens: bool = field(
        default=True, metadata={"help": "Leave BOS, EOS and other special tokens out of the training data."}
    )
    skip_first_position: bool = field(
        default=True,
        metadata={"help": "Leave out the first token of every window, whose activation most models blow up."},
    )
    training_tokens: int = field(
        default=2_000_000,
        metadata={
            "help": "Activations to train on in all; smaller texts are gone through several times, each time shuffled."
        },
    )
    buffer_tokens: int = field(
        default=500_000,
        metadata={
            "help": "Activations kept in a memory-mapped temporary file next to output_dir: this number × width × 4 "
            "bytes. If the texts have more, the file is refilled by halves."
        },
    )
    sae_batch_size: int = field(
        default=1024, metadata={"help": "Activations in one training step of the SAE."}
    )
    lr: float = field(default=1e-3, metadata={"help": "Learning rate of Adam."})
    lr_warmup_share: float = field(
        default=0.05, metadata={"help": "Share of the steps over which the learning rate rises."}
    )
    lr_decay_share: float = field(
        default=0.2, metadata={"help": "Share of the steps, at the end, over which it falls to 0."}
    )
    held_out_share: float = field(
        default=0.05,
        metadata={"help": "Share of the texts kept from training, for the final FVU, L0 and dead features."},
    )
    held_out_tokens: int = field(
        default=20_000, metadata={"help": "Use at most about that many tokens of the held-out texts."}
    )
    max_fvu: float = field(
        default=0.9,
        metadata={
            "help": "An SAE that leaves this fraction of the held-out variance, or of the average token, unexplained has failed."
        },
    )
    max_dead: float = field(
        default=0.9,
        metadata={"help": "An SAE with a greater share of features active on no held-out token has failed."},
    )
    seed: int = field(default=0, metadata={"help": "Of the split, the shuffling and the initial weights."})

    def __post_init__(self) -> None:
        self.architecture = _known_architecture(self.architecture)
        for name in ("k", "context_size", "batch_size", "training_tokens", "buffer_tokens", "sae_batch_size"):
            if getattr(self, name) < 1:
                raise AuditError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.context_size < 2:
            raise AuditError("context_size is 1; a window needs a token after the first.")
        if not 0 < self.held_out_share < 1:
            raise AuditError(f"held_out_share is {self.held_out_share}; it must lie between 0 and 1.")
        if (
            min(self.lr_warmup_share, self.lr_decay_share) < 0
            or self.lr_warmup_share + self.lr_decay_share > 1
        ):
            raise AuditError("lr_warmup_share and lr_decay_share must be positive and together at most 1.")
        if self.training_tokens < self.sae_batch_size:
            raise AuditError(
                f"training_tokens is {self.training_tokens}, less than one step of sae_batch_size {self.sae_batch_size}."
            )

    @property
    def token_rules(self) -> TokenRules:
        return TokenRules(self.context_size, self.skip_special_tokens, self.skip_first_position)


@dataclass(frozen=True)
class TrainedDictionary:
    """A dictionary that was trained and found alive.

    Attributes:
        path: directory for `load_dictionary`.
        fvu: fraction of variance unexplained on held-out tokens.
        token_fvu: the same token by token, which a few tokens with blown-up activations cannot flatter.
        l0: active features a held-out token.
        dead: share of features active on no held-out token.
        held_out_tokens: how many tokens those figures come from.
        training_tokens: activations trained on, repetitions counted.
        distinct_tokens: different activations among them; None if the texts did not fit the buffer.
        d_sae: number of features.
        hook_point: module whose output the dictionary reads.
    """

    path: Path
    fvu: float
    token_fvu: float
    l0: float
    dead: float
    held_out_tokens: int
    training_tokens: int
    distinct_tokens: int | None
    d_sae: int
    hook_point: str


def train_dictionary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: TrainSAEConfig,
    *,
    dataset: str | None = None,
) -> TrainedDictionary:
    """Train an SAE on the residual stream of `model` on `texts`, save it, and check it on held-out texts.

    The saved SAE works on the raw residual stream: the scale the activations are trained at is folded into its
    weights, and the final figures are those of the directory read back by `load_dictionary`. The global random state
    is left as it was.

    Args:
        model: any Hugging Face model; only the layers up to the hook point run.
        tokenizer: the model's.
        texts: at least two; a share of them is held out.
        config: how to train.
        dataset: what the metadata call the texts.

    Raises:
        AuditError: if the output directory exists, the hook point does not, the texts do not suffice, or the SAE is
            dead; a dead SAE is kept in `<output_dir>.failed`.
    """
    target = Path(config.output_dir)
    failed = target.with_name(f"{target.name}.failed")
    for path in (target, failed):
        if path.exists():
            raise AuditError(f"{path} exists already; remove it or choose another output_dir.")
    hook = resolve_hook_point(model, config.hook_point)
    d_model = residual_width(model)
    d_sae = config.d_sae or 8 * d_model
    if config.k > d_sae:
        raise AuditError(f"k is {config.k}, but the SAE has only {d_sae} features; choose a smaller k.")
    training, held_out = _split(texts, config)

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        buffer = ActivationBuffer(
            lambda: residual_stream(model, tokenizer, training, hook, config.token_rules, config.batch_size),
            capacity=config.buffer_tokens,
            d_model=d_model,
            batch_size=config.sae_batch_size,
            file=Path(scratch) / "activations.bin",
            seed=config.seed,
            expected=_estimate_tokens(training, tokenizer, config.context_size),
        )
        sae = _fit(buffer, config, d_sae, model.device)
        distinct = len(buffer.rows) if buffer.complete else None
        sae.cfg.metadata = _metadata(sae, model, hook, config, dataset, distinct)
        draft = Path(scratch) / "sae"
        sae.save_inference_model(draft)
        fault, health = _examine(draft, model, tokenizer, held_out, hook, config)
        _record_health(draft, health)
        shutil.move(draft, failed if fault else target)
    if fault:
        raise AuditError(
            f"The SAE is dead: {fault}. It is kept in {failed} for inspection; do not use it. Give more training_tokens, "
            "another lr, k or sparsity_coefficient, or take architecture topk."
        )
    return TrainedDictionary(
        path=target,
        fvu=health.fvu,
        token_fvu=health.token_fvu,
        l0=health.l0,
        dead=health.dead,
        held_out_tokens=int(health.tokens),
        training_tokens=config.training_tokens // config.sae_batch_size * config.sae_batch_size,
        distinct_tokens=distinct,
        d_sae=d_sae,
        hook_point=hook.path,
    )


def _known_architecture(name: str) -> Architecture:
    if name not in get_args(Architecture):
        raise AuditError(f"architecture is {name!r}; choose one of {', '.join(get_args(Architecture))}.")
    return name  # type: ignore[return-value]


def _split(texts: Sequence[str], config: TrainSAEConfig) -> tuple[list[str], list[str]]:
    """Shuffled distinct texts for training, and those held out."""
    shuffled = list(dict.fromkeys(texts))
    random.Random(config.seed).shuffle(shuffled)
    if len(shuffled) < 2:
        raise AuditError("Only one text: at least two are needed, since some are held out; give more texts.")
    kept_out = min(max(1, round(config.held_out_share * len(shuffled))), len(shuffled) - 1)
    return shuffled[kept_out:], shuffled[:kept_out]


def _estimate_tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase, context_size: int) -> int:
    """About how many tokens the texts have, from the first of them, which are a random choice."""
    sample = texts[:200]
    counted = sum(len(window) for window in token_windows(sample, tokenizer, context_size))
    return round(counted * len(texts) / len(sample))


def _fit(
    buffer: ActivationBuffer, config: TrainSAEConfig, d_sae: int, device: torch.device
) -> TrainingSAE[Any]:
    """The trained SAE, for raw activations."""
    sample = next(buffer)
    scale = sample.shape[1] ** 0.5 / float(torch.linalg.vector_norm(sample, dim=1).mean())
    steps = config.training_tokens // config.sae_batch_size
    cuda = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(config.seed)
        sae = TrainingSAE.from_dict(_architecture_settings(config, sample.shape[1], d_sae, steps, device))
        sae.b_dec.data = (sample.mean(0) * scale).to(sae.b_dec.data)
        trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=steps * config.sae_batch_size,
                train_batch_size_samples=config.sae_batch_size,
                device=str(device),
                lr=config.lr,
                lr_end=config.lr,
                lr_warm_up_steps=round(config.lr_warmup_share * steps),
                lr_decay_steps=round(config.lr_decay_share * steps),
                dead_feature_window=max(10, min(1000, steps // 20)),
            ),
            sae,
            buffer,
        )
        trainer.activation_scaler.scaling_factor = scale
        return trainer.fit()


def _architecture_settings(
    config: TrainSAEConfig, d_model: int, d_sae: int, steps: int, device: torch.device
) -> dict[str, Any]:
    """Settings for sae-lens' training class of the architecture."""
    sparsity = config.sparsity_coefficient
    if sparsity is None:
        sparsity = _DEFAULT_SPARSITY.get(config.architecture, 0.0)
    warm_up = steps // 4
    # the threshold that a batch's top k becomes is a running mean, which must forget its start within the run
    batchtopk = {"k": config.k, "topk_threshold_lr": min(1.0, max(0.01, 20 / steps))}
    own: dict[str, dict[str, Any]] = {
        "topk": {"k": config.k},
        "batchtopk": batchtopk,
        "matryoshka_batchtopk": {**batchtopk, "matryoshka_widths": _nested_widths(d_sae, config.k)},
        "jumprelu": {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(config.k),
            "l0_coefficient": sparsity,
            "l0_warm_up_steps": warm_up,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 3e-6,
        },
        "standard": {"l1_coefficient": sparsity, "l1_warm_up_steps": warm_up},
        "gated": {"l1_coefficient": sparsity, "l1_warm_up_steps": warm_up},
    }
    return {
        "architecture": config.architecture,
        "d_in": d_model,
        "d_sae": d_sae,
        "device": str(device),
        "normalize_activations": "expected_average_only_in",
        **own[config.architecture],
    }


def _nested_widths(d_sae: int, k: int) -> list[int]:
    """Doubling widths that end at `d_sae`, none smaller than what k active features need."""
    widths = [d_sae]
    while widths[0] // 2 >= max(4 * k, d_sae // 16):
        widths.insert(0, widths[0] // 2)
    return widths


def _metadata(
    sae: TrainingSAE[Any],
    model: PreTrainedModel,
    hook: HookPoint,
    config: TrainSAEConfig,
    dataset: str | None,
    distinct: int | None,
) -> SAEMetadata:
    """What makes the saved SAE speak for itself; sae-lens' own keys where it has them."""
    lists = layer_lists(model)
    parent, _, layer = hook.path.rpartition(".")
    return SAEMetadata(
        **{
            **sae.cfg.metadata.to_dict(),
            "model_name": model.config.name_or_path or None,
            "model_class_name": "AutoModelForCausalLM",
            "hook_name": f"blocks.{layer}.hook_resid_post" if parent in lists else hook.path,
            "hf_hook_name": hook.path.removeprefix(_PEFT_PREFIX),
            "context_size": config.context_size,
            "dataset_path": dataset,
            "exclude_special_tokens": config.skip_special_tokens,
            "seqpos_slice": [1, None] if config.skip_first_position else [None],
            "training_tokens": config.training_tokens,
            "distinct_training_tokens": distinct,
            "seed": config.seed,
        }
    )


def _examine(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    hook: HookPoint,
    config: TrainSAEConfig,
) -> tuple[str | None, Health]:
    """What is wrong with the saved SAE, if anything, and its health on held-out texts."""
    try:
        dictionary = load_dictionary(path, device=model.device)
    except AuditError as error:
        return f"training diverged ({error})", unknown_health(0)
    stream = residual_stream(model, tokenizer, texts, hook, config.token_rules, config.batch_size)
    with tqdm(stream, desc="Checking", unit=" batches", disable=None) as batches:
        health = health_of(batches, dictionary, config.held_out_tokens)
    return fault_of(health, config.max_fvu, config.max_dead), health


def fault_of(health: Health, max_fvu: float = 0.9, max_dead: float = 0.9) -> str | None:
    """Why an SAE of that health is useless, in words; None if it is alive."""
    if health.tokens == 0:
        return "no held-out token was left to check it on"
    if not health.fvu < max_fvu:
        return f"it leaves {health.fvu:.0%} of the variance unexplained (limit {max_fvu:.0%})"
    if not health.token_fvu < max_fvu:
        return f"it leaves {health.token_fvu:.0%} of the average token unexplained (limit {max_fvu:.0%})"
    if health.dead > max_dead:
        return f"{health.dead:.0%} of its features are active on no held-out token (limit {max_dead:.0%})"
    return None


def _record_health(path: Path, health: Health) -> None:
    """Write the final figures into the saved metadata; what is not a number becomes null."""
    file = path / "cfg.json"
    settings = read_json(file)
    figures = {name: None if math.isnan(value) else value for name, value in asdict(health).items()}
    settings["metadata"]["held_out"] = figures
    file.write_text(json.dumps(settings, indent=2))
