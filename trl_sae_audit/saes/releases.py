"""SAEs of sae-lens' registry, and of other repositories on the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import (
    PretrainedSAELookup,
    get_config_overrides,
    get_pretrained_saes_directory,
)
from safetensors import SafetensorError, safe_open

from ..errors import AuditError
from .directories import load_directory, make_sae
from .formats import read_foreign
from .pickles import is_pickle, pickle_error

PICKLED_LOADERS = {
    "qwen_scope": None,
    "goodfire": None,
    "deepseek_r1": None,
    "dictionary_learning_1": "ae.pt",
    "connor_rob_hook_z": None,
}
"""sae-lens' loaders that unpickle, and the pickle's name in the SAE's folder; None where the registry names the file itself."""
_SAFE = ("*.json", "*.safetensors", "*.npz")


def load_release(release: str, sae_id: str, converter: str | None = None) -> SAE[Any]:
    """The SAE `sae_id` of a release in sae-lens' registry, or of a repository on the hub. Nothing is unpickled.

    Args:
        release: of the registry, or `user/repository`.
        sae_id: of the registry, or the SAE's folder or file in the repository.
        converter: the format, for a repository outside the registry; by default its files tell.

    Raises:
        AuditError: unknown; not downloaded and the hub out of reach; a pickle; damaged.
    """
    registered = get_pretrained_saes_directory().get(release)
    try:
        if registered is None and "/" in release:
            return _load_repository(release, sae_id, converter)
        if (
            registered is not None
            and sae_id in registered.saes_map
            and registered.conversion_func in PICKLED_LOADERS
        ):
            return _load_converted(registered, sae_id)
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
        raise AuditError(
            f"The SAE {release}/{sae_id} cannot be loaded by sae-lens: {_one_line(error)}"
        ) from error


def _load_repository(repository: str, folder: str, converter: str | None) -> SAE[Any]:
    """An SAE in a repository that the registry does not have; only files that run nothing are fetched."""
    place = _fetch(repository, folder)
    if is_pickle(place) and not place.exists():
        parts = read_foreign(place, converter)
        if parts is not None:
            return make_sae(parts, place)
        raise pickle_error(place, f"SAE {repository}/{folder}", f"hf download {repository} {folder}")
    if not place.exists():
        raise AuditError(
            f"Repository {repository} has no {folder} with weights in safetensors or npz. sae_id is the SAE's folder or file in "
            "it; pickles (.pt, .pth, .bin) are not fetched."
        )
    if (place / "config.json").is_file() and not any(map(is_pickle, place.iterdir())):
        parts = read_foreign(place, converter)
        if parts is None and not list(place.glob("*.safetensors")):
            name = f"{folder}/ae.pt"
            raise pickle_error(
                place / "ae.pt", f"SAE {repository}/{folder}", f"hf download {repository} {name}"
            )
    return load_directory(place, converter)


def _load_converted(registered: PretrainedSAELookup, sae_id: str) -> SAE[Any]:
    """An SAE that sae-lens would unpickle: its converted file beside the pickle, if there is one."""
    folder = registered.saes_map[sae_id]
    what = f"SAE {registered.release}/{sae_id}"
    inner = PICKLED_LOADERS[str(registered.conversion_func)]
    file = folder if inner is None else f"{folder}/{inner}"
    try:
        place = _fetch(registered.repo_id, folder)
        parts = read_foreign(place)
    except LocalEntryNotFoundError:
        parts = None
    if parts is None:
        raise pickle_error(Path(file), what, f"hf download {registered.repo_id} {file}")
    overrides = get_config_overrides(registered.release, sae_id)
    parts.config["metadata"] |= {"model_name": registered.model, **overrides}
    return make_sae(parts, place)


def _fetch(repository: str, folder: str) -> Path:
    """The place of an SAE in the local cache, where its harmless files are fetched to, if the hub can be reached."""
    stem = folder.rsplit(".", 1)[0] if is_pickle(Path(folder)) else folder
    patterns = [f"{stem}/{kind}" for kind in _SAFE] + [f"{stem}.{kind[2:]}" for kind in _SAFE] + [folder]
    allowed = [pattern for pattern in patterns if not is_pickle(Path(pattern))]
    return Path(snapshot_download(repository, allow_patterns=allowed)) / folder


@contextmanager
def _shapes_from_cache() -> Iterator[None]:
    """Let sae-lens' loaders find tensor shapes in the local cache.

    They ask the hub for the header of the weights over HTTP, also when the weights are in the cache, so that a
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
