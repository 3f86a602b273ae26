"""An existing SAE as the beginning of a training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from torch import Tensor

from ..errors import AuditError
from .directories import load_directory
from .loading import refuse_unsuitable
from .releases import load_release

_TRAINABLE = ("topk", "jumprelu", "standard", "gated")


def load_start(source: str, sae_id: str | None, width: int) -> SAE[Any]:
    """The SAE that a training starts from.

    Args:
        source: a directory, or a release or repository with `sae_id`.
        sae_id: which of them.
        width: of the model's residual stream.

    Raises:
        AuditError: it cannot be loaded; it is of an architecture that cannot be trained further, reads another width, or
            expects its input normalised or centred.
    """
    sae = load_release(source, sae_id) if sae_id is not None else load_directory(Path(source), None)
    refuse_unsuitable(sae, source, transcoder=True)
    kind, cfg = sae.cfg.architecture(), sae.cfg
    if kind not in _TRAINABLE:
        raise AuditError(
            f"SAE {source!r} is of architecture {kind!r}, which is not trained further here; start from one of {', '.join(_TRAINABLE)}, or "
            "omit --from."
        )
    if cfg.d_in != width:
        raise AuditError(
            f"SAE {source!r} reads {cfg.d_in} dimensions but the model's residual stream has {width}; it was made for another model."
        )
    kwargs = cfg.metadata.to_dict().get("model_from_pretrained_kwargs") or {}
    if cfg.normalize_activations != "none" or kwargs.get("center_writing_weights"):
        raise AuditError(
            f"SAE {source!r} expects its input normalised or centred, which a training on the residual stream as it is would break; omit "
            "--from, or start from another SAE."
        )
    return sae


def start_settings(sae: SAE[Any]) -> dict[str, Any]:
    """What the training form of an SAE must have in common with it."""
    settings: dict[str, Any] = {
        "d_sae": sae.cfg.d_sae,
        "apply_b_dec_to_input": sae.cfg.apply_b_dec_to_input,
        "decoder_init_norm": None,
    }
    if sae.cfg.architecture() == "topk":
        settings |= {"k": sae.cfg.k, "rescale_acts_by_decoder_norm": sae.cfg.rescale_acts_by_decoder_norm}
    return settings


@torch.no_grad()
def active_on(sae: SAE[Any], hidden: Tensor) -> float:
    """Mean number of active features a token, of hidden states [n, d_model]."""
    return float((sae.encode(hidden.to(sae.W_enc)) != 0).float().sum(-1).mean())


@torch.no_grad()
def start_from(training: TrainingSAE[Any], sae: SAE[Any], scale: float) -> None:
    """Give an SAE in training another's weights, such that on `scale·h` it does what that does on `h`, `scale` times as large."""
    weights = {name: value.detach().float().clone() for name, value in sae.state_dict().items()}
    weights["W_enc"] /= scale
    for name in ("W_dec", "b_dec"):
        weights[name] *= scale
    training.process_state_dict_for_loading(weights)
    training.load_state_dict(weights)
