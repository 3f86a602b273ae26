"""How well a dictionary fits the activations it is used on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .dictionary import FeatureDictionary, accumulator

POOR_FVU = 0.5
"""A token FVU from which on a dictionary says too little of a model's tokens to be used."""


@dataclass(frozen=True)
class Health:
    """Fit of a dictionary on the tokens it was given.

    Of a transcoder h is what it writes, the MLP's output, and ĥ what it makes of the MLP's input.

    Attributes:
        fvu: fraction of variance unexplained, Σ‖h − ĥ‖² / Σ‖h − mean(h)‖². 0 is perfect, 1 is no better than
            the mean of the tokens.
        token_fvu: the fraction of each token's own distance from the middle, ‖h − ĥ‖² / ‖h − median‖², capped at 1 and
            averaged over the tokens. In models that blow up the activation of a few tokens, those are most of the
            variance, and `fvu` says only how well they are explained; this says how well a token usually is.
        l0: mean number of active features a token.
        dead: share of the features that were active on none of the tokens.
        tokens: how many tokens (the sum of their weights).

    A figure is NaN where it does not exist: raw directions neither reconstruct nor switch off, and without
    tokens nothing is known.
    """

    fvu: float
    token_fvu: float
    l0: float
    dead: float
    tokens: float


class HealthTotals:
    """Running totals of a dictionary's health; nothing in `update` waits for the device.

    `token_fvu` measures each token from the median of the first tokens given; give a batch at a time, not single tokens.

    Args:
        dictionary: the dictionary, already on the device of the hidden states.
    """

    def __init__(self, dictionary: FeatureDictionary) -> None:
        self.dictionary = dictionary
        self.reset()

    def reset(self) -> None:
        """Forget all tokens seen."""
        device, wide = self.dictionary.device, accumulator(self.dictionary.device)
        self._tokens = torch.zeros((), dtype=wide, device=device)
        self._error = torch.zeros((), dtype=wide, device=device)
        self._square = torch.zeros((), dtype=wide, device=device)
        self._token_shares = torch.zeros((), dtype=wide, device=device)
        self._sum = torch.zeros(self.dictionary.d_model, dtype=wide, device=device)
        self._firing = torch.zeros(self.dictionary.d_sae, dtype=wide, device=device)
        self._shift: Tensor | None = None

    @torch.no_grad()
    def update(self, hidden: Tensor, weight: Tensor | None = None, written: Tensor | None = None) -> None:
        """Add tokens.

        Args:
            hidden: [n, d_model], of any float type.
            written: what is to be explained [n, d_model], where that is not `hidden`.
            weight: [n], how much each token counts: a mask, or None for all alike. What is in a row of
                weight 0 does not matter, not even NaN.
        """
        if weight is None:
            weight = torch.ones(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        weight = weight.to(self.dictionary.device, torch.float32)
        self._tokens += weight.sum(dtype=self._tokens.dtype)
        if self.dictionary.encoder is None:
            return
        rows = self.dictionary.tokens_at_once
        target = hidden if written is None else written
        parts = (values.split(rows) for values in (hidden, target, weight))
        for read, explained, weights in zip(*parts, strict=True):
            read, explained = (some.to(self.dictionary.device, torch.float32) for some in (read, explained))
            self._add(read, explained, weights)

    def result(self) -> Health:
        """The figures so far; reads them from the device."""
        tokens = float(self._tokens)
        if self.dictionary.encoder is None or tokens == 0:
            return unknown_health(tokens)
        variance = float(self._square - self._sum.square().sum() / self._tokens)
        return Health(
            fvu=float(self._error) / variance if variance > 0 else float("nan"),
            token_fvu=float(self._token_shares) / tokens,
            l0=float(self._firing.sum()) / tokens,
            dead=float((self._firing == 0).to(torch.float32).mean()),
            tokens=tokens,
        )

    def frequency(self) -> Tensor:
        """Share of the tokens on which each feature was active: [d_sae], NaN without tokens."""
        return (self._firing / self._tokens).to(torch.float32)

    def _add(self, hidden: Tensor, written: Tensor, weight: Tensor) -> None:
        counts = (weight > 0)[:, None]
        hidden = torch.where(counts, hidden, 0.0)
        activations = self.dictionary.encode(hidden)
        error = torch.where(counts, written - self.dictionary.reconstruct(hidden, activations), 0.0)
        if self._shift is None:  # sums of squares about a point near the mean lose no digits
            self._shift = torch.where(counts, written, torch.nan).nanmedian(0).values.nan_to_num(0.0)
        centred = torch.where(counts, written - self._shift, 0.0)
        wide = self._tokens.dtype
        lost, variance = error.square().sum(-1), centred.square().sum(-1)
        shares = (lost / variance.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1.0)
        self._error += (weight * lost).sum(dtype=wide)
        self._square += (weight * variance).sum(dtype=wide)
        self._token_shares += (weight * shares).sum(dtype=wide)
        self._sum += (weight @ centred).to(wide)
        self._firing += (weight @ (activations != 0).to(torch.float32)).to(wide)


def unknown_health(tokens: float) -> Health:
    """Health where nothing but the number of tokens is known."""
    nan = float("nan")
    return Health(fvu=nan, token_fvu=nan, l0=nan, dead=nan, tokens=tokens)


def health_of(stream: Iterable[Tensor], dictionary: FeatureDictionary, max_tokens: int) -> Health:
    """Health of `dictionary` on about the first `max_tokens` rows of a stream of hidden states [n, d_model].

    Of a transcoder the stream has what it reads and what it writes, side by side [n, 2 · d_model].
    """
    totals, tokens = HealthTotals(dictionary), 0
    for states in stream:
        hidden, written = states[:, : dictionary.d_model], states[:, -dictionary.d_model :]
        totals.update(hidden, written=written)
        tokens += len(hidden)
        if tokens >= max_tokens:
            break
    return totals.result()


@torch.no_grad()
def health(
    dictionary: FeatureDictionary,
    hidden: Tensor,
    weight: Tensor | None = None,
    written: Tensor | None = None,
) -> Health:
    """Health of `dictionary` on hidden states [n, d_model], as `HealthTotals.update` takes them."""
    totals = HealthTotals(dictionary)
    totals.update(hidden, weight, written)
    return totals.result()
