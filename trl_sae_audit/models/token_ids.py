"""Prompts and responses as the token ids a scorer's model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import AuditError

Ids = tuple[int, ...]
Text = str | Sequence[Mapping[str, Any]] | None


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], responses: Sequence[Text]
) -> list[tuple[Ids, Ids]]:
    """Token ids of each prompt and of the response after it, each tokenized on its own.

    Args:
        tokenizer: the model's.
        prompts: strings or lists of messages; None or "" where there is none.
        responses: as many, strings or lists of messages.

    Raises:
        AuditError: a conversation, and the tokenizer has no chat template.
    """
    rendered = [_render(tokenizer, *pair) for pair in zip(prompts, responses, strict=True)]
    before = _ids_of(tokenizer, [pair[0] for pair in rendered], begins=True)
    after = _ids_of(tokenizer, [pair[1] for pair in rendered], begins=False)
    return list(zip(before, after, strict=True))


def _render(tokenizer: PreTrainedTokenizerBase, prompt: Text, response: Text) -> tuple[str, str]:
    if not prompt:
        return "", _plain(response)
    if isinstance(prompt, str):
        return prompt, _plain(response)
    if tokenizer.chat_template is None:
        raise AuditError(
            "The prompt is a conversation, but the scorer's tokenizer has no chat template; pass the tokenizer of a "
            "chat model, or plain text."
        )
    messages = [dict(message) for message in prompt]
    before = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    answer = [{"role": "assistant", "content": response}] if isinstance(response, str) else response or []
    whole = str(tokenizer.apply_chat_template([*messages, *answer], tokenize=False))
    return before, whole[len(before) :] if whole.startswith(before) else _plain(response)


def _ids_of(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, begins: bool) -> list[Ids]:
    """Each distinct text once: the prompts of a group are all the same."""
    bos = tokenizer.bos_token
    special = {
        text: begins and not (bos is not None and text.startswith(str(bos))) for text in dict.fromkeys(texts)
    }
    ids: dict[str, Ids] = {}
    for wanted in (True, False):
        batch = [text for text, has in special.items() if has == wanted]
        if not batch:
            continue
        rows = tokenizer(batch, add_special_tokens=wanted, verbose=False)["input_ids"]
        for text, row in zip(batch, rows, strict=True):
            ended = wanted and row and row[-1] == tokenizer.eos_token_id
            ids[text] = tuple(row[:-1] if ended else row)
    return [ids[text] for text in texts]


def _plain(response: Text) -> str:
    if isinstance(response, str) or response is None:
        return response or ""
    return "".join(str(message.get("content") or "") for message in response)
