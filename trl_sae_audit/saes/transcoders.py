"""Transcoders: dictionaries that read an MLP's input and write its output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig, Transcoder
from torch import nn

from ..errors import AuditError

_ACROSS_LAYERS = re.compile(r"(?:^|[^a-z])(?:clt|cross.?layer)", re.IGNORECASE)


@dataclass
class TopKTranscoderConfig(SkipTranscoderConfig):
    """`k` features are active; sparsify's architecture, which sae-lens does not have."""

    k: int = 1

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"k": self.k}


class TopKTranscoder(SkipTranscoder):
    """Like sae-lens' own, with TopK for its activation; `W_skip` is zero where there is no skip connection."""

    cfg: TopKTranscoderConfig

    def get_activation_fn(self) -> nn.Module:
        return TopK(self.cfg.k)


TRANSCODERS: Mapping[str, tuple[Any, Any]] = {"topk_transcoder": (TopKTranscoder, TopKTranscoderConfig)}
"""Architectures besides those of sae-lens, with their configurations."""


def refuse_across_layers(transcoder: Transcoder, name: str) -> None:
    """Raises:
    AuditError: a cross-layer transcoder, as its release or its name on Neuronpedia tells.
    """
    neuronpedia = transcoder.cfg.metadata.to_dict().get("neuronpedia_id") or ""
    if any(_ACROSS_LAYERS.search(text) for text in (name, str(neuronpedia))):
        raise AuditError(
            f"{name!r} is a cross-layer transcoder: it writes in every layer above the one that it reads, and sae-lens adds those "
            "decoders up, so that no gradient at one place can be read in them. Take a transcoder of one MLP, or an SAE."
        )


def transcoder_places(transcoder: Transcoder, name: str) -> tuple[str, str]:
    """Where a transcoder reads and where it writes, by the names that it records; a module's path before TransformerLens' name.

    Raises:
        AuditError: what it writes cannot be compared with a gradient at one place, or it does not record its places.
    """
    metadata = transcoder.cfg.metadata.to_dict()
    if transcoder.cfg.normalize_activations != "none":
        raise AuditError(
            f"Transcoder {name!r} expects activations normalised by {transcoder.cfg.normalize_activations!r}, and does not say "
            "how its output is scaled back; take one without normalisation."
        )
    if (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"):
        raise AuditError(
            f"Transcoder {name!r} writes the output of an MLP with centred weights, which a Hugging Face model does not have; take one "
            "that was trained on the model as it is."
        )
    if transcoder.W_enc.shape[0] != transcoder.W_dec.shape[1]:
        raise AuditError(
            f"Transcoder {name!r} reads {transcoder.W_enc.shape[0]} dimensions and writes {transcoder.W_dec.shape[1]}; only one "
            "that reads and writes at the residual stream's width can be used."
        )
    reads, writes = (
        metadata.get(f"hf_hook_name{end}") or metadata.get(f"hook_name{end}") for end in ("", "_out")
    )
    if not reads or not writes:
        raise AuditError(
            f"Transcoder {name!r} does not record where it reads and where it writes; set hook_name and hook_name_out in its metadata, "
            "such as blocks.9.mlp.hook_in and blocks.9.hook_mlp_out."
        )
    return str(reads), str(writes)
