"""The attribution callback's settings as command-line arguments and YAML, for scripts built on `TrlParser`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .callback import FeatureAttributionCallback
from .dictionary import FeatureDictionary
from .errors import AuditError
from .untrusted import read_bytes


@dataclass
class AttributionArguments:
    """What to attribute the loss to, and where to write it. Give several dictionaries for several layers."""

    dictionary: list[str] = field(
        metadata={
            "help": "SAE directory saved by sae-lens, or a sae-lens release together with --sae_id. Several give "
            "several dictionaries; one release with several ids too."
        }
    )
    sae_id: list[str] | None = field(
        default=None,
        metadata={"help": "Which SAE of the release, one per dictionary; left out for directories."},
    )
    hook_point: list[str] | None = field(
        default=None,
        metadata={
            "help": "Module whose output each dictionary reads, such as model.layers.9, if the SAE does not say."
        },
    )
    dictionary_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None,
        metadata={
            "help": "Keep the dictionaries in this type; by default as saved. Scores are computed in float32."
        },
    )
    offload_dictionary: bool = field(
        default=False,
        metadata={
            "help": "Leave the dictionaries in the host's memory; a GPU is sent 128 MiB of them at a time."
        },
    )
    watch: list[str] | None = field(
        default=None,
        metadata={
            "help": "Features always logged, as label=feature (sycophancy=1423); with several dictionaries as "
            "label=dictionary:feature. In YAML a mapping from label to feature will do."
        },
    )
    record_dir: str | None = field(
        default=None, metadata={"help": "Where the run record goes; by default sae_audit in output_dir."}
    )
    record_top: int = field(
        default=20, metadata={"help": "Features recorded per step besides the watched ones."}
    )
    record_examples: bool = field(
        default=False,
        metadata={"help": "Also record every example's own attribution to the watched features."},
    )
    log_top: int = field(default=3, metadata={"help": "How many top features the trainer's log names."})
    token_scores: bool = field(
        default=False,
        metadata={
            "help": "Also record token share and activation attribution over all loss tokens (slower)."
        },
    )
    health_tokens: int = field(
        default=64, metadata={"help": "Tokens per log on which the SAE's fit is measured; 0 for none."}
    )
    probe_file: str | None = field(
        default=None,
        metadata={
            "help": "Text file, one text a line, on which the drift of the watched features is measured."
        },
    )
    probe_steps: int = field(
        default=50, metadata={"help": "Optimizer steps between two looks at the probe texts."}
    )

    def __post_init__(self) -> None:
        # A YAML file may say `dictionary: path` or `watch: {label: feature}` where the command line gives lists.
        self.dictionary = _listed(self.dictionary) or []
        self.sae_id = _listed(self.sae_id)
        self.hook_point = _listed(self.hook_point)
        if isinstance(self.watch, Mapping):
            self.watch = [f"{label}={target}" for label, target in self.watch.items()]
        self.watch = _listed(self.watch)


def attribution_callback(arguments: AttributionArguments) -> FeatureAttributionCallback:
    """The callback that `arguments` describe, its dictionaries loaded.

    Raises:
        AuditError: for a dictionary that cannot be loaded, or arguments that do not fit together.
    """
    probe = None if arguments.probe_file is None else _texts(Path(arguments.probe_file))
    return FeatureAttributionCallback(
        load_dictionaries(arguments),
        output_dir=arguments.record_dir,
        watch=parse_watch(arguments.watch or []),
        top_k=arguments.record_top,
        log_top=arguments.log_top,
        token_scores=arguments.token_scores,
        examples=arguments.record_examples,
        health_tokens=arguments.health_tokens,
        probe=probe,
        probe_steps=arguments.probe_steps,
    )


def load_dictionaries(arguments: AttributionArguments) -> list[FeatureDictionary]:
    """Every dictionary that `arguments` name.

    Raises:
        AuditError: if one cannot be loaded, or there are not as many ids or hook points as dictionaries.
    """
    from .sae import load_dictionary  # sae-lens takes seconds to import

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
        load_dictionary(source, sae_id, hook_point=hook_point, dtype=dtype, offload=offload)
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


def _listed(value: str | list[str] | None) -> list[str] | None:
    return [value] if isinstance(value, str) else value


def _texts(path: Path) -> list[str]:
    if not path.is_file():
        raise AuditError(f"There is no probe file {path}; give a text file with one text a line.")
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise AuditError(f"The probe file {path} cannot be read as text ({error}).") from error
    return [line for line in text.splitlines() if line.strip()]
