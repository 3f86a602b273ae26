"""What the model makes of a prompt, in few numbers: by them prompts are sorted into topics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.attention_sinks import find_attention_sinks

MOST_NUMBERS = 128
"""Numbers that are kept of a prompt's state."""


def state_size(d_model: int) -> int:
    """How many numbers are kept of a prompt's state."""
    return min(d_model, MOST_NUMBERS)


class PromptStates:
    """The mean hidden state of each prompt's tokens, without attention sinks.

    A wide state is projected onto `MOST_NUMBERS` random directions, the same for every audit of that width: distances between
    prompts stay as they are to about a tenth, and so do their k-means clusters (Boutsidis et al. 2010; Makarychev et al. 2019).

    Args:
        d_model: of the residual stream.
    """

    def __init__(self, d_model: int) -> None:
        self._directions: Tensor | None = None
        if d_model > MOST_NUMBERS:
            drawn = torch.randn(
                d_model, MOST_NUMBERS, dtype=torch.float32, generator=torch.Generator().manual_seed(0)
            )
            self._directions = drawn / MOST_NUMBERS**0.5

    def of(self, hidden: Tensor, real: Tensor, answer: Tensor) -> Tensor:
        """Of each row [rows, numbers] float32, 0 of a row that begins with its answer.

        Args:
            hidden: [rows, T, d_model].
            real: tokens that are no padding [rows, T].
            answer: the answer's own tokens [rows, T]; what comes before them is the prompt.
        """
        prompt = real.bool() & (answer.cumsum(1) == 0)
        prompt &= ~find_attention_sinks(hidden, prompt)
        total = torch.where(prompt[..., None], hidden, 0).sum(1, dtype=torch.float32)
        mean = total / prompt.sum(1, keepdim=True).clamp_min(1)
        if self._directions is None:
            return mean
        self._directions = self._directions.to(mean.device)
        return mean @ self._directions
