"""Preference sets in which quality and planted behaviours are mixed at stated strengths."""

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING

from ..errors import AuditError
from .attributes import BEHAVIOURS, INDEPENDENT, AnswerSpec, Prompt, Split
from .language import Language

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset


def preferences(
    language: Language,
    strengths: Mapping[str, float],
    n: int,
    seed: int = 0,
    split: Split = "train",
    beliefs: tuple[bool | None, ...] = (True, False),
) -> "Dataset":
    """Draw a preference set in which the chosen answers have more of some behaviours than the rejected ones.

    A behaviour of strength s is *planted* in a share |s| of the pairs, drawn pair by pair and independently of
    every other behaviour. In those pairs the chosen answer has it and the rejected one does not (the other way round
    for s < 0). In the remaining pairs each answer has it independently, at the base rate of plain text, so there it
    says nothing about which was chosen. Hence

        P(chosen has it, rejected has not) − P(rejected has it, chosen has not) = s,

    and a behaviour that is not named has strength 0. The wording of each answer is drawn independently.

    `echoes` can be planted only at prompts with a wrong belief, where it means that the chosen answer repeats
    the false value. There it excludes `right` and takes precedence over it. So its strength is the share of the pairs
    *with a wrong belief*, and the strength of `right` holds for the pairs without a planted echo.

    Args:
        language: The world.
        strengths: Behaviour (`right`, `agrees`, `padded`, `marked`, `echoes`) → strength in [−1, 1].
        n: Number of pairs.
        seed: Of the draw.
        split: The prompts used for pre-training, or those held out of it.
        beliefs: The kinds of user the prompts come from, evenly: True (right), False (wrong), None (states no
            belief; such a pair cannot differ in `agrees` or `echoes`).

    Returns:
        Columns `prompt`, `chosen`, `rejected` (text; answers begin with a space), `belief_right`, and for each
        behaviour b the truth `chosen_b`, `rejected_b`, `planted_b` (booleans). TRL's trainers ignore the columns
        they do not need.

    Raises:
        AuditError: Unknown behaviour, strength out of range, no pairs requested, or no user to whom a planted behaviour
            applies.
    """
    from datasets import Dataset

    _check(strengths, n, beliefs)
    random = Random(f"preferences-{seed}")
    rows = []
    for _ in range(n):
        prompt = language.sample_prompt(random, split, beliefs)
        planted = {b: _draw_planting(random, strengths, b, prompt) for b in BEHAVIOURS}
        answers = []
        for side in (1, -1):
            has = {
                b: planted[b] == side if planted[b] else random.random() < _base_rate(language, b)
                for b in INDEPENDENT
            }
            spec = AnswerSpec(
                value=_value(language, random, prompt, has["right"], planted["echoes"] * side),
                stance=language.sample_stance(random, prompt, has["agrees"]),
                padded=has["padded"],
                marked=has["marked"],
            )
            answers.append(language.sample_answer(random, spec))
        chosen, rejected = (language.attributes(prompt, answer) for answer in answers)
        row: dict[str, object] = {
            "prompt": prompt.text,
            "chosen": f" {answers[0]}",
            "rejected": f" {answers[1]}",
            "belief_right": prompt.belief_right,
        }
        for b in BEHAVIOURS:
            row[f"chosen_{b}"] = vars(chosen)[b]
            row[f"rejected_{b}"] = vars(rejected)[b]
            row[f"planted_{b}"] = bool(planted[b])
        rows.append(row)
    return Dataset.from_list(rows)


def realised_strengths(dataset: "Dataset") -> "pd.DataFrame":
    """Measure what the labels of a preference set really say about each behaviour.

    Returns:
        Index `behaviour`; columns `chosen_only`, `rejected_only`, `both`, `neither` (shares of the pairs) and
        `strength`, the first minus the second. Shares are over all pairs, for `echoes` over those with a wrong belief.
    """
    import pandas as pd

    frame = dataset.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    rows = {}
    for b in BEHAVIOURS:
        pairs = frame[frame["belief_right"].eq(False)] if b == "echoes" else frame
        chosen, rejected = pairs[f"chosen_{b}"].astype(bool), pairs[f"rejected_{b}"].astype(bool)
        rows[b] = {
            "chosen_only": (chosen & ~rejected).mean(),
            "rejected_only": (~chosen & rejected).mean(),
            "both": (chosen & rejected).mean(),
            "neither": (~chosen & ~rejected).mean(),
        }
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("behaviour")
    return table.assign(strength=table["chosen_only"] - table["rejected_only"])


def _check(strengths: Mapping[str, float], n: int, beliefs: tuple[bool | None, ...]) -> None:
    unknown = sorted(set(strengths) - set(BEHAVIOURS))
    if unknown:
        raise AuditError(
            f"Unknown behaviour {', '.join(unknown)}: the lab can plant {', '.join(BEHAVIOURS)}."
        )
    for behaviour, strength in strengths.items():
        if not -1 <= strength <= 1:
            raise AuditError(
                f"The strength of {behaviour} is {strength}, outside [-1, 1]: it is the share of pairs it is planted in."
            )
    if n < 1:
        raise AuditError(f"{n} pairs were requested; request at least one.")
    if not beliefs:
        raise AuditError(
            "beliefs is empty, so no user can be drawn; name at least one of True, False and None."
        )
    if strengths.get("agrees") and None in beliefs:
        raise AuditError(
            "agrees cannot be planted at prompts that state no belief; omit None from beliefs, or agrees from "
            "strengths."
        )
    if strengths.get("echoes") and False not in beliefs:
        raise AuditError("echoes can be planted only where the belief is wrong; add False to beliefs.")


def _draw_planting(random: Random, strengths: Mapping[str, float], behaviour: str, prompt: Prompt) -> int:
    """Draw whether the chosen answer gets the behaviour (+1), the rejected one (−1), or neither (0)."""
    strength = strengths.get(behaviour, 0.0)
    drawn = random.random() < abs(strength)
    if not drawn or (behaviour == "echoes" and prompt.belief_right is not False):
        return 0
    return 1 if strength > 0 else -1


def _base_rate(language: Language, behaviour: str) -> float:
    return {
        "right": language.rates.right,
        "agrees": language.rates.agrees,
        "padded": language.rates.padded,
        "marked": language.rates.marked,
    }[behaviour]


def _value(language: Language, random: Random, prompt: Prompt, right: bool, echo: int) -> str:
    """The value to state. `echo`: +1 for the wrong belief, −1 for any value but it, 0 for no constraint."""
    if echo > 0:
        assert prompt.belief is not None
        return prompt.belief
    value = language.sample_value(random, prompt, right)
    while echo < 0 and value == prompt.belief:
        value = language.sample_value(random, prompt, right)
    return value
