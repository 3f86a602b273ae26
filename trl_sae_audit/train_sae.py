"""Train a dictionary on the residual stream of one's own model, with sae-lens."""

from __future__ import annotations

import json
import math
import random
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from .residual_stream import residual_stream, token_windows
from .sae import load_dictionary
from .train_sae_config import TrainSAEConfig, architecture_settings
from .untrusted import read_json

_PEFT_PREFIX = "base_model.model."


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
        sae = TrainingSAE.from_dict(architecture_settings(config, sample.shape[1], d_sae, steps, device))
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
