"""A small world in which the truth is known, for trying out the whole loop and checking its results.

    from trl_sae_audit.lab import build_world

    world = build_world()                     # about a minute the first time, later from the cache
    dataset = world.preferences({"right": 0.5, "agrees": 0.5}, n=1000)
    world.behaviour().rates()                 # how the pre-trained model behaves, with intervals
    world.carriers("agrees")                  # the features that carry agreement, best first

`lab.language` describes its texts and says what their attributes mean.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attributes import BEHAVIOURS as BEHAVIOURS
    from .attributes import Attributes as Attributes
    from .attributes import BaseRates as BaseRates
    from .evaluation import Behaviour as Behaviour
    from .evaluation import base_rates as base_rates
    from .evaluation import read_behaviour as read_behaviour
    from .evaluation import sample_answers as sample_answers
    from .language import Language as Language
    from .preferences import preferences as preferences
    from .preferences import realised_strengths as realised_strengths
    from .pretraining import ModelConfig as ModelConfig
    from .reward import RewardConfig as RewardConfig
    from .reward import reward_scores as reward_scores
    from .sparse_coding import DictionaryConfig as DictionaryConfig
    from .world import World as World
    from .world import WorldConfig as WorldConfig
    from .world import build_world as build_world

_HOME = {
    "BEHAVIOURS": "attributes",
    "Attributes": "attributes",
    "BaseRates": "attributes",
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

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
