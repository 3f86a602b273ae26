"""The lab's dictionary: a TopK sparse autoencoder (SAE) of the model's residual stream, trained with sae-lens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..models.hook_points import resolve_hook_point
from ..models.residual_stream import hidden_states
from .pretraining import encode_pairs

if TYPE_CHECKING:
    from sae_lens import SAE

MODEL_NAME = "trl-sae-audit/lab"
"""The name under which the dictionary's metadata refers to the lab's model."""


@dataclass(frozen=True)
class DictionaryConfig:
    """Size and training of the sparse autoencoder."""

    layer: int = 1
    """The decoder layer whose output it is trained on."""
    size: int = 256
    """Number of features."""
    k: int = 8
    """Active features per token."""
    texts: int = 4000
    """Number of prompts with plain answers it is trained on."""
    steps: int = 600
    """Optimizer steps."""
    batch_size: int = 1024
    """Tokens in a step."""
    learning_rate: float = 5e-3
    """Learning rate of Adam, falling to a tenth over the last third of the steps."""
    heldout_texts: int = 500
    """Number of held-out prompts with answers its health is measured on."""


@dataclass(frozen=True)
class DictionaryHealth:
    """How well a dictionary fits tokens it was not trained on."""

    fvu: float
    """Fraction of variance unexplained: squared error over the variance around the mean, over all held-out tokens."""
    fvu_answers: float
    """The same over the tokens of answers only."""
    l0: float
    """Mean number of active features per token."""
    dead: int
    """Features that are active at no held-out token."""
    tokens: int
    """Number of held-out tokens measured on."""


def hook_point(layer: int) -> str:
    """The name of the module whose output the dictionary reads."""
    return f"model.layers.{layer}"


def residual_stream(
    model: PreTrainedModel,
    module: str,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    batch_size: int = 256,
) -> torch.Tensor:
    """The output of a module for every token, padding included: [n, length, d_model] float32."""
    point = resolve_hook_point(model, module)
    batches = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
    states = [hidden_states(point, {"input_ids": ids, "attention_mask": mask}) for ids, mask in batches]
    return torch.cat(states).float()


def token_activations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    module: str,
    prompts: list[str],
    answers: list[str],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual stream at every token except padding and the first, [tokens, d_model], and which belong to an answer.

    The first token is omitted: it is always the same, and its activation is far from all others.
    """
    input_ids, attention_mask, answer_mask = encode_pairs(tokenizer, prompts, answers)
    hidden = residual_stream(model, module, input_ids, attention_mask)
    attention_mask[:, 0] = False
    return hidden[attention_mask], answer_mask[attention_mask]


def train_dictionary(config: DictionaryConfig, activations: torch.Tensor, seed: int, path: Path) -> None:
    """Train the autoencoder on cached activations and save it, ready for `SAE.load_from_disk(path)`.

    Args:
        config: Size and training.
        activations: [tokens, d_model].
        seed: Of the initial weights and the order of the tokens.
        path: A directory to write to.
    """
    from sae_lens import SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata

    torch.manual_seed(seed)
    metadata = SAEMetadata(
        model_name=MODEL_NAME,
        hook_name=f"blocks.{config.layer}.hook_resid_post",
        hf_hook_name=hook_point(config.layer),
        prepend_bos=True,
        context_size=128,
        dataset_path="trl_sae_audit.lab",
    )
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=activations.shape[1],
            d_sae=config.size,
            k=config.k,
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=config.steps * config.batch_size,
            train_batch_size_samples=config.batch_size,
            lr=config.learning_rate,
            lr_end=config.learning_rate / 10,
            lr_warm_up_steps=config.steps // 20,
            lr_decay_steps=config.steps // 3,
            dead_feature_window=config.steps // 10,
            n_batches_for_norm_estimate=20,
        ),
        sae=sae,
        data_provider=_shuffle_batches(activations, config.batch_size, seed),
    )
    trainer.fit().save_inference_model(path)


def dictionary_health(sae: "SAE", activations: torch.Tensor, in_answer: torch.Tensor) -> DictionaryHealth:
    """Measure an autoencoder on activations [tokens, d_model]; `in_answer` [tokens] marks those of answers."""
    with torch.no_grad():
        codes = sae.encode(activations)
        errors = (sae.decode(codes) - activations).pow(2).sum(-1)

    def fvu(rows: torch.Tensor) -> float:
        variance = (activations[rows] - activations[rows].mean(0)).pow(2).sum(-1)
        return float(errors[rows].sum() / variance.sum())

    active = codes > 0
    return DictionaryHealth(
        fvu=fvu(torch.ones_like(in_answer)),
        fvu_answers=fvu(in_answer),
        l0=float(active.sum(-1).float().mean()),
        dead=int((~active.any(0)).sum()),
        tokens=len(activations),
    )


def _shuffle_batches(activations: torch.Tensor, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of rows, in a new order in every epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(activations), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield activations[order[start : start + batch_size]]
