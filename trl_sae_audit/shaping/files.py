"""A shaped reward model on disk: the reward model, the flags, the calibration, and the penalty with its coefficients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForSequenceClassification

from ..errors import AuditError
from ..flags import FlagSet
from ..io.manifest import MANIFEST, check_free, read_manifest, reading, write_manifest
from .penalties import Penalty
from .scorer import FeatureScorer
from .shaper import Shaper, penalty_from_settings

_FLAGS, _CALIBRATION, _REWARD = "flags.yaml", "calibration.safetensors", "reward_model"


def save_shaped(directory: Path, name: str, reward_model: Any, shaper: Shaper) -> None:
    """Write all of it.

    Args:
        directory: where; made if need be.
        name: of the reward.
        reward_model: None for a function, which is not written.
        shaper: its flags, scorer and penalty.

    Raises:
        AuditError: a reward model with PEFT adapters, or a directory that cannot be written.
    """
    if isinstance(reward_model, PeftModel):
        raise AuditError(
            f"Reward model {name!r} has PEFT adapters, which cannot be read back without their base model; pass "
            "ShapedRewardModel the merged model, reward_model.merge_and_unload()."
        )
    if (directory / MANIFEST).exists():
        check_free(directory, "shaped_reward")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / MANIFEST).unlink(missing_ok=True)  # written last: where it is, all is of one saving
        if reward_model is not None:
            reward_model.save_pretrained(directory / _REWARD)
        shaper.flags.save(directory / _FLAGS)
        if shaper.scorer is not None and shaper.scorer.calibrated:
            shaper.scorer.save(directory / _CALIBRATION)
        write_shaping(directory, name, shaper.penalty)
    except (OSError, SafetensorError) as error:
        raise AuditError(
            f"The shaped reward cannot be written to {directory} ({error}); make room or choose another directory."
        ) from error


def write_shaping(directory: Path, name: str, penalty: Penalty) -> None:
    """The name of the reward, and the penalty with all that moves."""
    config = {"penalty": type(penalty).__name__, "settings": penalty.settings()}
    write_manifest(
        directory, "shaped_reward", {"reward": name, "config": config, "state": penalty.state_dict()}
    )


def load_shaped(
    directory: Path, scorer: FeatureScorer | None, reward: Any, model_arguments: Mapping[str, Any]
) -> tuple[nn.Module | Any, FlagSet, Penalty]:
    """Reward, flags and penalty; the scorer takes over the calibration that was saved.

    Raises:
        AuditError: incomplete, damaged, or of another format or dictionary.
    """
    name, penalty = read_shaping(directory)
    if reward is None:
        if not (directory / _REWARD).is_dir():
            raise AuditError(
                f"The reward saved in {directory} was the function {name!r}, which is not in the files; "
                "pass it as reward=."
            )
        try:
            reward = AutoModelForSequenceClassification.from_pretrained(
                directory / _REWARD, **model_arguments
            )
        except (
            OSError,
            ValueError,
            RuntimeError,
            KeyError,
            TypeError,
            AttributeError,
            SafetensorError,
        ) as error:
            raise AuditError(
                f"The reward model in {directory / _REWARD} cannot be loaded: {' '.join(str(error).split())}"
            ) from error
    if scorer is not None and (directory / _CALIBRATION).is_file():
        scorer.load(directory / _CALIBRATION)
    return reward, FlagSet.load(directory / _FLAGS), penalty


def read_shaping(directory: Path) -> tuple[str, Penalty]:
    """What `write_shaping` wrote: the name of the reward, and the penalty.

    Raises:
        AuditError: missing, damaged, or of another format.
    """
    content = read_manifest(directory, "shaped_reward")
    with reading(directory / MANIFEST):
        penalty = penalty_from_settings(content["config"]["penalty"], content["config"]["settings"])
        penalty.load_state_dict(content["state"])
        return str(content["reward"]), penalty
