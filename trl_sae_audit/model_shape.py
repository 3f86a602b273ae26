"""The shape of a model from its configuration alone: no weight is loaded or even made."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .errors import AuditError
from .hook_points import layer_lists
from .plan import ModelShape

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def load_shape(name_or_path: str, *, trust_remote_code: bool = False) -> ModelShape:
    """Of a directory with a config.json, or of a model on the Hub.

    Raises:
        AuditError: no such configuration, or not of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        return shape_of(config, name_or_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise AuditError(
            f"the configuration of {name_or_path!r} cannot be used ({' '.join(str(error).split())}); give a directory with "
            "a config.json, or --parameters, --layers, --hidden_size and --vocab_size instead."
        ) from error


def shape_of(config: PreTrainedConfig, name: str, *, trust_remote_code: bool = False) -> ModelShape:
    """Of a configuration; the model is laid out on the device `meta`, which has no memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    lists = layer_lists(model)
    if not lists:
        raise AuditError(f"{type(model).__name__} has no list of decoder layers, so its cost is not known.")
    used = _share_of_experts(text)
    active = sum(
        parameter.numel() * (used if ".experts." in name else 1.0)
        for path in lists
        for name, parameter in model.get_submodule(path).named_parameters()
        if parameter.ndim > 1
    )
    given = text.head_dim if hasattr(text, "head_dim") else None
    head_width = given or text.hidden_size // text.num_attention_heads
    return ModelShape(
        name=name,
        layers=sum(lists.values()),
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        parameters=model.num_parameters(),
        active=round(active),
        attention_width=text.num_attention_heads * head_width,
    )


def _share_of_experts(text: PreTrainedConfig) -> float:
    """Which part of a mixture's experts a token goes through; 1 where there are none."""
    for name in _EXPERTS:
        if hasattr(text, name) and hasattr(text, "num_experts_per_tok"):
            return text.num_experts_per_tok / getattr(text, name)
    return 1.0
