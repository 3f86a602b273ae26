"""See what a reward really teaches: SAE feature attribution for TRL training runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adaptive_penalty import AdaptivePenalty
    from .audit import audit_preferences, audit_reward_model
    from .audit_result import Audit
    from .callback import FeatureAttributionCallback
    from .dictionary import FeatureDictionary
    from .errors import AuditError
    from .filtering import filter_preferences
    from .flags import Flag, FlagSet
    from .guards import GuardCallback, TrainingStopped
    from .margin import shape_preference_margin
    from .penalties import FixedPenalty
    from .realised import realised_change, sampled_change
    from .record import RunRecord
    from .sae import load_dictionary
    from .scorer import FeatureScorer
    from .shaped_reward import ShapedReward
    from .shaped_reward_model import ShapedRewardModel
    from .shaping_callback import ShapingCallback
    from .shield import FeatureShieldCallback
    from .verification import predictors_of, verify

__version__ = "0.1.0"

_HOME = {
    "AdaptivePenalty": "adaptive_penalty",
    "Audit": "audit_result",
    "AuditError": "errors",
    "FeatureAttributionCallback": "callback",
    "FeatureDictionary": "dictionary",
    "FeatureScorer": "scorer",
    "FeatureShieldCallback": "shield",
    "FixedPenalty": "penalties",
    "Flag": "flags",
    "FlagSet": "flags",
    "GuardCallback": "guards",
    "RunRecord": "record",
    "ShapedReward": "shaped_reward",
    "ShapedRewardModel": "shaped_reward_model",
    "ShapingCallback": "shaping_callback",
    "TrainingStopped": "guards",
    "audit_preferences": "audit",
    "audit_reward_model": "audit",
    "filter_preferences": "filtering",
    "load_dictionary": "sae",
    "predictors_of": "verification",
    "realised_change": "realised",
    "sampled_change": "realised",
    "shape_preference_margin": "margin",
    "verify": "verification",
}

__all__ = [
    "AdaptivePenalty",
    "Audit",
    "AuditError",
    "FeatureAttributionCallback",
    "FeatureDictionary",
    "FeatureScorer",
    "FeatureShieldCallback",
    "FixedPenalty",
    "Flag",
    "FlagSet",
    "GuardCallback",
    "RunRecord",
    "ShapedReward",
    "ShapedRewardModel",
    "ShapingCallback",
    "TrainingStopped",
    "__version__",
    "audit_preferences",
    "audit_reward_model",
    "filter_preferences",
    "load_dictionary",
    "predictors_of",
    "realised_change",
    "sampled_change",
    "shape_preference_margin",
    "verify",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
