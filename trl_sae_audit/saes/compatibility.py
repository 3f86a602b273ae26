"""Does a dictionary fit a model: its hook point, its width, and the model it was made for."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from ..errors import AuditError
from ..models.hook_points import HookPoint, residual_width, resolve_hook_point
from ..models.mlp_points import resolve_transcoder
from ..models.sharding import is_sharded
from .dictionary import FeatureDictionary

logger = logging.getLogger(__name__)


def find_hook_point(dictionary: FeatureDictionary, model: nn.Module) -> HookPoint:
    """Where the dictionary hooks in the model.

    Raises:
        AuditError: missing or ambiguous.
    """
    if dictionary.reads is not None:
        return resolve_transcoder(model, dictionary.reads, dictionary.hook_point)
    return resolve_hook_point(model, dictionary.hook_names)


def check_dictionary(dictionary: FeatureDictionary, policy: nn.Module) -> HookPoint:
    """Find the dictionary's hook point in the policy.

    Logs a warning where the dictionary was made for a model of another name. The name of a local directory says nothing: it may be
    the model that was trained, or a copy; then `doctor` and `sae/fvu` tell whether the dictionary fits.

    Raises:
        AuditError: an encoder and a decoder; hook point missing or ambiguous, or of another width than the model.
    """
    if any(isinstance(part, PreTrainedModel) and part.config.is_encoder_decoder for part in policy.modules()):
        raise AuditError(
            f"{type(policy).__name__} has an encoder and a decoder, and the loss reaches both; attribution reads the one "
            "residual stream of a decoder-only model. Train one of those (Llama, Qwen, Gemma and the like), or leave the "
            "callback out."
        )
    point = find_hook_point(dictionary, policy)
    width = residual_width(policy)
    if width != dictionary.d_model:
        raise AuditError(
            f"Dictionary {dictionary.name!r} reads {dictionary.d_model} dimensions but the residual stream of "
            f"{type(policy).__name__} has {width}; it was made for another model"
            f"{f' ({dictionary.model_name})' if dictionary.model_name else ''}."
        )
    trained = model_name(policy)
    known = bool(trained) and not Path(trained).is_dir()
    if dictionary.model_name and known and not same_family(dictionary.model_name, trained):
        logger.warning(
            "Dictionary %r was made for %r but the model trained is %r: its features may not mean there what their "
            "labels say; check the fit with `trl-sae-audit doctor`, and watch sae/fvu.",
            dictionary.name,
            dictionary.model_name,
            trained,
        )
    elif dictionary.model_name and known and not same_model(dictionary.model_name, trained):
        logger.warning(
            "Dictionary %r was made for %r, and %r is another stage of its training: how well it fits that is measured as "
            "sae/token_fvu, and before training by `trl-sae-audit doctor`.",
            dictionary.name,
            dictionary.model_name,
            trained,
        )
    return point


def check_whole(model: nn.Module) -> None:
    """Raises:
    AuditError: if the model's parameters are spread over processes, so that it cannot be run by itself.
    """
    if is_sharded(model) or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise AuditError(
            f"The parameters of {type(model).__name__} are spread over the processes (FSDP or DeepSpeed ZeRO-3), so it cannot "
            "be read outside its training. Load it before the training arguments are made, or read it in a run of its own."
        )


def model_name(model: nn.Module) -> str:
    """What the Hugging Face model inside `model` was loaded as; empty if it was made in memory."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            return part.config.name_or_path
    return ""


def same_model(one: str, other: str) -> bool:
    """Whether two names are one model's, hub user and case aside."""
    a, b = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other))
    return a == b


def same_family(one: str, other: str) -> bool:
    """Whether one model's name begins with the other's, hub user and case aside: gemma-3-270m and gemma-3-270m-it."""
    a, b = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other))
    return a.startswith(b) or b.startswith(a)
