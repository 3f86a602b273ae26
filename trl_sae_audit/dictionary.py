"""A dictionary: what attribution needs to know of a sparse autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .errors import AuditError

_CHUNK_BYTES = 256 * 2**20


class Encoder(Protocol):
    """How activations of the residual stream become feature activations and back."""

    def encode(self, hidden: Tensor) -> Tensor:
        """[..., d_model] → feature activations [..., d_sae]."""
        ...

    def decode(self, activations: Tensor, hidden: Tensor) -> Tensor:
        """Feature activations of `hidden` → its reconstruction [..., d_model]."""
        ...

    def output_scale(self, hidden: Tensor) -> Tensor:
        """The factor [..., 1] by which run-time normalisation scales what the decoder writes."""
        ...

    def to(self, device: torch.device) -> Encoder: ...


@dataclass(frozen=True)
class DictionaryInfo:
    """What a run record keeps of a dictionary."""

    name: str
    identity: str
    hook_point: str
    d_sae: int
    d_model: int
    model_name: str | None
    neuronpedia_id: str | None


class FeatureDictionary:
    """Unit decoder directions at a hook point, and, where there is one, the encoder that belongs to them.

    Args:
        directions: [d_sae, d_model], one row a feature, of any norm. Kept in float32.
        hook_point: the module whose output the directions live in: a module path such as
            `model.layers.9`, or TransformerLens' `blocks.9.hook_resid_post`.
        name: how logs, records and flags call the dictionary.
        encoder: gives feature activations; without one an activation is the projection of the
            hidden state onto the unit direction.
        model_name: the model the dictionary was made for, if known.
        neuronpedia_id: `model/sae` on Neuronpedia, if known.

    Raises:
        AuditError: if `directions` is not a matrix, or has a value that is not finite.
    """

    def __init__(
        self,
        directions: Tensor,
        hook_point: str,
        name: str,
        *,
        encoder: Encoder | None = None,
        model_name: str | None = None,
        neuronpedia_id: str | None = None,
    ) -> None:
        if directions.ndim != 2 or 0 in directions.shape:
            raise AuditError(
                f"The directions of dictionary {name!r} have shape {tuple(directions.shape)}; give a matrix "
                "[d_sae, d_model], one row a feature."
            )
        if not hook_point:
            raise AuditError(
                f"Dictionary {name!r} does not say where it hooks; pass hook_point='model.layers.N'."
            )
        decoder = directions.detach().to(torch.float32)
        norms = torch.linalg.vector_norm(decoder, dim=1)
        if not bool(torch.isfinite(norms).all()):
            bad = int((~torch.isfinite(norms)).nonzero()[0])
            raise AuditError(
                f"Direction {bad} of dictionary {name!r} is not finite; the file is damaged or was saved in a "
                "format that overflowed: load it again or take another dictionary."
            )
        self.name = name
        self.hook_point = hook_point
        self.model_name = model_name
        self.neuronpedia_id = neuronpedia_id
        self.encoder = encoder
        self.norms = norms
        self.directions = decoder / torch.where(norms > 0, norms, 1.0)[:, None]
        self.identity = _content_hash(decoder)

    @property
    def d_sae(self) -> int:
        return self.directions.shape[0]

    @property
    def d_model(self) -> int:
        return self.directions.shape[1]

    @property
    def device(self) -> torch.device:
        return self.directions.device

    @property
    def info(self) -> DictionaryInfo:
        return DictionaryInfo(
            name=self.name,
            identity=self.identity,
            hook_point=self.hook_point,
            d_sae=self.d_sae,
            d_model=self.d_model,
            model_name=self.model_name,
            neuronpedia_id=self.neuronpedia_id,
        )

    def to(self, device: torch.device | str) -> FeatureDictionary:
        """The same dictionary on `device`; itself if it is there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = object.__new__(FeatureDictionary)
        moved.__dict__ = {
            **self.__dict__,
            "directions": self.directions.to(device),
            "norms": self.norms.to(device),
            "encoder": None if self.encoder is None else self.encoder.to(device),
        }
        return moved

    def project(self, vectors: Tensor) -> Tensor:
        """⟨v, d_f⟩ of every row with every unit direction: [n, d_model] → [n, d_sae], float32."""
        return vectors.to(self.directions) @ self.directions.T

    def encode(self, hidden: Tensor) -> Tensor:
        """Feature activations [..., d_sae] of hidden states [..., d_model]."""
        hidden = hidden.to(self.device, torch.float32)
        if self.encoder is None:
            return hidden @ self.directions.T
        return self.encoder.encode(hidden)

    def reconstruct(self, hidden: Tensor, activations: Tensor) -> Tensor:
        """What the features say of `hidden`: [..., d_model].

        Raises:
            AuditError: for raw directions, which do not reconstruct.
        """
        if self.encoder is None:
            raise AuditError(
                f"Dictionary {self.name!r} is raw directions without an encoder: nothing to reconstruct."
            )
        return self.encoder.decode(activations, hidden.to(self.device, torch.float32))

    def written_norms(self, hidden: Tensor) -> Tensor:
        """‖∂h/∂a_f‖: how far one unit of each activation moves the hidden state.

        Args:
            hidden: [n, d_model]; matters only where the encoder normalises at run time.

        Returns:
            [1 or n, d_sae]
        """
        if self.encoder is None:
            return torch.ones_like(self.norms)[None]
        return self.encoder.output_scale(hidden.to(self.device, torch.float32)) * self.norms

    def chunks(self, rows: int) -> Iterator[slice]:
        """Slices of the features such that a float32 [rows, slice] stays below 256 MiB."""
        width = max(1, _CHUNK_BYTES // (4 * max(1, rows)))
        for start in range(0, self.d_sae, width):
            yield slice(start, min(start + width, self.d_sae))

    def __repr__(self) -> str:
        kind = "raw directions" if self.encoder is None else type(self.encoder).__name__
        return (
            f"FeatureDictionary({self.name!r}, hook_point={self.hook_point!r}, d_sae={self.d_sae}, "
            f"d_model={self.d_model}, {kind}, identity={self.identity[:12]})"
        )


def _content_hash(decoder: Tensor) -> str:
    """SHA-256 of shape and float32 bytes: the same decoder has the same identity wherever it came from."""
    digest = hashlib.sha256(repr(tuple(decoder.shape)).encode())
    for rows in decoder.cpu().contiguous().split(65536):
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()
