"""Dictionaries from sae-lens: a release, a directory, or an SAE in memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder
from torch import Tensor, nn

from ..errors import AuditError
from ..io.places import absolute_place
from ..models.hook_names import SET_HOOK_POINT
from ..models.tokenizers import Processing
from .choice import choose
from .contrast_files import holds_directions, read_directions
from .dictionary import FeatureDictionary
from .directories import load_directory
from .encoder import SaeLensEncoder, can_be_sliced, rescales, with_parameters
from .releases import load_release
from .transcoders import refuse_across_layers, transcoder_places

logger = logging.getLogger(__name__)

_ROWS_BYTES = 64 * 2**20
_NORMALISATIONS = ("none", "constant_norm_rescale", "layer_norm")


def load_dictionary(
    source: str | Path | SAE[Any],
    sae_id: str | None = None,
    *,
    hook_point: str | None = None,
    name: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    offload: bool = False,
    converter: str | None = None,
    transcoder: bool = False,
    model: nn.Module | None = None,
    tokenizer: Processing | None = None,
    texts: Sequence[str] | None = None,
) -> FeatureDictionary:
    """An SAE as a dictionary, wherever it comes from.

    On the CPU the weights stay in the file they were read from, mapped into memory: the operating system reads what is
    used, shares it between processes and drops it when memory is short. Whatever the type they are kept in, scores are
    computed in float32.

    Args:
        source: a sae-lens release or another repository on the hub (with `sae_id`), a directory or a file, or an SAE object; of
            one that is still being trained, the inference form at this moment is taken. Directories are recognised by
            their files: those of sae-lens, Gemma Scope, Llama Scope, sparsify, dictionary_learning, Qwen-Scope, Goodfire.
            A pickle is refused, with the command that converts it once. "auto" takes the best SAE of `model` that is registered
            with sae-lens and in the local cache; the dictionary's `choice` says why.
        sae_id: which SAE of the release; of a repository outside sae-lens' registry, the SAE's folder or file in it.
        hook_point: overrides the place recorded in the SAE: a module path such as `model.layers.9`.
        name: overrides the name used in logs and records.
        device: where to keep it; a training callback moves it to the model.
        dtype: keep the matrices as float32, bfloat16 or float16; by default as they are saved. bfloat16 halves the memory
            of an SAE saved in float32; `FeatureDictionary` says what it costs in precision.
        offload: leave the weights in the host's memory when the dictionary moves to a GPU, and send the GPU 128 MiB of them at a
            time. For dictionaries that take more of the GPU than you can spare.
        converter: the format, "sae_lens" or one of `formats.FORMATS`; by default the files tell.
        transcoder: also take a transcoder of one MLP, which is refused otherwise: its encoder reads the MLP's input, and the
            gradient is read at the MLP's output, so that its scores are about what the MLP adds to the residual stream. What is
            printed and recorded says so. Its places are those that it records.
        model: with "auto", the model that will be trained or audited.
        tokenizer, texts: with "auto", to choose by the fit on these texts.

    Raises:
        AuditError: unknown release or id, release not downloaded and the hub out of reach, a directory
            that is missing, damaged or of an unknown architecture, a transcoder that was not asked for, an SAE that does not
            read the residual stream or whose input normalisation is unknown, or an architecture that cannot be
            kept as asked.
    """
    if source == "auto":
        if model is None:
            raise AuditError('With "auto", load_dictionary chooses an SAE for a model; pass model=.')

        def load(release: str, identity: str) -> FeatureDictionary:
            parts = {
                "hook_point": hook_point,
                "name": name,
                "device": device,
                "dtype": dtype,
                "offload": offload,
            }
            return load_dictionary(release, identity, **parts)  # type: ignore[arg-type]

        return choose(model, load, tokenizer, texts)
    if not isinstance(source, SAE | TrainingSAE) and sae_id is None and holds_directions(Path(source)):
        directions = read_directions(Path(source))
        directions.origin = _origin(source)
        return directions.to(device)
    if isinstance(source, TrainingSAE):
        sae, default_name = _inference_form(source), source.get_name()
    elif isinstance(source, SAE):
        sae, default_name = source, source.get_name()
    elif sae_id is not None:
        sae, default_name = load_release(str(source), sae_id, converter), f"{source}/{sae_id}"
    else:
        path = Path(source)
        sae, default_name = load_directory(path, converter), path.resolve().name
    if isinstance(sae, Transcoder):
        refuse_across_layers(sae, default_name)
        if "transcoder" not in default_name.lower():
            default_name = f"{default_name}-transcoder"  # wherever a dictionary is named, it is said
    dictionary = _as_dictionary(sae, name or default_name, hook_point, dtype, offload, transcoder)
    if isinstance(source, str | Path):
        asked = True if dictionary.reads else None
        dictionary.origin = _origin(source, sae_id=sae_id, hook_point=hook_point, transcoder=asked)
    return dictionary.to(device)


def _origin(source: str | Path, **options: str | bool | None) -> dict[str, str | bool]:
    given = {name: value for name, value in options.items() if value is not None}
    return {"dictionary": absolute_place(source), **given}


def _as_dictionary(
    sae: SAE[Any],
    name: str,
    hook_point: str | None,
    dtype: torch.dtype | None,
    offload: bool,
    transcoder: bool,
) -> FeatureDictionary:
    refuse_unsuitable(sae, name, transcoder)
    _refuse_not_finite(sae, name)
    if not can_be_sliced(sae) or sae.dtype == torch.float64:
        if not can_be_sliced(sae) and (dtype not in (None, torch.float32) or offload):
            raise AuditError(
                f"SAE {name!r} ({sae.cfg.architecture()}) needs all of its features at once; omit dtype and offload."
            )
        sae = with_parameters(sae, {part: value.float() for part, value in sae.named_parameters()})
    metadata = sae.cfg.metadata.to_dict()
    reads, others = None, []
    if isinstance(sae, Transcoder):
        if hook_point:
            raise AuditError(
                f"Transcoder {name!r} has two places, and one hook_point does not say which is meant; omit it. Other places than "
                "those it records: set hook_name and hook_name_out in its metadata."
            )
        reads, hook_point = transcoder_places(sae, name)
        logger.warning(
            "Dictionary %r is a transcoder: its encoder reads %s, its decoder writes %s, and its scores are about what this MLP adds, "
            "not about the whole residual stream.",
            *(name, reads, hook_point),
        )
    elif not hook_point:
        recorded = [metadata[key] for key in ("hf_hook_name", "hook_name") if metadata.get(key)]
        hook_point, *others = recorded or [None]
    if not hook_point:
        raise AuditError(f"SAE {name!r} does not record where it hooks; {SET_HOOK_POINT}.")
    dictionary = FeatureDictionary(
        nn.functional.normalize(sae.W_dec.detach().float(), dim=1) if rescales(sae) else sae.W_dec,
        hook_point,
        name,
        model_name=metadata.get("model_name"),
        neuronpedia_id=metadata.get("neuronpedia_id"),
        dtype=dtype,
        offload=offload,
        other_hook_points=others,
        reads=reads,
    )
    if dtype not in (None, sae.W_enc.dtype):
        decoder = sae.W_dec.to(dtype) if rescales(sae) else dictionary.decoder
        sae = with_parameters(sae, {"W_enc": sae.W_enc.to(dtype), "W_dec": decoder})
    dictionary.encoder = SaeLensEncoder(sae, offload=offload, centered=_is_centered(metadata))
    return dictionary


def _is_centered(metadata: Mapping[str, Any]) -> bool:
    """Whether the SAE was trained on the residual stream less its mean, as those of GPT-2 in early releases of sae-lens."""
    return bool((metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights"))


def _inference_form(sae: TrainingSAE[Any]) -> SAE[Any]:
    """The SAE that `save_inference_model` would write: batchtopk, say, becomes jumprelu with its threshold."""
    frozen = copy.deepcopy(sae)
    weights = frozen.state_dict()
    frozen.process_state_dict_for_saving_inference(weights)
    inference = SAE.from_dict(frozen.cfg.get_inference_sae_cfg_dict())
    inference.load_state_dict(weights)
    return inference


def refuse_unsuitable(sae: SAE[Any], name: str, transcoder: bool = False) -> None:
    """Raises:
    AuditError: what cannot be read as a dictionary of the residual stream, or expects an input that is not known.
    """
    if isinstance(sae, Transcoder) and not transcoder:
        raise AuditError(
            f"{name!r} is a transcoder: its encoder reads an MLP's input and its decoder writes that MLP's output, so its scores "
            "are about what the MLP adds, not about the residual stream. Take an SAE of the residual stream, or ask for it: "
            "transcoder=True (on the command line --transcoder)."
        )
    if isinstance(sae, TemporalSAE):
        raise AuditError(
            f"{name!r} is a temporal SAE: its activation at a token depends on the tokens before it, which "
            "attribution by token cannot honour. Take a token-wise SAE, or pass its decoder to FeatureDictionary."
        )
    if sae.cfg.reshape_activations != "none":
        raise AuditError(
            f"SAE {name!r} reads attention heads ({sae.cfg.reshape_activations}), not the residual stream; take an "
            "SAE whose hook is hook_resid_post."
        )
    if sae.cfg.normalize_activations not in _NORMALISATIONS:
        raise AuditError(
            f"SAE {name!r} expects activations normalised by {sae.cfg.normalize_activations!r}, whose factor is not in "
            "the file; fold it into the weights first (sae.fold_activation_norm_scaling_factor or "
            "fold_activation_whitening), or load the SAE by its release."
        )


def _refuse_not_finite(sae: SAE[Any], name: str) -> None:
    """A threshold may be infinite, which switches a feature off; nothing else may."""
    for part, values in sae.named_parameters():
        check = torch.isnan if part == "threshold" else _not_finite
        if any(
            bool(check(some).any())
            for some in values.detach().split(max(1, _ROWS_BYTES // values[:1].nbytes))
        ):
            raise AuditError(
                f"{part} of SAE {name!r} has values that are not finite; the file is damaged or was saved in a format "
                "that overflowed: load it again or take another SAE."
            )


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite()
