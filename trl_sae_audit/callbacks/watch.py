"""What a user asked to watch, checked before the first step: features by label, and a probe of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from ..errors import AuditError
from ..saes.dictionary import FeatureDictionary
from ..trainers.kinds import policy_of
from .probe import Probe


def resolve_watch(
    watch: Mapping[str, Any], dictionaries: tuple[FeatureDictionary, ...]
) -> dict[str, dict[str, int]]:
    """Watched features by dictionary: {name: {label: feature}}.

    Raises:
        AuditError: an index out of range, a dictionary of another name, or several dictionaries and none named.
    """
    by_name = {dictionary.name: dictionary for dictionary in dictionaries}
    resolved: dict[str, dict[str, int]] = {name: {} for name in by_name}
    for label, target in watch.items():
        if isinstance(target, tuple):
            name, feature = target
        elif len(dictionaries) == 1:
            name, feature = dictionaries[0].name, target
        else:
            raise AuditError(
                f"Watched feature {label!r} does not say which of {len(dictionaries)} dictionaries it is of; write "
                f"{{{label!r}: ({dictionaries[0].name!r}, {target})}}."
            )
        if name not in by_name:
            raise AuditError(
                f"Watched feature {label!r} is of dictionary {name!r}, which is not among {sorted(by_name)}."
            )
        d_sae = by_name[name].d_sae
        if not isinstance(feature, int) or isinstance(feature, bool) or not 0 <= feature < d_sae:
            raise AuditError(
                f"Watched feature {label!r} is {feature!r}, but dictionary {name!r} has features 0 to {d_sae - 1}."
            )
        if feature in resolved[name].values():
            raise AuditError(f"Feature {feature} of {name!r} is watched under two labels; keep one of them.")
        resolved[name][label] = feature
    return resolved


def as_probe(probe: Any, trainer: Trainer) -> Probe | None:
    """The user's `probe` as a Probe, tokenized by the trainer's tokenizer where it is texts.

    Raises:
        AuditError: if it is neither texts nor a tokenized batch, or the trainer has no tokenizer that fits its model.
    """
    if probe is None or isinstance(probe, Probe):
        return probe
    if isinstance(probe, Mapping):
        return Probe(probe)
    if isinstance(probe, (list, tuple)) and all(isinstance(text, str) for text in probe):
        return Probe.from_texts(probe, trainer.processing_class, decoder=policy_of(trainer))
    raise AuditError(f"The probe is a {type(probe).__name__}; give a list of texts or a tokenized batch.")
