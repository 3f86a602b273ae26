"""Encoding and decoding with an SAE of sae-lens: whole, or a slice of its features at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from sae_lens import SAE, JumpReLUSAE, StandardSAE, TopKSAE
from sae_lens.saes.gated_sae import GatedSAE
from sae_lens.saes.transcoder import SkipTranscoder, Transcoder
from torch import Tensor, nn

from .transcoders import TopKTranscoder

_SLICE_BYTES = 128 * 2**20
_FULL = (torch.float32, torch.float64)
_SLICED = (StandardSAE, GatedSAE, JumpReLUSAE, TopKSAE, Transcoder)
_CHOOSE = (TopKSAE, TopKTranscoder)


class SaeLensEncoder:
    """Encode and decode with the SAE itself, whatever its architecture and run-time normalisation.

    An SAE in float32 is used as it is. One that is kept in fewer bits, or that is to stay off the device of the hidden states,
    is computed with in float32 all the same: every architecture but matching pursuit treats a feature by itself, up to TopK's
    choice among all of them, so that a slice of 128 MiB at a time gives what the whole would.

    Args:
        sae: in whatever type and place it is kept.
        offload: leave it where it is; slices go to the device of the hidden states.
        centered: the SAE was trained on `h − mean(h)`, the residual stream that TransformerLens makes by centring the weights
            that write to it; a Hugging Face model gives `h`.
    """

    def __init__(self, sae: SAE[Any], *, offload: bool = False, centered: bool = False) -> None:
        self.sae = sae
        self.offload = offload
        self.centered = centered

    @torch.no_grad()
    def encode(self, hidden: Tensor) -> Tensor:
        return self.activations(hidden)

    def activations(self, hidden: Tensor) -> Tensor:
        """`encode`, with derivatives where the SAE has them (TopK: through the chosen)."""
        hidden = self._expected(hidden)
        if self._is_whole(hidden.device):
            return self.sae.encode(hidden)
        parts = [part.encode(hidden) for part in self._slices(hidden.device)]
        joined = torch.cat(parts, dim=-1)
        return self.sae.activation_fn(joined) if isinstance(self.sae, _CHOOSE) else joined

    @torch.no_grad()
    def decode(self, activations: Tensor, hidden: Tensor) -> Tensor:
        decoded = self._decode(activations, self._expected(hidden))
        if isinstance(self.sae, SkipTranscoder):
            return decoded + hidden @ self.sae.W_skip.T.to(hidden)
        return decoded + hidden.mean(-1, keepdim=True) if self.centered else decoded

    def _decode(self, activations: Tensor, hidden: Tensor) -> Tensor:
        self.sae.run_time_activation_norm_fn_in(hidden)
        if self._is_whole(hidden.device):
            return self.sae.decode(activations)
        active = (activations != 0).flatten(0, -2).any(0).nonzero()[:, 0]
        rows = self.sae.W_dec[active.to(self.sae.W_dec.device)].to(hidden)
        if rescales(self.sae):
            rows = nn.functional.normalize(rows, dim=1)
        return self.sae.run_time_activation_norm_fn_out(
            activations[..., active] @ rows + self.sae.b_dec.to(hidden)
        )

    @torch.no_grad()
    def output_scale(self, hidden: Tensor) -> Tensor:
        """What the decoder's output is multiplied by at run time, read off by passing it zeros and ones."""
        hidden, ends = self._expected(hidden), []
        for probe in (torch.zeros_like(hidden[..., :1]), torch.ones_like(hidden[..., :1])):
            self.sae.run_time_activation_norm_fn_in(hidden)
            ends.append(self.sae.run_time_activation_norm_fn_out(probe))
        return ends[1] - ends[0]

    def to(self, device: torch.device) -> SaeLensEncoder:
        if self.offload:
            return self
        moved = with_parameters(
            self.sae, {name: value.to(device) for name, value in self.sae.named_parameters()}
        )
        return SaeLensEncoder(moved, centered=self.centered)

    def _expected(self, hidden: Tensor) -> Tensor:
        return hidden - hidden.mean(-1, keepdim=True) if self.centered else hidden

    def _is_whole(self, device: torch.device) -> bool:
        return all(value.dtype in _FULL and value.device == device for value in self.sae.parameters())

    def _slices(self, device: torch.device) -> Iterator[SAE[Any]]:
        """The SAE a slice of features at a time, none narrower than the k that TopK chooses."""
        d_model, d_sae = self.sae.W_enc.shape
        width = _SLICE_BYTES // (4 * d_model)
        if isinstance(self.sae, _CHOOSE):
            width = max(width, 2 * self.sae.cfg.k)
        count = -(-d_sae // max(width, 1))
        ends = [d_sae * number // count for number in range(count + 1)]
        for start, stop in pairwise(ends):
            yield with_parameters(
                self.sae,
                {
                    name: _part(name, value, slice(start, stop)).to(device, torch.float32)
                    for name, value in self.sae.named_parameters()
                    if name != "W_dec" or rescales(self.sae)
                },
            )


def can_be_sliced(sae: SAE[Any]) -> bool:
    """Whether a slice of the features can be encoded by itself."""
    return isinstance(sae, _SLICED)


def rescales(sae: SAE[Any]) -> bool:
    """Whether the SAE decodes with unit rows, whatever the norms of `W_dec`."""
    return isinstance(sae, TopKSAE) and sae.cfg.rescale_acts_by_decoder_norm


def with_parameters(sae: SAE[Any], parameters: dict[str, Tensor]) -> SAE[Any]:
    """The same SAE with some parameters replaced, and no copy of the others."""
    changed = copy.copy(sae)
    changed._parameters = {
        **sae._parameters,
        **{name: nn.Parameter(value.detach(), requires_grad=False) for name, value in parameters.items()},
    }
    changed.dtype, changed.device = changed.b_dec.dtype, changed.b_dec.device
    return changed


def _part(name: str, value: Tensor, features: slice) -> Tensor:
    if name in ("b_dec", "W_skip"):
        return value
    return value[:, features] if name == "W_enc" else value[features]
