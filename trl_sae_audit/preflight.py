"""What is checked before the first step: does the dictionary fit the model, do the watched features exist."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel, Trainer

from .dictionary import FeatureDictionary
from .engines import is_sharded
from .errors import AuditError
from .hook_points import HookPoint, residual_width, resolve_hook_point
from .probe import Probe

logger = logging.getLogger(__name__)


def check_dictionary(dictionary: FeatureDictionary, policy: nn.Module) -> HookPoint:
    """Find the dictionary's hook point in the policy.

    Logs a warning where the dictionary was made for a model of another name.

    Raises:
        AuditError: an encoder and a decoder; hook point missing or ambiguous, or of another width than the model.
    """
    if any(isinstance(part, PreTrainedModel) and part.config.is_encoder_decoder for part in policy.modules()):
        raise AuditError(
            f"{type(policy).__name__} has an encoder and a decoder, and the loss reaches both; attribution reads the one "
            "residual stream of a decoder-only model."
        )
    point = resolve_hook_point(policy, dictionary.hook_point)
    width = residual_width(policy)
    if width != dictionary.d_model:
        raise AuditError(
            f"Dictionary {dictionary.name!r} reads {dictionary.d_model} dimensions but the residual stream of "
            f"{type(policy).__name__} has {width}; it was made for another model"
            f"{f' ({dictionary.model_name})' if dictionary.model_name else ''}."
        )
    trained = model_name(policy)
    if dictionary.model_name and trained and not same_family(dictionary.model_name, trained):
        logger.warning(
            "Dictionary %r was made for %r but the model trained is %r: its features may not mean there what their "
            "labels say; check the fit with `trl-sae-audit doctor`, and watch sae/fvu.",
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


def same_family(one: str, other: str) -> bool:
    """Whether one model's name begins with the other's, hub user and case aside: gemma-3-270m and gemma-3-270m-it."""
    a, b = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other))
    return a.startswith(b) or b.startswith(a)


def resolve_watch(
    watch: Mapping[str, Any], dictionaries: tuple[FeatureDictionary, ...]
) -> dict[str, dict[str, int]]:
    """Watched features by dictionary: {name: {label: feature}}.

    Raises:
        AuditError: an index out of range, a dictionary of another name, or several dictionaries and none named.
    """
    by_name = {dictionary.name: dictionary for dictionary in dictionaries}
    resolved: dict[str, dict[str, int]] = {name: {} for name in by_name}
    for label, target in watch.items():
        if isinstance(target, tuple):
            name, feature = target
        elif len(dictionaries) == 1:
            name, feature = dictionaries[0].name, target
        else:
            raise AuditError(
                f"Watched feature {label!r} does not say which of {len(dictionaries)} dictionaries it is of; write "
                f"{{{label!r}: ({dictionaries[0].name!r}, {target})}}."
            )
        if name not in by_name:
            raise AuditError(
                f"Watched feature {label!r} is of dictionary {name!r}, which is not among {sorted(by_name)}."
            )
        d_sae = by_name[name].d_sae
        if not isinstance(feature, int) or isinstance(feature, bool) or not 0 <= feature < d_sae:
            raise AuditError(
                f"Watched feature {label!r} is {feature!r}, but dictionary {name!r} has features 0 to {d_sae - 1}."
            )
        if feature in resolved[name].values():
            raise AuditError(f"Feature {feature} of {name!r} is watched under two labels; keep one of them.")
        resolved[name][label] = feature
    return resolved


def as_probe(probe: Any, trainer: Trainer) -> Probe | None:
    """The user's `probe` as a Probe, tokenized by the trainer's tokenizer where it is texts.

    Raises:
        AuditError: if it is neither texts nor a tokenized batch.
    """
    if probe is None or isinstance(probe, Probe):
        return probe
    if isinstance(probe, Mapping):
        return Probe(probe)
    if isinstance(probe, (list, tuple)) and all(isinstance(text, str) for text in probe):
        return Probe.from_texts(probe, trainer.processing_class)
    raise AuditError(f"The probe is a {type(probe).__name__}; give a list of texts or a tokenized batch.")
