"""Random transcoders of every architecture, and what they read and write in a model, captured by hooks of the tests' own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor, nn

from helpers.worlds import D_MODEL, D_SAE
from trl_sae_audit.saes.transcoders import TopKTranscoder, TopKTranscoderConfig

READS, WRITES = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
CLASSES: dict[str, tuple[Any, Any]] = {
    "transcoder": (Transcoder, TranscoderConfig),
    "skip_transcoder": (SkipTranscoder, SkipTranscoderConfig),
    "jumprelu_transcoder": (JumpReLUTranscoder, JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig),
    "topk_transcoder": (TopKTranscoder, TopKTranscoderConfig),
}


def make_transcoder(
    architecture: str = "jumprelu_transcoder", reads: str = READS, writes: str = WRITES, **metadata: Any
) -> Transcoder:
    """With every parameter away from zero, and about half of the features active."""
    places = {"model_name": "tiny", "hook_name": reads, "hook_name_out": writes, **metadata}
    settings: dict[str, Any] = {
        "d_in": D_MODEL,
        "d_out": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
    }
    settings["apply_b_dec_to_input"] = False
    kind, config = CLASSES[architecture]
    transcoder: Transcoder = kind(config.from_dict({**settings, "k": 7}))
    transcoder.cfg.metadata = SAEMetadata(**places)
    generator = torch.Generator().manual_seed(0)
    for parameter in transcoder.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return transcoder


@contextmanager
def watched(model: nn.Module, reads: str, writes: str) -> Iterator[dict[str, Tensor]]:
    """The input of one module and the output of another in the next forward; the output keeps its gradient."""
    seen: dict[str, Tensor] = {}

    def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen["read"] = args[0].detach()

    def on_output(module: nn.Module, args: Any, output: Tensor) -> None:
        seen["written"] = output
        if output.requires_grad:
            output.retain_grad()

    handles = [
        model.get_submodule(reads).register_forward_pre_hook(on_input),
        model.get_submodule(writes).register_forward_hook(on_output),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
