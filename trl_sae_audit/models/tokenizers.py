"""The tokenizer that reads texts for a model: out of a processor, with a padding token that the model embeds."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from ..errors import AuditError

Processing: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin
"""What TRL's trainers take as `processing_class`: a tokenizer, or a processor with one in it."""

_WORD = "audit"


def text_tokenizer(
    processing: Processing, decoder: nn.Module | None = None, *, classifies: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer with which to read texts; the one given where nothing has to be changed.

    Of a processor it is the tokenizer in it, with the processor's chat template, and with messages in the form that the
    template reads. A padding token that the model does not embed, which no text contains, is replaced by the end of sequence.

    Args:
        processing: a tokenizer, or a processor that has one.
        decoder: what will embed the tokens; None where no model reads them.
        classifies: it finds the last token of a text by the padding after it, which must then be the tokenizer's own.

    Raises:
        AuditError: neither of them; or a tokenizer that gives tokens which the model does not embed.
    """
    tokenizer = inner_tokenizer(processing)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise AuditError(
            f"Texts are read with a tokenizer, or a processor that has one, and this is a {type(processing).__name__} without; "
            "pass AutoTokenizer.from_pretrained(…) of the model."
        )
    if decoder is not None:
        check_tokenizer(tokenizer, decoder, classifies=classifies)
    template = tokenizer.chat_template
    if isinstance(processing, ProcessorMixin) and processing.chat_template is not None:
        template = processing.chat_template
    if template != tokenizer.chat_template:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = template
    if template is not None and _reads_parts(tokenizer, first=isinstance(processing, ProcessorMixin)):
        tokenizer = copy.deepcopy(tokenizer)
        plain = tokenizer.apply_chat_template
        vars(tokenizer)["apply_chat_template"] = functools.partial(_apply_to_parts, plain)
    if decoder is not None and (tokenizer.pad_token_id or 0) >= _embedded(decoder):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, decoder: nn.Module, *, classifies: bool = False
) -> None:
    """Refuse a tokenizer that gives tokens which the model does not embed.

    A special token beyond the embeddings that no text gives is no reason: Gemma 3's for pictures in its text models, or a padding
    token that was added, but for a model that classifies.

    Raises:
        AuditError: if so.
    """
    embedded = _embedded(decoder)
    if len(tokenizer) <= embedded:
        return
    added = tokenizer.added_tokens_decoder
    used = [tokenizer.bos_token_id, tokenizer.eos_token_id, *([tokenizer.pad_token_id] if classifies else [])]
    if all(
        token in added and added[token].special and token not in used
        for token in range(embedded, len(tokenizer))
    ):
        return
    raise AuditError(
        f"The tokenizer has {len(tokenizer)} tokens but {type(decoder).__name__} embeds {embedded}. Where tokens were added to "
        "it, give the model rows for them (model.resize_token_embeddings(len(tokenizer))), or take a padding token that it "
        "has; otherwise it is another model's: pass the model's own."
    )


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with where a mask tells padding: the padding token, the end of sequence where there is none, or 0."""
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None), 0)


def _embedded(decoder: nn.Module) -> int:
    model = next(part for part in decoder.modules() if isinstance(part, PreTrainedModel))
    # PEFT may have put an adapter around the embeddings, with or without their attributes
    return next(
        part.num_embeddings
        for part in model.get_input_embeddings().modules()
        if hasattr(part, "num_embeddings")
    )


def inner_tokenizer(processing: Any) -> Any:
    """A tokenizer as it is, or the one in a processor, None where it has none: enough to decode with."""
    return vars(processing).get("tokenizer") if isinstance(processing, ProcessorMixin) else processing


def _reads_parts(tokenizer: PreTrainedTokenizerBase, *, first: bool) -> bool:
    """Whether the chat template is to be given the content of a message as a list of parts, as those of vision-language models are,
    which may read nothing of a plain string.

    Args:
        tokenizer: with a chat template.
        first: take parts where it reads both, as TRL's trainers do with a processor.
    """
    forms = {True: [{"type": "text", "text": _WORD}], False: _WORD}
    return next((form for form in (first, not first) if _is_read(tokenizer, forms[form])), False)


def _is_read(tokenizer: PreTrainedTokenizerBase, content: Any) -> bool:
    try:
        rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError):
        return False
    return _WORD in rendered and repr(_WORD) not in rendered  # not the list as Python prints it


def _apply_to_parts(
    original: Callable[..., Any], conversation: Sequence[Any], *args: Any, **kwargs: Any
) -> Any:
    several = bool(conversation) and not isinstance(conversation[0], Mapping)
    conversations = conversation if several else [conversation]
    structured = [[_structure(message) for message in each] for each in conversations]
    return original(structured if several else structured[0], *args, **kwargs)


def _structure(message: Mapping[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return (
        {**message, "content": [{"type": "text", "text": content}]}
        if isinstance(content, str)
        else {**message}
    )
