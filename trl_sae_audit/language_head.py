"""Log-probabilities of given tokens, and their slopes, without the logits of a whole batch in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .errors import AuditError

_CHUNK_BYTES = 256 * 2**20


class LanguageHead:
    """What a causal language model does to its decoder's last hidden state.

    The model's own `forward` is run with its decoder short-circuited, so that soft-capping, scaling and whatever
    else it does between hidden state and logits is the model's code and not a copy of it.

    Raises:
        AuditError: if the model has no language-modelling head.
    """

    def __init__(self, model: nn.Module, decoder: nn.Module) -> None:
        self.decoder = decoder
        self.causal = causal_model(model)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, d_model] → [n, vocabulary], float32 or wider."""
        with _returning(self.decoder, hidden[None]):
            tokens = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            logits = self.causal(input_ids=tokens, use_cache=False).logits[0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

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
        """Slices of the tokens, at least one, such that the logits of each stay below 256 MiB."""
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
    """All that causal models read of their decoder's output; only the hidden state is there."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: Any = None
    attentions: Any = None
    cross_attentions: Any = None
    router_logits: Any = None
    image_hidden_states: Any = None


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
