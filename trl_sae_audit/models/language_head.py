"""Log-probabilities of given tokens, and their slopes, without the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import AuditError
from .residual_stream import evaluation_mode, last_hidden_state

_CHUNK_BYTES = 64 * 2**20


class LanguageHead:
    """What a causal language model does to its decoder's last hidden state.

    The model's own `forward` is run with its decoder short-circuited, so that soft-capping, scaling and whatever
    else it does between hidden state and logits is the model's code and not a copy of it.

    Args:
        model: a causal language model, in whatever wrapper.
        decoder: its decoder.
        temperature: what the trainer divides the logits by.

    Raises:
        AuditError: if the model has no language-modelling head.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module, temperature: float = 1.0) -> None:
        self.decoder = decoder
        self.temperature = temperature
        self.causal = causal_model(model)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d_model] → [n, vocabulary], float32 or wider."""
        with _returning(self.decoder, hidden[None]):
            tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            # Not the object's own forward: accelerate puts autocast around that in mixed precision, and rounds logits to bfloat16
            logits = type(self.causal).forward(self.causal, input_ids=tokens, use_cache=False).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.temperature == 1.0 else logits / self.temperature

    def log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log π(target | hidden) of [n, d_model] and [n] → [n]; differentiable, all logits at once."""
        return -F.cross_entropy(self.logits(hidden), targets, reduction="none")

    @torch.no_grad()
    def score(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """log π(target | hidden) of [n, d_model] and [n] → [n]; in chunks, without a graph."""
        parts = [self.log_probs(hidden[part], targets[part]) for part in self.chunks(len(hidden))]
        return torch.cat(parts)

    def slopes(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As `score`, with its derivative by `hidden` [n, d_model]; in chunks.

        A token's log-probability depends on its own hidden state only, so the derivative is known before anyone
        asks for it, and no logits need be kept for a backward pass.
        """
        values, derivatives = [], []
        for part in self.chunks(len(hidden)):
            leaf = hidden[part].detach().requires_grad_(True)
            with torch.enable_grad():
                value = self.log_probs(leaf, targets[part])
                (derivative,) = torch.autograd.grad(value.sum(), leaf)
            values.append(value.detach())
            derivatives.append(derivative)
        return torch.cat(values), torch.cat(derivatives)

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of the tokens, at least one, such that the logits of each stay below 64 MiB."""
        width = max(1, _CHUNK_BYTES // (4 * self._vocabulary()))
        for start in range(0, max(tokens, 1), width):
            yield slice(start, min(start + width, tokens))

    def _vocabulary(self) -> int:
        return self.causal.get_output_embeddings().weight.shape[0]


def causal_model(model: nn.Module) -> PreTrainedModel:
    """The causal language model inside `model`, out of PEFT's or another wrapper.

    Raises:
        AuditError: if there is none.
    """
    if isinstance(model, PeftModel) and any(
        config.is_prompt_learning for config in model.peft_config.values()
    ):
        raise AuditError(
            f"{type(model).__name__} learns virtual tokens (prompt learning), which an audit does not put before the text; "
            "audit the model without them, or with LoRA."
        )
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.get_output_embeddings() is not None:
            return part
    raise AuditError(
        f"{type(model).__name__} has no language-modelling head, so its answers have no log-probabilities; load it with "
        "AutoModelForCausalLM."
    )


@dataclass
class _DecoderOutput(ModelOutput):
    """What a decoder returns, of which only the hidden state is there.

    Causal models copy other fields of it into their own output, each its own ones (a cache, a state, router logits). Here they
    are all None, as where the decoder was not asked for them.
    """

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _returning(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let `decoder` return `hidden` as its last hidden state, whatever it is called with."""

    def forward(*args: Any, **kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(last_hidden_state=hidden)

    replaced = vars(decoder).get("forward")
    decoder.forward = forward
    try:
        yield
    finally:
        if replaced is None:
            del decoder.forward
        else:
            decoder.forward = replaced


class Reference:
    """A model as it is, run without gradients."""

    def __init__(self, model: nn.Module, temperature: float = 1.0) -> None:
        self._model = model
        self._head = LanguageHead(model, causal_model(model).get_decoder(), temperature)

    def log_probs(self, batch: Mapping[str, Tensor]) -> Tensor:
        predicted = batch["completion_mask"][:, 1:].bool()
        with torch.no_grad(), evaluation_mode(self._model):
            last = last_hidden_state(self._head.decoder, batch)
            values = self._head.score(last[:, :-1][predicted], batch["input_ids"][:, 1:][predicted])
        return torch.zeros(predicted.shape, dtype=values.dtype, device=values.device).masked_scatter(
            predicted, values
        )
