"""The steps of training SAEs side by side, each on its own layer of the same tokens.

sae-lens' own runners, that of several SAEs too, read a hooked model through a store of theirs, which knows neither windows of single texts
nor attention sinks and shuffles otherwise; so its trainers are stepped here.
"""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from torch import Tensor

from .activation_buffer import ActivationBuffer
from .fine_tuning import active_on, start_from, start_settings
from .progress import progress_bar
from .training_config import TrainSAEConfig, architecture_settings


def fit_saes(
    buffer: ActivationBuffer,
    config: TrainSAEConfig,
    layers: int,
    d_sae: int,
    k: int,
    device: torch.device,
    start: SAE[Any] | None = None,
) -> list[TrainingSAE[Any]]:
    """Trained SAEs for raw activations, one a layer.

    Args:
        buffer: batches of [n, layers · d_model].
        config: how to train.
        layers: how many.
        d_sae: features of each. k: active a token.
        device: of the model.
        start: an SAE to start from instead of random weights.
    """
    samples = _split(next(buffer), layers)
    steps = config.training_tokens // config.sae_batch_size
    cuda = [device.index or 0] if device.type == "cuda" else []
    trainers = []
    with torch.random.fork_rng(devices=cuda):
        for sample in samples:
            torch.manual_seed(config.seed)
            trainers.append(_trainer(buffer, config, sample, d_sae, k, steps, device, start))
        with progress_bar(total=steps * config.sae_batch_size, desc="Training", unit=" tokens") as bar:
            for _ in range(steps):
                for trainer, batch in zip(trainers, _split(next(buffer), layers), strict=True):
                    trainer.maybe_reset_sparsity()
                    trainer.step(batch)
                    trainer.n_training_steps += 1
                bar.update(config.sae_batch_size)
    return [_finish(trainer) for trainer in trainers]


def _split(batch: Tensor, layers: int) -> list[Tensor]:
    return [part.contiguous() for part in batch.chunk(layers, dim=1)]


def _trainer(
    buffer: ActivationBuffer,
    config: TrainSAEConfig,
    sample: Tensor,
    d_sae: int,
    k: int,
    steps: int,
    device: torch.device,
    start: SAE[Any] | None,
) -> SAETrainer[Any, Any]:
    scale = sample.shape[1] ** 0.5 / float(torch.linalg.vector_norm(sample, dim=1).mean())
    architecture = config.architecture if start is None else start.cfg.architecture()
    if start is not None and architecture == "jumprelu":
        k = max(1, round(active_on(start, sample)))
    settings = architecture_settings(config, architecture, sample.shape[1], d_sae, k, steps, device)
    sae = TrainingSAE.from_dict(settings | ({} if start is None else start_settings(start)))
    if start is None:
        sae.b_dec.data = (sample.mean(0) * scale).to(sae.b_dec.data)
    else:
        start_from(sae, start, scale)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * config.sae_batch_size,
            train_batch_size_samples=config.sae_batch_size,
            device=str(device),
            lr=config.learning_rate,
            lr_end=config.learning_rate,
            lr_warm_up_steps=round(config.lr_warmup_share * steps),
            lr_decay_steps=round(config.lr_decay_share * steps),
            dead_feature_window=max(10, min(1000, steps // 20)),
        ),
        sae,
        buffer,
    )
    sae.to(device)
    trainer.activation_scaler.scaling_factor = scale
    return trainer


def _finish(trainer: SAETrainer[Any, Any]) -> TrainingSAE[Any]:
    """The trained SAE with the scale of its activations in its weights."""
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    trainer.set_final_sae_metadata()
    return trainer.sae
