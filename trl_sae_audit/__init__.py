"""See what a reward really teaches: SAE feature attribution for TRL training runs."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .audit.api import audit_preferences as audit_preferences
    from .audit.api import audit_reward_model as audit_reward_model
    from .audit.lookahead.config import LookaheadConfig as LookaheadConfig
    from .audit.lookahead.optimizer_step import UpdateRule as UpdateRule
    from .audit.result import Audit as Audit
    from .callbacks.attribution import FeatureAttributionCallback as FeatureAttributionCallback
    from .callbacks.guards import GuardCallback as GuardCallback
    from .callbacks.guards import TrainingStopped as TrainingStopped
    from .callbacks.shield import FeatureShieldCallback as FeatureShieldCallback
    from .errors import AuditError as AuditError
    from .filtering.api import filter_preferences as filter_preferences
    from .flags import Flag as Flag
    from .flags import FlagSet as FlagSet
    from .labels.chat import EndpointChat as EndpointChat
    from .labels.chat import LocalChat as LocalChat
    from .labels.make import make_labels as make_labels
    from .labels.neuronpedia import fetch_labels as fetch_labels
    from .labels.score import score_labels as score_labels
    from .models.sampling import Sampling as Sampling
    from .outcomes import Outcome as Outcome
    from .outcomes import write_outcomes as write_outcomes
    from .record.reader import RunRecord as RunRecord
    from .report.page import write_report as write_report
    from .saes.contrast import contrast_directions as contrast_directions
    from .saes.contrast_files import save_directions as save_directions
    from .saes.contrast_sets import ContrastPair as ContrastPair
    from .saes.dictionary import FeatureDictionary as FeatureDictionary
    from .saes.loading import load_dictionary as load_dictionary
    from .shaping.adaptive import AdaptivePenalty as AdaptivePenalty
    from .shaping.callback import ShapingCallback as ShapingCallback
    from .shaping.margin import shape_preference_margin as shape_preference_margin
    from .shaping.penalties import FixedPenalty as FixedPenalty
    from .shaping.reward_function import ShapedReward as ShapedReward
    from .shaping.reward_model import ShapedRewardModel as ShapedRewardModel
    from .shaping.scorer import FeatureScorer as FeatureScorer
    from .verification.comparison import predictors_of as predictors_of
    from .verification.comparison import verify as verify
    from .verification.diff import diff_models as diff_models
    from .verification.measured import measured_change as measured_change
    from .verification.measured import sampled_change as sampled_change

    realised_change = measured_change

if sys.platform == "win32":
    raise ImportError(
        "trl-sae-audit runs on Linux and macOS: the lock of a run's record and the limits on what is read are those of POSIX. On "
        "Windows, use WSL."
    )

__version__ = "0.1.0"

_HOME = {
    "AdaptivePenalty": "shaping.adaptive",
    "Audit": "audit.result",
    "AuditError": "errors",
    "ContrastPair": "saes.contrast_sets",
    "EndpointChat": "labels.chat",
    "FeatureAttributionCallback": "callbacks.attribution",
    "FeatureDictionary": "saes.dictionary",
    "FeatureScorer": "shaping.scorer",
    "FeatureShieldCallback": "callbacks.shield",
    "FixedPenalty": "shaping.penalties",
    "Flag": "flags",
    "FlagSet": "flags",
    "GuardCallback": "callbacks.guards",
    "LocalChat": "labels.chat",
    "LookaheadConfig": "audit.lookahead.config",
    "Outcome": "outcomes",
    "RunRecord": "record.reader",
    "Sampling": "models.sampling",
    "ShapedReward": "shaping.reward_function",
    "ShapedRewardModel": "shaping.reward_model",
    "ShapingCallback": "shaping.callback",
    "TrainingStopped": "callbacks.guards",
    "UpdateRule": "audit.lookahead.optimizer_step",
    "audit_preferences": "audit.api",
    "audit_reward_model": "audit.api",
    "contrast_directions": "saes.contrast",
    "diff_models": "verification.diff",
    "fetch_labels": "labels.neuronpedia",
    "filter_preferences": "filtering.api",
    "load_dictionary": "saes.loading",
    "make_labels": "labels.make",
    "measured_change": "verification.measured",
    "predictors_of": "verification.comparison",
    "sampled_change": "verification.measured",
    "save_directions": "saes.contrast_files",
    "score_labels": "labels.score",
    "shape_preference_margin": "shaping.margin",
    "verify": "verification.comparison",
    "write_outcomes": "outcomes",
    "write_report": "report.page",
}

__all__ = ["__version__", *_HOME]

_ALIASES = {"realised_change": "measured_change"}


def __getattr__(name: str) -> object:
    name = _ALIASES.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
