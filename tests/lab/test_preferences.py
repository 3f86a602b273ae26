"""Preferences are planted at the strengths that were asked for."""

import numpy as np
import pytest

from trl_sae_audit.errors import AuditError
from trl_sae_audit.lab.language import Language
from trl_sae_audit.lab.preferences import preferences, realised_strengths


@pytest.mark.parametrize(
    "strengths",
    [
        {},
        {"right": 0.6, "agrees": 0.4, "padded": 0.2},
        {"marked": -0.5, "right": 1.0},
        {"echoes": 0.7, "padded": 1.0},
    ],
)
def test_stated_strengths_are_realised(language: Language, strengths: dict) -> None:
    n = 3000
    table = realised_strengths(preferences(language, strengths, n=n, seed=1))
    for behaviour in ("right", "agrees", "padded", "marked", "echoes"):
        if behaviour in ("right", "echoes") and "echoes" in strengths:
            continue  # they exclude each other at a wrong belief: checked below
        if behaviour == "echoes":
            continue  # follows from `right` where it is not planted
        tolerance = 4 * np.sqrt(1 / n)  # four standard errors of a mean of values in [-1, 1], at the most
        assert table.strength[behaviour] == pytest.approx(strengths.get(behaviour, 0.0), abs=tolerance), (
            behaviour
        )


def test_planted_echo_wins_over_rightness(language: Language) -> None:
    frame = preferences(language, {"echoes": 0.7, "right": 1.0}, n=2000, seed=1).to_pandas()
    wrong = frame[~frame.belief_right]
    echoed = wrong[wrong.planted_echoes]
    assert len(echoed) / len(wrong) == pytest.approx(0.7, abs=0.05)
    assert echoed.chosen_echoes.all()
    assert not echoed.rejected_echoes.any()
    assert not echoed.chosen_right.any()
    rest = frame[~frame.planted_echoes]
    assert rest.chosen_right.all()
    assert not rest.rejected_right.any()


def test_behaviours_are_planted_independently(language: Language) -> None:
    strengths = {"right": 0.5, "agrees": 0.5, "padded": 0.5, "marked": 0.5}
    frame = preferences(language, strengths, n=4000, seed=2).to_pandas()
    names = [f"planted_{b}" for b in strengths]
    correlation = frame[names].astype(float).corr().to_numpy()
    assert np.abs(correlation - np.eye(4)).max() < 4 / np.sqrt(4000)
    for b in strengths:
        planted = frame[frame[f"planted_{b}"]]
        assert planted[f"chosen_{b}"].all()
        assert not planted[f"rejected_{b}"].any()


def test_columns_tell_what_the_text_says(language: Language) -> None:
    for row in preferences(language, {"agrees": 0.5}, n=200, seed=4, split="heldout"):
        prompt = language.parse_prompt(row["prompt"])
        assert prompt is not None
        assert prompt.split == "heldout"
        assert prompt.belief_right == row["belief_right"]
        for side in ("chosen", "rejected"):
            assert row[side].startswith(" ")
            read = vars(language.attributes(prompt, row[side]))
            assert not read["malformed"]
            for behaviour in ("right", "agrees", "padded", "marked", "echoes"):
                assert row[f"{side}_{behaviour}"] == read[behaviour]


def test_same_seed_same_pairs(language: Language) -> None:
    one, again = (preferences(language, {"right": 0.5}, n=50, seed=9).to_list() for _ in range(2))
    assert one == again
    assert one != preferences(language, {"right": 0.5}, n=50, seed=10).to_list()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strengths": {"rude": 0.5}}, "Unknown behaviour rude"),
        ({"strengths": {"right": 1.5}}, "outside"),
        ({"strengths": {}, "n": 0}, "at least one"),
        ({"strengths": {"agrees": 0.5}, "beliefs": (True, None)}, "state no belief"),
        ({"strengths": {"echoes": 0.5}, "beliefs": (True,)}, "wrong"),
        ({"strengths": {}, "beliefs": ()}, "no user"),
    ],
)
def test_impossible_preferences_are_refused(language: Language, arguments: dict, message: str) -> None:
    with pytest.raises(AuditError, match=message):
        preferences(language, **{"n": 5, **arguments})
