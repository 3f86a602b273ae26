"""SAEs in a directory: sae-lens' own of every age, and those of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

from sae_lens import SAE, TopKSAE
from sae_lens.loading.pretrained_sae_loaders import get_sae_lens_config_from_disk, load_safetensors_weights
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import AuditError
from ..io.untrusted import check_regular, read_json
from .formats import FORMATS, read_foreign
from .sae_files import Parts
from .transcoders import TRANSCODERS

_CONFIG, _WEIGHTS = "cfg.json", "sae_weights.safetensors"
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def load_directory(path: Path, converter: str | None = None) -> SAE[Any]:
    """The SAE in a directory, or in a file of one of FORMATS.

    Args:
        path: the directory.
        converter: "sae_lens", or a name in FORMATS; by default the files tell.

    Raises:
        AuditError: there is none; it is a pickle, damaged, incomplete, or of an unknown kind.
    """
    if not path.exists():
        raise AuditError(
            f"{str(path)!r} is not a directory; give a directory saved by sae-lens, or a release together with sae_id."
        )
    own = (path / _CONFIG).is_file() and (path / _WEIGHTS).is_file()
    if converter != "sae_lens" and not (own and converter is None):
        parts = read_foreign(path, converter)
        if parts is not None:
            return make_sae(parts, path)
    for file in (_CONFIG, _WEIGHTS):
        if not (path / file).is_file():
            raise AuditError(
                f"SAE directory {path} has no {file}, so it is not sae-lens' or is incomplete, and its files are of no other "
                f"format that is read ({', '.join(FORMATS)}). Copy the SAE again, with the names it was published under; or "
                "pass its decoder to FeatureDictionary."
            )
    return _load_own(path)


def make_sae(parts: Parts, place: str | Path) -> SAE[Any]:
    """sae-lens' SAE of the parts read at `place`.

    Raises:
        AuditError: arrays whose shapes do not fit together.
    """
    kind, config_kind = {**SAE_CLASS_REGISTRY, **TRANSCODERS}[parts.config["architecture"]]
    sae = kind(config_kind.from_dict({**parts.config, "device": "meta"}))
    sae.cfg.device = "cpu"
    try:
        sae.load_state_dict(parts.state, assign=True)
    except RuntimeError as error:  # how torch says that shapes do not fit
        raise AuditError(
            f"The arrays of the SAE in {str(place)!r} do not fit together ({_one_line(error)}); copy the SAE again."
        ) from error
    return sae.to(dtype=parts.state["W_dec"].dtype, device="cpu")


def _load_own(path: Path) -> SAE[Any]:
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
        sae = SAE.load_from_disk(path, device="cpu", converter=_read_own)
        _check_config(sae)
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, OSError, AttributeError) as error:
        raise AuditError(f"SAE directory {path} is damaged or incomplete: {_one_line(error)}") from error
    return sae


def _read_own(
    path: str | Path, device: str | None, cfg_overrides: dict[str, Any] | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """sae-lens' own files of every age, with the factor that fine-tuning learned for each feature's output, if there is one, folded in.

    Versions before 6 multiplied a feature's activation by it when they decoded.
    """
    config = get_sae_lens_config_from_disk(path, device, cfg_overrides)
    weights = load_safetensors_weights(Path(path) / _WEIGHTS, str(device), config.get("dtype"))
    config.setdefault("dtype", str(weights["W_dec"].dtype))
    factors = [weights.pop(name) for name in _FACTORS if name in weights]
    for factor in factors:
        if bool((factor == 1).all()):
            continue
        if not config.get("finetuning_scaling_factor"):
            raise ValueError(
                "it has a factor for each feature's output, and its configuration says that there is none"
            )
        weights["W_dec"] = weights["W_dec"] * factor[:, None]
    config["finetuning_scaling_factor"] = False
    return config, weights


def _check_shapes(weights: Path, config: Mapping[str, Any]) -> None:
    """Hold the sizes that the configuration claims against the file, before anything of that size is made."""
    sizes = [config.get("d_sae"), config.get("d_in")]
    if not all(isinstance(size, int) and not isinstance(size, bool) and 0 < size < 2**31 for size in sizes):
        raise ValueError(f"d_sae and d_in are {sizes[0]!r} and {sizes[1]!r}")
    with safe_open(weights, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        kinds = {name: file.get_slice(name).get_dtype() for name in shapes}
    sizes[1] = config.get("d_out", sizes[1])  # of a transcoder
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
    if not isinstance(metadata.get("model_from_pretrained_kwargs") or {}, dict):
        raise ValueError(f"model_from_pretrained_kwargs is {metadata['model_from_pretrained_kwargs']!r}")
    if isinstance(sae, TopKSAE) and not 0 < sae.cfg.k <= sae.cfg.d_sae:
        raise ValueError(f"k is {sae.cfg.k!r}, and there are {sae.cfg.d_sae} features")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
