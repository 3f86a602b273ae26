"""From rewards to advantages, as GRPO computes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import AuditError

EPSILON = 1e-4
"""What TRL adds to a standard deviation before it divides by it."""


@dataclass(frozen=True)
class AdvantageRule:
    """How rewards become advantages; the fields and their defaults are those of TRL's GRPOConfig.

    Raises:
        AuditError: an unknown word.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the reward less its group's mean is divided by: the group's standard deviation, that of all answers, or nothing."""
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    """Whether several rewards are added up first, or each put in units of its own spread first."""

    def __post_init__(self) -> None:
        known = {
            "scale_rewards": ("group", "batch", "none"),
            "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
        }
        for name, words in known.items():
            if getattr(self, name) not in words:
                raise AuditError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(words)}.")


def advantages(values: Tensor, weights: Tensor, groups: Tensor, rule: AdvantageRule) -> Tensor:
    """The advantage of each answer, float64 [n]; 0 of one that no reward judged.

    `A_i = (r_i − mean of its group) / (standard deviation + 1e-4)`, both over the judged answers. Where no group has two answers,
    all answers are one group.

    Args:
        values: rewards [n, rewards], NaN where one does not judge.
        weights: of the rewards [rewards].
        groups: number of each answer's prompt [n].
        rule: how.
    """
    values, weights = values.double(), weights.double()
    if len(groups) == len(groups.unique()):
        groups = torch.zeros_like(groups)
    everything = torch.zeros_like(groups)
    unjudged = values.isnan().all(1)

    def total(of: Tensor) -> Tensor:
        return (of * weights).nansum(1).masked_fill(unjudged, torch.nan)

    if rule.multi_objective_aggregation == "normalize_then_sum":
        columns = [_normalized(column, groups, groups) for column in values.T]
        found = _normalized(total(torch.stack(columns, 1)), everything, everything)
    else:
        rewards = total(values)
        spread = {"group": groups, "batch": everything, "none": None}[rule.scale_rewards]
        found = _normalized(rewards, groups, spread)
    return found.nan_to_num(0.0)


def _normalized(values: Tensor, groups: Tensor, spread: Tensor | None) -> Tensor:
    """Values less the mean of their group, over the standard deviation of their group of `spread`."""
    centred = values - _over_groups(values, groups, torch.nanmean)
    return centred if spread is None else centred / (_over_groups(values, spread, _deviation) + EPSILON)


def _over_groups(values: Tensor, groups: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """A figure of each value's group [n]."""
    found = torch.empty_like(values)
    order = groups.argsort(stable=True)
    for places in order.split(groups.unique(return_counts=True)[1].tolist()):
        found[places] = of(values[places])
    return found


def _deviation(values: Tensor) -> Tensor:
    """The standard deviation with Bessel's correction over what is not NaN; NaN of fewer than two."""
    known = values[~values.isnan()]
    return known.std() if len(known) > 1 else known.new_tensor(torch.nan)
