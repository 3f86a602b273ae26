"""A metric's name is told apart by what made it."""

from __future__ import annotations

import pytest

from trl_sae_audit.metric_names import feature_metric, is_fit_metric, parse_feature_metric, sae_prefix


@pytest.mark.parametrize("is_only", [True, False])
@pytest.mark.parametrize("score", ["attribution", "share", "drift", "generation_drift"])
def test_a_watched_feature(is_only: bool, score: str) -> None:
    prefix = sae_prefix("release/layer 9", is_only=is_only)
    metric = parse_feature_metric(feature_metric(prefix, "agrees", score))
    assert metric == ("agrees", score)
    assert not metric.is_ranked
    assert parse_feature_metric(feature_metric(prefix, "top12", score)).is_ranked


@pytest.mark.parametrize("score", ["score", "coefficient"])
def test_a_flagged_feature(score: str) -> None:
    assert parse_feature_metric(feature_metric("shaping", "says / yes", score)) == ("says / yes", score)


@pytest.mark.parametrize(
    "name",
    [
        "loss",
        "sae/grad_norm",
        "sae/one/chosen",
        "shaping/penalty",
        "shaping/penalty_share",
        "eval_sae/one/drift",
    ],
)
def test_of_no_single_feature(name: str) -> None:
    assert parse_feature_metric(name) is None


def test_the_fit() -> None:
    assert all(is_fit_metric(f"{sae_prefix('layer 9', is_only=only)}/fvu") for only in (True, False))
    assert not is_fit_metric("sae/token_fvu")
