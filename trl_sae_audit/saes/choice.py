"""`load_dictionary("auto", model=…)`: which registered SAE of a model to take, of those in the local cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

from huggingface_hub import try_to_load_from_cache
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import nn

from ..errors import AuditError, NoDictionaryError
from ..models.hook_points import layer_lists, resolve_hook_point
from ..models.residual_stream import TokenRules, residual_stream
from ..models.tokenizers import Processing, text_tokenizer
from .compatibility import check_dictionary, model_name
from .dictionary import FeatureDictionary
from .fit import health_of

logger = logging.getLogger(__name__)

_WEIGHTS = {
    None: "{path}/sae_weights.safetensors",
    "gemma_2": "{path}/params.npz",
    "gemma_3": "{path}/params.safetensors",
    "llama_scope": "{path}/checkpoints/final.safetensors",
    "llama_scope_r1_distill": "{path}/sae_weights.safetensors",
    "dictionary_learning_1": "{path}/ae.safetensors",
    "qwen_scope": "{stem}.safetensors",
    "goodfire": "{stem}.safetensors",
    "deepseek_r1": "{stem}.safetensors",
}
"""Of sae-lens' loaders, the file that holds the weights; pickles by the name of their converted form."""
_ELSEWHERE = re.compile(
    r"transcoder|crosscoder|clt|mlp|att|hook_z|resid_mid|res_mid|lx[am]_|embedding|temporal"
)
_LAYER = re.compile(r"(?:layer_?|blocks\.|\bl)(\d+)")
_POST_TRAINED = re.compile(r"[-_](?:it|instruct|chat|base|pt)$")
_SAME = {"gpt2": "gpt2-small", "gemma-3-270m-pt": "gemma-3-270m"}
_MEASURED = 6
_TOKENS = 4_000


@dataclass(frozen=True)
class Candidate:
    """A registered SAE of the model's residual stream.

    Attributes:
        exact: of this very model, not of the base it was trained from or of what was trained from it.
        labelled: its features have pages on Neuronpedia.
        layer: whose output it reads.
    """

    release: str
    sae_id: str
    repository: str
    file: str
    exact: bool
    labelled: bool
    layer: int

    @property
    def cached(self) -> bool:
        return isinstance(try_to_load_from_cache(self.repository, self.file), str)

    def describe(self, depth: int) -> str:
        whose = "of this very model" if self.exact else "of another stage of training of this model"
        labels = "with" if self.labelled else "without"
        return f"{whose}, {labels} labels on Neuronpedia, layer {self.layer} of {depth}"


def registered_saes(model: nn.Module) -> list[Candidate]:
    """SAEs of the model's residual stream in sae-lens' registry, the preferred first.

    Preferred is one of this very checkpoint, then one whose features are labelled, then one near the middle layer.

    Raises:
        NoDictionaryError: the model does not say what it is, or none is registered.
    """
    name = model_name(model)
    depth = model_depth(model)
    wanted = _plain(name)
    found = []
    for release, entry in get_pretrained_saes_directory().items():
        if _family(_plain(entry.model)) != _family(wanted) or entry.conversion_func not in _WEIGHTS:
            continue
        for sae_id, path in entry.saes_map.items():
            layer = _LAYER.search(sae_id) or _LAYER.search(path)
            if layer is None or _ELSEWHERE.search(f"{release} {sae_id} {path}".lower()):
                continue
            number = int(layer[1]) - ("resid_pre" in sae_id)
            file = _WEIGHTS[entry.conversion_func].format(path=path, stem=path.rsplit(".", 1)[0])
            exact, labelled = _plain(entry.model) == wanted, bool(entry.neuronpedia_id.get(sae_id))
            if 0 <= number < depth:
                found.append(Candidate(release, sae_id, entry.repo_id, file, exact, labelled, number))
    if not found:
        raise NoDictionaryError(
            f"No SAE of the residual stream of {name or 'a model that does not say what it is'!r} is registered in sae-lens.",
            "Where the model is one of another name, say so (model.config.name_or_path = 'google/gemma-3-4b-it'); or give a directory; or train "
            "one with `trl-sae-audit train-sae`; or do without: `trl-sae-audit direction`.",
        )
    middle = (depth - 1) / 2
    return sorted(found, key=lambda one: (not one.exact, not one.labelled, abs(one.layer - middle)))


def model_depth(model: nn.Module) -> int:
    """How many layers the language model has.

    Raises:
        AuditError: if its list of layers is not found once.
    """
    lists = layer_lists(model)
    if len(lists) != 1:
        resolve_hook_point(model, "0")
        raise AuditError(f"{type(model).__name__} has no list of layers that its configuration tells.")
    return next(iter(lists.values()))


def choose(
    model: nn.Module,
    load: Callable[[str, str], FeatureDictionary],
    tokenizer: Processing | None = None,
    texts: Sequence[str] | None = None,
) -> FeatureDictionary:
    """The best registered SAE of a model among those in the local cache; what decided is logged and kept as its `choice`.

    Args:
        model: it must say what it is in `config.name_or_path`.
        load: makes a dictionary of a release and an id.
        tokenizer: the model's, to measure the fit.
        texts: where given, the first few candidates are measured on them, and the one of the lowest token FVU is taken.

    Raises:
        AuditError: none registered or none in the cache, with what to fetch.
    """
    candidates = registered_saes(model)
    cached = [candidate for candidate in candidates if candidate.cached]
    depth = model_depth(model)
    if not cached:
        best = candidates[0]
        raise AuditError(
            f"For this model's residual stream sae-lens has {len(candidates)} SAEs, but none is in the local cache. The first "
            f"choice is {best.release} {best.sae_id} ({best.describe(depth)}): fetch it once by "
            f"load_dictionary({best.release!r}, {best.sae_id!r}), where the hub can be reached. Or let `trl-sae-audit audit --dictionary train` "
            "train one on the data."
        )
    reason = f"the first of {len(cached)} in the local cache ({len(candidates)} registered)"
    best = cached[0]
    if texts is not None and tokenizer is not None:
        fits = {}
        for candidate in islice(cached, _MEASURED):
            dictionary = load(candidate.release, candidate.sae_id).to(next(model.parameters()).device)
            point = check_dictionary(dictionary, model)
            reader = text_tokenizer(tokenizer, point.decoder)
            stream = residual_stream(model, reader, texts, point, TokenRules())
            fits[candidate] = health_of(stream, dictionary, _TOKENS).token_fvu
        best = min(fits, key=lambda candidate: fits[candidate])
        measured = ", ".join(f"{one.release} {one.sae_id} {fvu:.3f}" for one, fvu in fits.items())
        reason = f"the lowest token FVU on the texts given, of {measured}"
    dictionary = load(best.release, best.sae_id)
    check_dictionary(dictionary, model)
    dictionary.choice = f"{best.release} {best.sae_id}: {reason}; {best.describe(depth)}"
    logger.info("Dictionary chosen: %s.", dictionary.choice)
    return dictionary


def _plain(name: str) -> str:
    """A model's name without its user, in lower case, the base model of Gemma without its suffix."""
    short = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return _SAME.get(short, short)


def _family(plain: str) -> str:
    return _POST_TRAINED.sub("", plain).removeprefix("meta-")
