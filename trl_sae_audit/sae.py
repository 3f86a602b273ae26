"""Dictionaries from sae-lens: a release, a directory, or an SAE in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from sae_lens import SAE, TopKSAE, TrainingSAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.temporal_sae import TemporalSAE
from sae_lens.saes.transcoder import Transcoder
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .dictionary import FeatureDictionary
from .errors import AuditError
from .sae_encoder import SaeLensEncoder, can_be_sliced, rescales, with_parameters
from .untrusted import check_regular, read_json

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
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
) -> FeatureDictionary:
    """An SAE as a dictionary, wherever it comes from.

    On the CPU the weights stay in the file they were read from, mapped into memory: the operating system reads what is
    used, shares it between processes and drops it when memory is short. Whatever the type they are kept in, scores are
    computed in float32.

    Args:
        source: a sae-lens release (with `sae_id`), a directory saved by sae-lens, or an SAE object; of one that
            is still being trained, the inference form at this moment is taken.
        sae_id: which SAE of the release.
        hook_point: overrides the place recorded in the SAE: a module path such as `model.layers.9`.
        name: overrides the name used in logs and records.
        device: where to keep it; a training callback moves it to the model.
        dtype: keep the matrices as float32, bfloat16 or float16; by default as they are saved. bfloat16 halves the memory
            of an SAE saved in float32; `FeatureDictionary` says what it costs in precision.
        offload: leave the weights in the host's memory when the dictionary moves to a GPU, and send the GPU 128 MiB of them at a
            time. For dictionaries that take more of the GPU than you can spare.

    Raises:
        AuditError: unknown release or id, release not downloaded and the hub out of reach, a directory
            that is missing, damaged or of an unknown architecture, a transcoder, an SAE that does not
            read the residual stream or whose input normalisation is unknown, or an architecture that cannot be
            kept as asked.
    """
    if isinstance(source, TrainingSAE):
        sae, default_name = _inference_form(source), source.get_name()
    elif isinstance(source, SAE):
        sae, default_name = source, source.get_name()
    elif sae_id is not None:
        sae, default_name = _load_release(str(source), sae_id), f"{source}/{sae_id}"
    else:
        path = Path(source)
        sae, default_name = _load_directory(path), path.resolve().name
    return _as_dictionary(sae, name or default_name, hook_point, dtype, offload).to(device)


def _as_dictionary(
    sae: SAE[Any], name: str, hook_point: str | None, dtype: torch.dtype | None, offload: bool
) -> FeatureDictionary:
    _refuse_unsuitable(sae, name)
    _refuse_not_finite(sae, name)
    if not can_be_sliced(sae) or sae.dtype == torch.float64:
        if not can_be_sliced(sae) and (dtype not in (None, torch.float32) or offload):
            raise AuditError(
                f"SAE {name!r} ({sae.cfg.architecture()}) needs all of its features at once; leave dtype and offload away."
            )
        sae = with_parameters(sae, {part: value.float() for part, value in sae.named_parameters()})
    metadata = sae.cfg.metadata.to_dict()
    hook_point = hook_point or metadata.get("hf_hook_name") or metadata.get("hook_name")
    if not hook_point:
        raise AuditError(
            f"SAE {name!r} does not record where it hooks; pass hook_point='model.layers.N' to load_dictionary."
        )
    dictionary = FeatureDictionary(
        nn.functional.normalize(sae.W_dec.detach().float(), dim=1) if rescales(sae) else sae.W_dec,
        hook_point,
        name,
        model_name=metadata.get("model_name"),
        neuronpedia_id=metadata.get("neuronpedia_id"),
        dtype=dtype,
        offload=offload,
    )
    if dtype not in (None, sae.W_enc.dtype):
        decoder = sae.W_dec.to(dtype) if rescales(sae) else dictionary.decoder
        sae = with_parameters(sae, {"W_enc": sae.W_enc.to(dtype), "W_dec": decoder})
    dictionary.encoder = SaeLensEncoder(sae, offload=offload)
    return dictionary


def _inference_form(sae: TrainingSAE[Any]) -> SAE[Any]:
    """The SAE that `save_inference_model` would write: batchtopk, say, becomes jumprelu with its threshold."""
    frozen = copy.deepcopy(sae)
    weights = frozen.state_dict()
    frozen.process_state_dict_for_saving_inference(weights)
    inference = SAE.from_dict(frozen.cfg.get_inference_sae_cfg_dict())
    inference.load_state_dict(weights)
    return inference


def _refuse_unsuitable(sae: SAE[Any], name: str) -> None:
    if isinstance(sae, Transcoder):
        raise AuditError(
            f"{name!r} is a transcoder: its decoder writes elsewhere than its encoder reads, so a gradient at one "
            "place cannot be read in its features. Take an SAE of the residual stream."
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


@contextmanager
def _shapes_from_cache() -> Iterator[None]:
    """Let sae-lens' loaders find tensor shapes in the local cache.

    They ask the hub for the header of the weights over HTTP, also when the weights lie in the cache, so that a
    downloaded Gemma Scope 2 release could not be loaded offline.
    """
    over_http = pretrained_sae_loaders.get_safetensors_tensor_shapes

    def cached_first(repo_id: str, filename: str) -> dict[str, list[int]]:
        cached = try_to_load_from_cache(repo_id, filename)
        if not isinstance(cached, str):
            return over_http(repo_id, filename)
        with safe_open(cached, framework="pt") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118

    pretrained_sae_loaders.get_safetensors_tensor_shapes = cached_first
    try:
        yield
    finally:
        pretrained_sae_loaders.get_safetensors_tensor_shapes = over_http


def _load_release(release: str, sae_id: str) -> SAE[Any]:
    try:
        with _shapes_from_cache():
            return SAE.from_pretrained(release, sae_id, device="cpu")
    except LocalEntryNotFoundError as error:
        raise AuditError(
            f"SAE {release}/{sae_id} is not in the local cache and the hub cannot be reached; download it once on a "
            "machine with access, or pass the path of a directory saved by sae-lens."
        ) from error
    except HfHubHTTPError as error:
        raise AuditError(f"The hub refused SAE {release}/{sae_id}: {_one_line(error)}") from error
    except OSError as error:
        raise AuditError(
            f"SAE {release}/{sae_id} is not (wholly) in the local cache and the hub cannot be reached "
            f"({type(error).__name__}); download it once on a machine with access, or pass the path of a directory "
            "saved by sae-lens."
        ) from error
    except (ValueError, KeyError, SafetensorError) as error:
        raise AuditError(f"sae-lens cannot load SAE {release}/{sae_id}: {_one_line(error)}") from error


def _load_directory(path: Path) -> SAE[Any]:
    if not path.is_dir():
        raise AuditError(
            f"{str(path)!r} is not a directory; give a directory saved by sae-lens, or a release together with sae_id."
        )
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise AuditError(
                f"SAE directory {path} has no {file}; it is incomplete or was not saved by sae-lens."
            )
    try:
        config = read_json(path / _CONFIG)
        check_regular(path / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise AuditError(f"{path / _CONFIG} is not valid JSON ({error}); copy the SAE again.") from error
    if not isinstance(config, dict):
        raise AuditError(f"{path / _CONFIG} is not a configuration; copy the SAE again.")
    architecture = config.get("architecture", "standard")
    if not isinstance(architecture, str):
        raise AuditError(f"{path / _CONFIG} has architecture {architecture!r}; copy the SAE again.")
    if architecture in SAE_TRAINING_CLASS_REGISTRY and architecture not in SAE_CLASS_REGISTRY:
        raise AuditError(
            f"SAE directory {path} is a training checkpoint ({architecture}); save the SAE with "
            "save_inference_model and give that directory."
        )
    if architecture not in SAE_CLASS_REGISTRY:
        raise AuditError(
            f"SAE directory {path} is of architecture {architecture!r}, which sae-lens does not know "
            f"({', '.join(sorted(SAE_CLASS_REGISTRY))}); update sae-lens, or save the SAE in one of these."
        )
    try:
        _check_shapes(path / _WEIGHTS, config)
        sae = SAE.load_from_disk(path, device="cpu")
        _check_config(sae)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        raise AuditError(f"SAE directory {path} is damaged or incomplete: {_one_line(error)}") from error
    return sae


def _check_shapes(weights: Path, config: Mapping[str, Any]) -> None:
    """Hold the sizes that the configuration claims against the file, before anything of that size is made."""
    sizes = [config.get("d_sae"), config.get("d_in")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**31 for size in sizes):
        raise ValueError(f"d_sae and d_in are {sizes[0]!r} and {sizes[1]!r}")
    with safe_open(weights, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
    if shapes.get("W_dec") != sizes and shapes.get("W_dec") is not None:
        raise ValueError(f"size mismatch: W_dec is {shapes['W_dec']}, and the configuration says {sizes}")
    strange = [name for name, kind in kinds.items() if kind not in ("F64", "F32", "F16", "BF16")]
    if strange:
        raise ValueError(f"{strange[0]} is of type {kinds[strange[0]]}")


def _check_config(sae: SAE[Any]) -> None:
    """What sae-lens takes from the file as it stands and would stumble over when it encodes."""
    for name, kind in get_type_hints(type(sae.cfg)).items():
        value = vars(sae.cfg).get(name)
        right = (
            isinstance(value, (int, float) if kind is float else kind)
            if kind in (bool, int, float, str)
            else True
        )
        if not right or (isinstance(value, bool) and kind in (int, float)):
            raise ValueError(f"{name} is {value!r}")
    metadata = sae.cfg.metadata.to_dict()
    for name in ("hook_name", "hf_hook_name", "model_name", "neuronpedia_id"):
        if metadata.get(name) is not None and not isinstance(metadata[name], str):
            raise ValueError(f"{name} is {metadata[name]!r}")
    if isinstance(sae, TopKSAE) and not 0 < sae.cfg.k <= sae.cfg.d_sae:
        raise ValueError(f"k is {sae.cfg.k!r}, and there are {sae.cfg.d_sae} features")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
