"""A model and its tokenizer for a command."""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AuditError
from ..models.tokenizers import text_tokenizer
from .options import ModelArguments


def load_model(arguments: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, ready for forward passes, and its tokenizer.

    Raises:
        AuditError: if either cannot be loaded, or the model's files lack some of its weights.
    """
    name = arguments.model
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=getattr(torch, arguments.dtype),
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=arguments.trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise AuditError(f"The model {name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise AuditError(
            f"The files of the model {name!r} lack {len(missing)} of its weights, such as {missing[0]!r}, which would be "
            "random: give a complete model with a language-model head."
        )
    return model.to(device).eval(), text_tokenizer(tokenizer)
