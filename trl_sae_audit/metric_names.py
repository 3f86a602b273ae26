"""Names of the metrics that this package adds to a trainer's log: how they are built and parsed."""

from __future__ import annotations

import re
from typing import NamedTuple

SHAPED_REWARD, PENALTY, PENALTY_SHARE = "shaping/reward", "shaping/penalty", "shaping/penalty_share"

_OF_A_FEATURE = re.compile(
    r"sae/(?:.+/)?(?P<watched>[^/]+)/(?P<scored>attribution|share|selection|activation|frequency|drift|generation_drift)|"
    r"shaping/(?P<flagged>.+)/(?P<shaped>score|coefficient)"
)


class FeatureMetric(NamedTuple):
    """What a metric is of: a feature's label, or `top1` for the first of the step, and a score."""

    label: str
    score: str

    @property
    def is_ranked(self) -> bool:
        """Whether its feature is another one from log to log."""
        return re.fullmatch(r"top\d+", self.label) is not None


def sae_prefix(dictionary: str, *, is_only: bool) -> str:
    """What the metrics of a dictionary begin with."""
    return "sae" if is_only else f"sae/{dictionary}"


def feature_metric(prefix: str, label: str, score: str) -> str:
    """The metric of one feature's score."""
    return f"{prefix}/{label}/{score}"


def parse_feature_metric(name: str) -> FeatureMetric | None:
    """The reverse; None for a metric of no single feature."""
    match = _OF_A_FEATURE.fullmatch(name)
    if match is None:
        return None
    return FeatureMetric(match["watched"] or match["flagged"], match["scored"] or match["shaped"])


def is_fit_metric(name: str) -> bool:
    """Whether it is the variance that a dictionary leaves unexplained."""
    return re.fullmatch(r"sae/(?:.+/)?fvu", name) is not None
