"""Language models that make and judge labels: any endpoint that speaks OpenAI's protocol, or a local model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import AuditError
from .prompts import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Chat(Protocol):
    """A language model that replies.

    Attributes:
        name: of the model. source: how it is reached. version: tells it from another model of that name; decides which replies count.
        thinking_tokens: that it may think before each reply, 0 of a model that does not reason.
    """

    name: str
    source: Literal["endpoint", "model"]
    version: str
    thinking_tokens: int

    def reply(self, conversations: Sequence[Messages], max_tokens: int) -> Iterable[str]:
        """A reply to each conversation, of at most so many tokens; each as soon as it and those before it are there."""
        ...


class EndpointChat:
    """A model behind an endpoint that speaks OpenAI's protocol: OpenAI, vLLM, llama.cpp, Ollama …

    Args:
        model: its name there.
        base_url: of the endpoint; by default `$OPENAI_BASE_URL`, else OpenAI's.
        concurrency: requests at once.
        retries: of a request that the endpoint is too busy for.
        temperature: of sampling; None for models that do not take one.
        thinking_tokens: that a reasoning model may think before each reply; they count as written. Without them it replies nothing.

    Raises:
        AuditError: the openai package is missing, or there is no key in `$OPENAI_API_KEY`.
    """

    source: Literal["endpoint", "model"] = "endpoint"

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        concurrency: int = 8,
        retries: int = 5,
        temperature: float | None = 0.0,
        thinking_tokens: int = 0,
    ) -> None:
        try:
            import openai
        except ImportError as error:
            raise AuditError(
                'The openai package is missing, which speaks to the endpoint: pip install "trl-sae-audit[labels]".'
            ) from error
        self.name, self.thinking_tokens = model, thinking_tokens
        address = base_url or os.environ.get("OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY")
        if not key and not address:
            raise AuditError(
                "There is no key in OPENAI_API_KEY; set it, or OPENAI_BASE_URL (--base_url) for an endpoint that needs none."
            )
        self._client = openai.OpenAI(
            api_key=key or "none", base_url=address, max_retries=retries, timeout=120
        )
        self._concurrency = concurrency
        self._sampling = {} if temperature is None else {"temperature": temperature}
        self.version = f"{self._client.base_url} {temperature}"

    def reply(self, conversations: Sequence[Messages], max_tokens: int) -> Iterator[str]:
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            yield from pool.map(lambda each: self._reply(each, max_tokens), conversations)
        finally:
            pool.shutdown(cancel_futures=True)

    def _reply(self, messages: Messages, max_tokens: int) -> str:
        import openai

        request: dict[str, Any] = {
            "model": self.name,
            "messages": messages,
            "max_completion_tokens": max_tokens,
        }
        request |= self._sampling
        try:
            answer = self._client.chat.completions.create(**request)
        except openai.APIConnectionError as error:
            raise AuditError(
                f"The endpoint {self._client.base_url} cannot be reached ({error.__cause__ or error}); check --base_url and run the command "
                "again: what was answered is kept."
            ) from error
        except openai.APIStatusError as error:
            raise AuditError(
                f"The endpoint {self._client.base_url} refused a request to {self.name!r} ({error.status_code}: "
                f"{' '.join(error.message.split())[:300]}); run the command again once that is settled: what was answered is kept."
            ) from error
        if not answer.choices:
            raise AuditError(
                f"The endpoint {self._client.base_url} sent no reply of {self.name!r}; check what it serves."
            )
        choice = answer.choices[0]
        if not choice.message.content and choice.finish_reason == "length":
            raise AuditError(
                f"{self.name!r} replied nothing within {max_tokens} tokens, as a model that reasons first does; give it room with "
                "--thinking_tokens 4000 (thinking_tokens=4000), or take a model that does not reason."
            )
        return choice.message.content or ""


class LocalChat:
    """A Hugging Face model in this process.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template where it has one.
        name: what to call it.
        batch_size: conversations at a time.
        thinking_tokens: that a reasoning model may think before each reply, up to `</think>`.
    """

    source: Literal["endpoint", "model"] = "model"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        batch_size: int = 8,
        thinking_tokens: int = 0,
    ) -> None:
        self.name, self.thinking_tokens = name, thinking_tokens
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self.version = _checksum(model)

    def reply(self, conversations: Sequence[Messages], max_tokens: int) -> list[str]:
        from ..models.sampling import answer_greedily

        prompts = [self._prompt(each) for each in conversations]
        ids = answer_greedily(
            self._model, self._tokenizer, prompts, max_new_tokens=max_tokens, batch_size=self._batch_size
        )
        return [self._tokenizer.decode(each, skip_special_tokens=True) for each in ids]

    def _prompt(self, messages: Messages) -> list[int]:
        if self._tokenizer.chat_template is None:
            text = "\n\n".join(each["content"] for each in messages)
            return self._tokenizer(f"{text}\n").input_ids
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return self._tokenizer(text, add_special_tokens=False).input_ids


def _checksum(model: PreTrainedModel) -> str:
    sums = [float(part.detach().double().sum()) for part in model.parameters()]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]
