"""Train a dictionary on the residual stream of your own model, with sae-lens."""

from __future__ import annotations

import math
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sae_lens import TrainingSAE
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AuditError
from ..io.manifest import write_manifest
from ..models.hook_points import HookPoint, layer_lists, residual_width, resolve_hook_point
from ..models.residual_stream import residual_stream, residual_streams, token_windows
from ..models.tokenizers import Processing, text_tokenizer
from .activation_buffer import ActivationBuffer
from .choice import model_depth
from .fine_tuning import load_start
from .fit import Health, health_of, unknown_health
from .loading import load_dictionary
from .progress import progress_bar
from .training_config import TrainSAEConfig
from .training_steps import fit_saes

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
    tokenizer: Processing,
    texts: Sequence[str],
    config: TrainSAEConfig,
    *,
    dataset: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainedDictionary:
    """Train an SAE on the residual stream of `model` on `texts`, save it, and check it on held-out texts.

    The saved SAE works on the raw residual stream: the scale the activations are trained at is folded into its
    weights, and the final figures are those of the directory read back by `load_dictionary`. The global random state
    is left as it was.

    Args:
        model: any Hugging Face model; only the layers up to the hook point run.
        tokenizer: the model's, or a processor that has it.
        texts: at least two; a share of them is held out.
        config: how to train; the layer, the width and k have defaults from the model.
        dataset: what the metadata call the texts.
        options: what the manifest keeps as its `config`, to train it again; by default `config` and `dataset`.

    Raises:
        AuditError: if the output directory exists, the hook point does not, the texts do not suffice, or the SAE is
            dead; a dead SAE is kept in `<output_dir>.failed`.
    """
    if config.hook_points is not None:
        raise AuditError("There are several hook_points; call train_dictionaries.")
    return train_dictionaries(model, tokenizer, texts, config, dataset=dataset, options=options)[0]


def train_dictionaries(
    model: PreTrainedModel,
    tokenizer: Processing,
    texts: Sequence[str],
    config: TrainSAEConfig,
    *,
    dataset: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[TrainedDictionary]:
    """As `train_dictionary`, one for each of `config.hook_points`, all from one forward pass over the texts.

    Each is the one that training it alone gives, where no layer has attention sinks: a token that is one in any layer counts in none.
    They are saved in directories of `config.output_dir` that are named after their hook points.
    """
    hooks = _hook_points(model, config)
    targets = _targets(config, hooks)
    tokenizer = text_tokenizer(tokenizer, hooks[0].decoder)
    d_model = residual_width(model)
    start = None if config.start_from is None else load_start(config.start_from, config.start_id, d_model)
    d_sae, k = config.size(d_model) if start is None else (int(start.cfg.d_sae), 1)
    training, held_out = _split(texts, config)

    parent = targets[0].parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{targets[0].name}-") as scratch:
        wanted = config.training_tokens + config.sae_batch_size  # one batch more tells their scale
        wanted = min(wanted, config.distinct_tokens or wanted)
        fits = wanted < config.buffer_tokens
        buffer = ActivationBuffer(
            lambda: _first_rows(
                residual_streams(model, tokenizer, training, hooks, config.token_rules, config.batch_size),
                wanted if fits else None,
            ),
            capacity=wanted + 1 if fits else config.buffer_tokens,
            d_model=d_model * len(hooks),
            batch_size=config.sae_batch_size,
            file=Path(scratch) / "activations.bin",
            seed=config.seed,
            expected=_estimate_tokens(training, tokenizer, config.context_size),
        )
        saes = fit_saes(buffer, config, len(hooks), d_sae, k, model.device, start)
        trained_on = config.training_tokens // config.sae_batch_size * config.sae_batch_size
        # the buffer has one batch more, for the scale
        distinct = min(len(buffer.rows), trained_on) if buffer.complete else None
        found = []
        for sae, hook, target in zip(saes, hooks, targets, strict=True):
            sae.cfg.metadata = _metadata(sae, model, hook, config, dataset, distinct)
            draft = Path(scratch) / "sae"
            sae.save_inference_model(draft)
            fault, health = _examine(draft, model, tokenizer, held_out, hook, config)
            figures = {name: None if math.isnan(value) else value for name, value in asdict(health).items()}
            kept = options or asdict(config) | {"dataset": dataset}
            write_manifest(draft, "sae", {"config": kept, "held_out": figures})
            shutil.move(draft, _failed(target) if fault else target)
            found.append((fault, health, hook, target))
    for fault, _, _, target in found:
        if fault:
            raise AuditError(
                f"The SAE is dead: {fault}. It is kept in {_failed(target)} for inspection; do not use it. Give more training_tokens, "
                "another lr, k or sparsity_coefficient, or take architecture topk."
            )
    return [
        TrainedDictionary(
            path=target,
            fvu=health.fvu,
            token_fvu=health.token_fvu,
            l0=health.l0,
            dead=health.dead,
            held_out_tokens=int(health.tokens),
            training_tokens=trained_on,
            distinct_tokens=distinct,
            d_sae=d_sae,
            hook_point=hook.path,
        )
        for _, health, hook, target in found
    ]


def _hook_points(model: PreTrainedModel, config: TrainSAEConfig) -> list[HookPoint]:
    """The layers to read, the middle one by default."""
    if config.hook_points is not None:
        return [resolve_hook_point(model, point) for point in config.hook_points]
    middle = str((model_depth(model) - 1) // 2) if config.hook_point is None else config.hook_point
    return [resolve_hook_point(model, middle)]


def _targets(config: TrainSAEConfig, hooks: Sequence[HookPoint]) -> list[Path]:
    """Where each SAE goes, nothing of which may exist."""
    output = Path(config.output_dir)
    several = config.hook_points is not None
    targets = [output / hook.path for hook in hooks] if several else [output]
    if len(set(targets)) < len(targets):
        raise AuditError("hook_points name the same layer twice; name each once.")
    for path in (output, *targets, *map(_failed, targets)):
        if path.exists():
            raise AuditError(f"{path} exists already; remove it or choose another output_dir.")
    return targets


def _failed(target: Path) -> Path:
    return target.with_name(f"{target.name}.failed")


def _first_rows(stream: Iterable[Tensor], rows: int | None) -> Iterator[Tensor]:
    """The stream, ended after so many rows: no more are read than are trained on."""
    left = math.inf if rows is None else rows
    for part in stream:
        if len(part) >= left:
            yield part[: int(left)]
            return
        left -= len(part)
        yield part


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
    with progress_bar(stream, desc="Checking", unit=" batches") as batches:
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
