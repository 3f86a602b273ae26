"""A small world in which the truth is known, to try the whole loop in and to check it against.

    from trl_sae_audit.lab import build_world

    world = build_world()                     # about a minute the first time, then from the cache
    dataset = world.preferences({"right": 0.5, "agrees": 0.5}, n=1000)
    world.behaviour().rates()                 # how the plain model behaves, with intervals
    world.carriers("agrees")                  # the features that carry agreement, by activation and rule

`lab.language` says what its texts are made of and what their attributes mean.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl_sae_audit.lab.evaluation import Behaviour, base_rates, read_behaviour, sample_answers
    from trl_sae_audit.lab.language import BEHAVIOURS, Attributes, BaseRates, Language
    from trl_sae_audit.lab.preferences import preferences, realised_strengths
    from trl_sae_audit.lab.pretraining import ModelConfig
    from trl_sae_audit.lab.reward import RewardConfig, reward_scores
    from trl_sae_audit.lab.sparse_coding import DictionaryConfig
    from trl_sae_audit.lab.world import World, WorldConfig, build_world

__all__ = [
    "BEHAVIOURS",
    "Attributes",
    "BaseRates",
    "Behaviour",
    "DictionaryConfig",
    "Language",
    "ModelConfig",
    "RewardConfig",
    "World",
    "WorldConfig",
    "base_rates",
    "build_world",
    "preferences",
    "read_behaviour",
    "realised_strengths",
    "reward_scores",
    "sample_answers",
]

_HOME = {
    "BEHAVIOURS": "language",
    "Attributes": "language",
    "BaseRates": "language",
    "Behaviour": "evaluation",
    "DictionaryConfig": "sparse_coding",
    "Language": "language",
    "ModelConfig": "pretraining",
    "RewardConfig": "reward",
    "World": "world",
    "WorldConfig": "world",
    "base_rates": "evaluation",
    "build_world": "world",
    "preferences": "preferences",
    "read_behaviour": "evaluation",
    "realised_strengths": "preferences",
    "reward_scores": "reward",
    "sample_answers": "evaluation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
