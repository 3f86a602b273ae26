"""The attribution callback's settings as command-line arguments and YAML, for scripts built on `TrlParser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import AuditError
from ..io.untrusted import parse_json, read_bytes
from ..models.sampling import Sampling
from ..saes.dictionary import FeatureDictionary
from .attribution import FeatureAttributionCallback
from .config import AttributionConfig

_OPTIONS = ("log_top", "token_scores", "health_tokens", "probe_steps", "generation_steps", "selection", "selection_tokens", "contexts", "attention_sinks")  # fmt: skip
"""The options that have the same name here and in the callback."""


def option(default: Any, help: str) -> Any:
    """A field with a help text."""
    return field(default=default, metadata={"help": help})


@dataclass
class AttributionArguments:
    """What to attribute the loss to, and where to write it. Pass several dictionaries for several layers."""

    dictionary: list[str] = option(
        MISSING,
        "SAE directory, or a sae-lens release together with --sae_id, or auto: the best registered SAE of the model in the local "
        "cache. Several give several dictionaries; one release with several ids too.",
    )
    sae_id: list[str] | None = option(
        None, "Which SAE of the release, one per dictionary; omit it for directories."
    )
    hook_point: list[str] | None = option(
        None, "Module whose output each dictionary reads, such as model.layers.9, if the SAE does not say."
    )
    transcoder: bool = option(
        False,
        "Also take a transcoder of one MLP, whose scores are about what the MLP adds to the residual stream.",
    )
    dictionary_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Keep the dictionaries in this type; by default as saved. Scores are computed in float32."
    )
    offload_dictionary: bool = option(
        False, "Keep the dictionaries in the host's memory and send them to a GPU 128 MiB at a time."
    )
    watch: list[str] | None = option(
        None,
        "Features always logged, as label=feature (sycophancy=1423); with several dictionaries as label=dictionary:feature. "
        "In YAML a mapping from label to feature will do.",
    )
    record_dir: str | None = option(None, "Where the run record goes; by default sae_audit in output_dir.")
    record_overwrite: bool = option(
        False,
        "Replace an earlier run, its record and its model; by default a second run's output_dir is numbered, as runs/dpo-2, and so "
        "is its record.",
    )
    record_top: int = option(AttributionConfig.top_k, "Features recorded per step besides the watched ones.")
    record_examples: bool = option(
        False, "Also record every example's own attribution to the watched features."
    )
    log_top: int = option(AttributionConfig.log_top, "How many top features the trainer's log names.")
    token_scores: bool = option(
        False, "Also record token share and activation attribution over all loss tokens (slower)."
    )
    health_tokens: int = option(
        AttributionConfig.health_tokens, "Tokens per log on which the SAE's fit is measured; 0 for none."
    )
    probe_file: str | None = option(
        None, "Text file with one text per line, on which the drift of the watched features is measured."
    )
    probe_steps: int = option(
        AttributionConfig.probe_steps, "Optimizer steps between two measurements on the probe texts."
    )
    generations: int | None = option(
        None,
        "Number of answers to sample for each prompt when training starts, and again when it ends far from there; every feature's "
        "generation_drift is computed from them. 4 is a good number; the default is none.",
    )
    generation_prompts: str | None = option(
        None,
        "Prompts to answer: a text file with one prompt per line, or .jsonl with a column prompt (text or conversation); by default 64 "
        "prompts of the train set, of whose answers as many are read as have 10,240 tokens.",
    )
    generation_tokens: int = option(128, "Longest answer, in tokens.")
    generation_steps: int = option(
        AttributionConfig.generation_steps, "Optimizer steps between two measurements on the sampled answers."
    )
    selection: bool = option(
        True, "Record what each step selects for, in the features of dictionaries that have an encoder."
    )
    selection_tokens: int | None = option(
        AttributionConfig.selection_tokens,
        "Tokens per step that are encoded for it and for token scores, drawn at random; at most 1,024 by default, fewer where the "
        "dictionary is large beside the model.",
    )
    contexts: bool = option(
        AttributionConfig.contexts,
        "Keep on the record, as text, where each feature is most active in the responses; needs selection.",
    )
    attention_sinks: bool = option(
        False,
        "Count features as active at attention sinks too: tokens of more than ten times the median norm of their answer's.",
    )

    def __post_init__(self) -> None:
        # A YAML file may say `dictionary: path` or `watch: {label: feature}` where the command line gives lists.
        self.dictionary = _as_list(self.dictionary) or []
        self.sae_id = _as_list(self.sae_id)
        self.hook_point = _as_list(self.hook_point)
        if isinstance(self.watch, Mapping):
            self.watch = [f"{label}={target}" for label, target in self.watch.items()]
        self.watch = _as_list(self.watch)


def attribution_callback(
    arguments: AttributionArguments, model: nn.Module | None = None, dataset: str | None = None
) -> FeatureAttributionCallback:
    """The callback that `arguments` describe, its dictionaries loaded.

    Args:
        arguments: from a command line.
        model: that will be trained, for `--dictionary auto`.
        dataset: where the training data are, for the record.

    Raises:
        AuditError: for a dictionary that cannot be loaded, or arguments that do not fit together.
    """
    probe = None if arguments.probe_file is None else _texts("probe_file", Path(arguments.probe_file))
    prompts = None
    if arguments.generation_prompts is not None:
        prompts = _prompts(Path(arguments.generation_prompts))
    generations = None
    if arguments.generations is not None:
        generations = Sampling(arguments.generations, arguments.generation_tokens)
    return FeatureAttributionCallback(
        load_dictionaries(arguments, model),
        output_dir=arguments.record_dir,
        overwrite=arguments.record_overwrite,
        watch=parse_watch(arguments.watch or []),
        top_k=arguments.record_top,
        examples=arguments.record_examples,
        probe=probe,
        generations=generations,
        generation_prompts=prompts,
        dataset=dataset,
        **{name: getattr(arguments, name) for name in _OPTIONS},
    )


def load_dictionaries(
    arguments: AttributionArguments, model: nn.Module | None = None
) -> list[FeatureDictionary]:
    """Every dictionary that `arguments` name.

    Raises:
        AuditError: if one cannot be loaded, or there are not as many ids or hook points as dictionaries.
    """
    from ..saes.loading import load_dictionary  # sae-lens takes seconds to import

    sources: list[str] = arguments.dictionary
    ids: Sequence[str | None] | None = arguments.sae_id
    if not sources:
        raise AuditError("No dictionary is named; pass --dictionary with an SAE directory or a release.")
    if ids and len(sources) == 1:
        sources = sources * len(ids)
    ids = _one_each("sae_id", ids, len(sources))
    hook_points = _one_each("hook_point", arguments.hook_point, len(sources))
    dtype = None if arguments.dictionary_dtype is None else getattr(torch, arguments.dictionary_dtype)
    offload = arguments.offload_dictionary
    return [
        load_dictionary(
            source,
            sae_id,
            hook_point=hook_point,
            dtype=dtype,
            offload=offload,
            transcoder=arguments.transcoder,
            model=model,
        )
        for source, sae_id, hook_point in zip(sources, ids, hook_points, strict=True)
    ]


def parse_watch(entries: list[str]) -> dict[str, int | tuple[str, int]]:
    """`label=feature` or `label=dictionary:feature` → the callback's `watch`.

    Raises:
        AuditError: for an entry of another form, or a label given twice.
    """
    watch: dict[str, int | tuple[str, int]] = {}
    for entry in entries:
        label, _, target = entry.partition("=")
        dictionary, _, feature = target.rpartition(":")
        if not label or not feature.strip().isdecimal():
            raise AuditError(
                f"Cannot read the watched feature {entry!r}; write label=feature, such as sycophancy=1423, or "
                "label=dictionary:feature where there are several dictionaries."
            )
        if label in watch:
            raise AuditError(f"The label {label!r} is given to two watched features; choose another for one.")
        watch[label] = (dictionary, int(feature)) if dictionary else int(feature)
    return watch


def _one_each(option: str, values: Sequence[str | None] | None, dictionaries: int) -> Sequence[str | None]:
    if not values:
        return [None] * dictionaries
    if len(values) != dictionaries:
        raise AuditError(
            f"There are {dictionaries} dictionaries but {len(values)} values of {option}; give one for each."
        )
    return values


def _as_list(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def _texts(name: str, path: Path) -> list[str]:
    if not path.is_file():
        raise AuditError(f"There is no file {path} as {name}; give a text file with one text a line.")
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise AuditError(f"The file {path} given as {name} cannot be read as text ({error}).") from error
    return [line for line in text.splitlines() if line.strip()]


def _prompts(path: Path) -> list[Any]:
    lines = _texts("generation_prompts", path)
    if path.suffix != ".jsonl":
        return lines
    try:
        return [parse_json(line)["prompt"] for line in lines]
    except (ValueError, KeyError, TypeError) as error:
        raise AuditError(
            f"{path} has a line that is no JSON object with a prompt ({error}); write one object a line."
        ) from error
