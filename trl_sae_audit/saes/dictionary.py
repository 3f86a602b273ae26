"""A dictionary: what attribution needs to know of a sparse autoencoder."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import AuditError
from ..models.hook_names import SET_HOOK_POINT
from .info import DictionaryInfo

_BLOCK_BYTES = 128 * 2**20
_TOKEN_BYTES = 64 * 2**20
_KEPT = (torch.float32, torch.bfloat16, torch.float16)


class Encoder(Protocol):
    """How hidden states become feature activations and back."""

    def encode(self, hidden: Tensor) -> Tensor:
        """[..., d_model] → feature activations [..., d_sae]."""
        ...

    def decode(self, activations: Tensor, hidden: Tensor) -> Tensor:
        """Feature activations of `hidden` → its reconstruction, or a transcoder's of the MLP's output [..., d_model]."""
        ...

    def output_scale(self, hidden: Tensor) -> Tensor:
        """The factor [..., 1] by which run-time normalisation scales what the decoder writes."""
        ...

    def to(self, device: torch.device) -> Encoder: ...


@dataclass(frozen=True)
class DictionaryChunk:
    """Some consecutive features, where they are computed with.

    Attributes:
        features: which.
        decoder: their rows as the SAE has them, [w, d_model] float32.
        norms: of the rows [w]; 1 where a row is zero.
    """

    features: slice
    decoder: Tensor
    norms: Tensor

    def project(self, vectors: Tensor) -> Tensor:
        """⟨v, d_f⟩ with the unit directions: [..., d_model] → [..., w], computed in the type of the vectors."""
        return (vectors @ self.decoder.T.to(vectors.dtype)).div_(self.norms)


class FeatureDictionary:
    """Unit decoder directions at a hook point, and, where there is one, the encoder that belongs to them.

    Only the rows given are kept, no normalised copy of them, so that a memory-mapped file stays one; what is computed
    with them is computed in float32, a chunk of 128 MiB at a time.

    Args:
        directions: [d_sae, d_model], one row a feature, of any norm. Not copied where it is kept as it is: do not
            change it afterwards.
        hook_point: the module whose output the directions live in: a module path such as
            `model.layers.9`, or TransformerLens' `blocks.9.hook_resid_post`.
        name: how logs, records and flags call the dictionary.
        encoder: gives feature activations; without one an activation is the projection of the
            hidden state onto the unit direction.
        model_name: the model the dictionary was made for, if known.
        neuronpedia_id: `model/sae` on Neuronpedia, if known.
        dtype: keep the rows as float32, bfloat16 or float16; by default as they are given (float64 as float32).
            In bfloat16 an entry is off by at most 1/256 of itself, a score `⟨v, d_f⟩` by at most `Σ_j |v_j·d_fj| / 127`.
        offload: leave the rows where they are when the dictionary moves to a GPU, and send it the chunk that is
            computed with.
        other_hook_points: further names of the same place, which are tried where the model does not have the first.
        reads: where the encoder reads, of a transcoder; by default what is at the hook point.

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
        dtype: torch.dtype | None = None,
        offload: bool = False,
        other_hook_points: Sequence[str] = (),
        reads: str | None = None,
    ) -> None:
        if directions.ndim != 2 or 0 in directions.shape:
            raise AuditError(
                f"The directions of dictionary {name!r} have shape {tuple(directions.shape)}; give a matrix "
                "[d_sae, d_model], one row a feature."
            )
        if not hook_point:
            raise AuditError(f"Dictionary {name!r} does not say where it hooks; {SET_HOOK_POINT}.")
        self.name = name
        self.hook_point = hook_point
        self.choice = ""
        """Why it was chosen, where `load_dictionary("auto")` chose it."""
        self.origin: dict[str, str | bool] = {}
        """Where `load_dictionary` found it, as options of a command: dictionary, sae_id, hook_point, transcoder; empty where it was made
        in memory."""
        self.reads = reads
        self.hook_names = tuple(dict.fromkeys((hook_point, *other_hook_points)))
        self.model_name = model_name
        self.neuronpedia_id = neuronpedia_id
        self.encoder = encoder
        self.offload = offload
        self.decoder, self.norms, self.identity = _examined(
            directions.detach(), _kept(directions, dtype), name
        )

    @property
    def d_sae(self) -> int:
        return self.decoder.shape[0]

    @property
    def d_model(self) -> int:
        return self.decoder.shape[1]

    @property
    def device(self) -> torch.device:
        """Where results are; the rows themselves may be elsewhere."""
        return self.norms.device

    @property
    def directions(self) -> Tensor:
        """All unit directions [d_sae, d_model] in float32: a new matrix, as large as that; `rows` gives some of them."""
        return torch.cat([chunk.decoder / chunk.norms[:, None] for chunk in self.chunks()])

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
            reads=self.reads,
        )

    def to(self, device: torch.device | str) -> FeatureDictionary:
        """The same dictionary with its results on `device`; itself if they are there already."""
        device = torch.device(device)
        if device == self.device:
            return self
        moved = copy.copy(self)
        moved.norms = self.norms.to(device)
        if not self.offload:
            moved.decoder = self.decoder.to(device)
        moved.encoder = None if self.encoder is None else self.encoder.to(device)
        return moved

    def chunks(self, rows: int = 0) -> Iterator[DictionaryChunk]:
        """All features, in their order, a chunk at a time: one that takes at most 128 MiB, as does its float32 [rows, w]."""
        width = max(1, _BLOCK_BYTES // (4 * max(self.d_model, rows)))
        for start in range(0, self.d_sae, width):
            features = slice(start, min(start + width, self.d_sae))
            decoder = self.decoder[features].to(self.device, torch.float32)
            yield DictionaryChunk(features, decoder, _divisors(self.norms[features]))

    @property
    def tokens_at_once(self) -> int:
        """How many tokens' activations [n, d_sae] take 64 MiB."""
        return max(1, _TOKEN_BYTES // (4 * self.d_sae))

    def rows(self, features: Sequence[int] | Tensor) -> Tensor:
        """Unit directions of some features: [..., d_model] float32."""
        index = torch.as_tensor(features, dtype=torch.long)
        found = self.decoder[index.to(self.decoder.device)].to(self.device, torch.float32)
        return found / _divisors(self.norms[index.to(self.device)])[..., None]

    def project(self, vectors: Tensor) -> Tensor:
        """⟨v, d_f⟩ of every row with every unit direction: [n, d_model] → [n, d_sae], float32."""
        vectors = vectors.to(self.device, torch.float32)
        parts = [chunk.project(vectors) for chunk in self.chunks(len(vectors))]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def encode(self, hidden: Tensor, silent: Tensor | None = None) -> Tensor:
        """Feature activations [..., d_sae] of hidden states [..., d_model], 0 at tokens that are `silent` [...]."""
        hidden = hidden.to(self.device, torch.float32)
        found = self.project(hidden) if self.encoder is None else self.encoder.encode(hidden)
        return found if silent is None else found.masked_fill(silent[..., None], 0.0)

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

    def written_norms(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """‖∂h/∂a_f‖: how far one unit of each activation moves the hidden state.

        Args:
            hidden: [n, d_model]; matters only where the encoder normalises at run time.
            features: [k]; all of them by default.

        Returns:
            [1 or n, k or d_sae]
        """
        norms = self.norms if features is None else self.norms[features]
        if self.encoder is None:
            return torch.ones_like(norms)[None]
        return self.encoder.output_scale(hidden.to(self.device, torch.float32)) * norms

    def __repr__(self) -> str:
        kind = "raw directions" if self.encoder is None else type(self.encoder).__name__
        kind = kind if self.reads is None else f"a transcoder that reads {self.reads!r}"
        return (
            f"FeatureDictionary({self.name!r}, hook_point={self.hook_point!r}, d_sae={self.d_sae}, "
            f"d_model={self.d_model}, {kind}, identity={self.identity[:12]})"
        )


def _kept(directions: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return directions.dtype if directions.dtype in _KEPT else torch.float32
    if dtype not in _KEPT:
        raise AuditError(f"A dictionary cannot be kept as {dtype}; choose float32, bfloat16 or float16.")
    return dtype


def _examined(directions: Tensor, dtype: torch.dtype, name: str) -> tuple[Tensor, Tensor, str]:
    """The rows as `dtype`, their norms [d_sae] float32, and the identity, in one reading.

    The identity is the SHA-256 of shape and float32 bytes of what was given: the same decoder has the same identity
    wherever it came from and however it is kept.
    """
    digest = hashlib.sha256(repr(tuple(directions.shape)).encode())
    kept = directions if directions.dtype == dtype else torch.empty_like(directions, dtype=dtype)
    norms = torch.empty(len(directions), dtype=torch.float32, device=directions.device)
    width = max(1, _BLOCK_BYTES // (4 * directions.shape[1]))
    for start in range(0, len(directions), width):
        part = slice(start, start + width)
        rows = directions[part].to(torch.float32)
        digest.update(rows.cpu().contiguous().numpy().data)
        if kept is not directions:
            kept[part] = rows
        norms[part] = torch.linalg.vector_norm(kept[part].to(torch.float32), dim=1)
    if not bool(torch.isfinite(norms).all()):
        bad = int((~torch.isfinite(norms)).nonzero()[0])
        raise AuditError(
            f"Direction {bad} of dictionary {name!r} is not finite; the file is damaged or was saved in a "
            "format that overflowed: load it again or take another dictionary."
        )
    return kept, norms, digest.hexdigest()


def _divisors(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms, 1.0)


def accumulator(device: torch.device) -> torch.dtype:
    """The widest float type there is on the device."""
    return torch.float32 if device.type == "mps" else torch.float64
