"""Random SAEs of every architecture of sae-lens."""

from __future__ import annotations

from typing import Any

import sae_lens
import torch
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

WIDTH, FEATURES, ACTIVE = 8, 24, 4


HOOK = "blocks.3.hook_resid_post"


CONFIGS = {
    "standard": sae_lens.StandardSAEConfig,
    "gated": sae_lens.GatedSAEConfig,
    "jumprelu": sae_lens.JumpReLUSAEConfig,
    "topk": sae_lens.TopKSAEConfig,
    "abstopk": sae_lens.AbsTopKSAEConfig,
    "matching_pursuit": sae_lens.MatchingPursuitSAEConfig,
}


OWN_SETTINGS = {
    "topk": {"k": ACTIVE},
    "abstopk": {"k": ACTIVE},
    "matching_pursuit": {"max_iterations": ACTIVE},
}


def make_sae(architecture: str, **settings: Any) -> SAE[Any]:
    """A random SAE with every parameter, also the biases and thresholds, away from zero."""
    metadata = SAEMetadata(model_name="tiny", hook_name=HOOK)
    own = OWN_SETTINGS.get(architecture, {})
    sae = SAE.from_dict(
        CONFIGS[architecture](d_in=WIDTH, d_sae=FEATURES, metadata=metadata, **own, **settings).to_dict()
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return sae


def hidden_states(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)) * 2 + 1
