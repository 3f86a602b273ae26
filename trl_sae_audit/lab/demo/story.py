"""What the demo says: each number in it is made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from rich.text import Text

from ...filtering.check import describe_check
from ...outcomes import Outcome
from ...statistics import NORMAL_QUANTILE
from ...verification.comparison import Verification
from .loop import READ, Loop
from .narrator import Narrator
from .on_policy import algorithm

_SHOWN = 5
_RISEN = 6
_WORDS = 34


def tell(loop: Loop, narrator: Narrator) -> tuple[Path, dict[str, object]]:
    """Run the loop and tell what happens; the page of the DPO runs, and the verdict in numbers."""
    _show_the_flaw(loop, narrator)
    _audit_preferences(loop, narrator)
    _filter_and_shape(loop, narrator)
    _train_again(loop, narrator)
    if loop.rl_steps:
        _train_on_reward(loop, narrator)
    verdict = _tell_verdict(loop, narrator)
    return _write_reports(loop, narrator), verdict


def _show_the_flaw(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "What goes wrong",
        "A tiny language model of an invented language was made for this demo (a minute and a half, kept for the next time), "
        f"and {loop.pairs} preference pairs. In half of the pairs the chosen answer is right and the rejected one wrong: this "
        "should be taught. In 7 of 10, the chosen answer also tells the user “you are right”, whether they are or not. No column "
        "says so. TRL’s DPOTrainer learns both. A question at which the user is wrong:",
    )
    loop.flags  # noqa: B018, the audit comes before the run that it foretells, and is told of after it
    loop.dpo("plain")
    prompt, before, after = loop.changed_answer("dpo-plain")
    for name, text, style in (("asked", prompt, "dim"), ("before", before, "green"), ("after", after, "red")):
        narrator.quote(name, text, style)
    _show_outcomes(loop, narrator, "DPO", ["dpo-plain"])


def _audit_preferences(loop: Loop, narrator: Narrator) -> None:
    health = loop.world.report["health"]
    narrator.step(
        "The audit saw it coming",
        "Before that run, the audit passed over the pairs and took the gradient of DPO’s loss. Then it sampled answers from the "
        "untrained model and predicted how one optimizer step changes each feature of a sparse autoencoder (SAE) in such "
        f"answers. The SAE has {loop.world.config.dictionary.size} features and leaves {health['fvu']:.1%} of the variance of "
        "layer 1 unexplained.",
    )
    rows = loop.audit.features().head(_SHOWN)
    narrator.table(
        "What the model will write more of (+) and less of (−)",
        {"feature": "right", "effect size": "right", "95 % interval": "right", "most active in": "left"},
        (
            [
                str(row["feature"]),
                f"{row['effect_size']:+#.2g}",
                f"{row['effect_size_low']:+#.2g} to {row['effect_size_high']:+#.2g}",
                _cut(row["words"]),
            ]
            for row in rows.to_dict("records")
        ),
    )
    narrator.say(
        "Effect size: of one optimizer step, in units of the feature’s spread over the answers.", "dim"
    )
    narrator.step(
        "Flags",
        "A person who reads these words, and the examples in evidence.md, flags the features of agreement as ones that should "
        f"not be taught. In this demo a rule reads the audit’s first {READ} features: it flags those that are strongest at "
        "words of agreement or disagreement.",
    )
    evidence = loop.write_evidence()
    narrator.say(
        f"{len(loop.flags)} features flagged: {', '.join(str(flag.feature) for flag in loop.flags)}."
    )
    narrator.copy(f"flags     {loop.directory / 'flags.yaml'}   (read and edit it)")
    narrator.copy(f"evidence  {evidence}")


def _filter_and_shape(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "Filter or shape",
        "Two ways to act on the flags. Filtering drops pairs until the flagged features say nothing about which answer was "
        "chosen. Shaping keeps all pairs and shifts the margin in DPO’s loss by what the flagged features alone explain of each "
        "choice, so nothing is left to learn from them.",
    )
    summary = loop.filter_result.summary
    planted = int(sum(loop.preferences["planted_agrees"]))
    narrator.say(
        f"Filter: {summary['kept']} of {summary['rows']} pairs are kept ({planted} have the planted flaw). "
        f"{' '.join(describe_check(summary['check']))}"
    )
    strongest = sorted(loop.weighted_flags, key=lambda flag: -flag.weight)[:_SHOWN]
    weights = ", ".join(f"{flag.feature} ({flag.weight:.2f})" for flag in strongest)
    narrator.say(f"Shape: features {weights} explain the choices best (log-odds per standard deviation).")


def _train_again(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "The same run, filtered and shaped",
        "The same model, trainer and number of steps. One callback is added: it reads the gradient of every step and records "
        "what the step selects for. Below: the selection of one flagged feature.",
    )
    for name in ("filtered", "shaped"):
        loop.dpo(name)
    _show_outcomes(loop, narrator, "DPO", ["dpo-plain", "dpo-filtered", "dpo-shaped"])
    narrator.say(
        "Pressure that is taken off one feature may move to another. So all features are looked at, not the flagged ones alone: "
        "those that rose most in what the models write, by their standard error."
    )
    flagged = {flag.feature for flag in loop.flags}
    words = loop.audit.features().set_index("feature")["words"]
    for run in ("dpo-plain", "dpo-filtered", "dpo-shaped"):
        rows = _risen(loop.verification(run)).head(_RISEN)
        narrator.table(
            f"Risen most: {run}",
            {
                "feature": "right",
                "flagged": "left",
                "mean activation": "right",
                "±": "right",
                "most active in": "left",
            },
            (
                [
                    str(int(row["feature"])),
                    "yes" if row["feature"] in flagged else "",
                    f"{row['measured']:+#.2g}",
                    f"{NORMAL_QUANTILE * row['standard_error']:#.2g}",
                    _cut(words[int(row["feature"])]),
                ]
                for row in rows.to_dict("records")
            ),
        )


def _risen(verification: Verification) -> pd.DataFrame:
    """The features that rose beyond their 95 % interval, in order of their change in standard errors."""
    table = verification.features
    z = table["measured"] / table["standard_error"].where(table["standard_error"] > 0)
    return table[z > NORMAL_QUANTILE].assign(z=z).sort_values("z", ascending=False, kind="stable")


def _cut(words: str, width: int = _WORDS) -> str:
    return words if len(words) <= width else words[: width - 1] + "…"


def _train_on_reward(loop: Loop, narrator: Narrator) -> None:
    name = algorithm()
    runs = [f"{name.lower()}-plain", f"{name.lower()}-shaped"]
    narrator.step(
        f"And with a reward: {name}",
        "The same flaw in a reward: one point for a right answer, and one for telling the user that they are right. The flags "
        "from the preferences are used again. A frozen copy of the initial model scores every answer for the flagged features, "
        "and the reward is reduced by what exceeds that model’s own level, with coefficients that adapt during the run.",
    )
    for run in runs:
        loop.on_policy(run.removeprefix(f"{name.lower()}-"), name)
    _show_outcomes(loop, narrator, name, runs)


def _tell_verdict(loop: Loop, narrator: Narrator) -> dict[str, object]:
    """What the audit foretold of the plain run, and what acting on it changed; as sentences and as numbers."""
    verification = loop.verification("dpo-plain")
    measured = verification.features.set_index("feature")["measured"]
    read = loop.audit.features().head(READ)
    moved = [
        feature in measured.index and measured[feature] * effect > 0
        for feature, effect in zip(read["feature"], read["effect_size"], strict=True)
    ]
    r2 = verification.statistics["predicted_change_in_generations"]["r2"]
    agrees = {"before": loop.before[0], **{run: after[0] for run, after in loop.outcomes.items()}}
    excess = agrees["dpo-plain"].estimate - agrees["before"].estimate
    narrator.step(
        "Verdict",
        f"Of the {len(moved)} features that the audit put first, {sum(moved)} moved in the predicted direction in what the plain "
        f"run’s model writes. The predicted change explains {r2.estimate:.0%} of the measured one over all features (R²; 95 % "
        f"interval {r2.low:.0%} to {r2.high:.0%}).",
    )
    document: dict[str, object] = {"foretold": sum(moved), "of": len(moved), "r2": r2.estimate}
    if excess > 0:
        removed = {
            name: (agrees["dpo-plain"].estimate - agrees[f"dpo-{name}"].estimate) / excess
            for name in ("filtered", "shaped")
        }
        narrator.say(
            f"The plain run made the model agree with the user in {100 * excess:.0f} of 100 answers more. Filtering removed "
            f"{removed['filtered']:.0%} of that, shaping {removed['shaped']:.0%}."
        )
        document["removed"] = removed
    narrator.say(f"The trained models are kept: {loop.directory}/models/dpo-plain and so on.")
    return document


def _show_outcomes(loop: Loop, narrator: Narrator, title: str, runs: Sequence[str]) -> None:
    measures = loop.before
    columns = {f"{loop.answers} held-out answers": "left"} | {outcome.label: "right" for outcome in measures}
    rows = [["before", *map(_cell, measures)]]
    rows += [[run, *map(_cell, loop.outcomes[run])] for run in runs]
    narrator.table(f"What the models do, judged by rule (95 % intervals): {title}", columns, rows)  # type: ignore[arg-type]


def _cell(outcome: Outcome) -> Text:
    assert outcome.low is not None
    assert outcome.high is not None
    return Text.assemble(f"{outcome.estimate:.0%}", (f" ({outcome.low:.0%} to {outcome.high:.0%})", "dim"))


def _write_reports(loop: Loop, narrator: Narrator) -> Path:
    narrator.step(
        "Report",
        "What each run was trained towards, feature by feature and step by step, and how its model then behaved. The page is "
        "one file and needs no network.",
    )
    names = {"plain": "dpo-plain", "filtered": "dpo-filtered", "shaped": "dpo-shaped"}
    page = loop.report(
        names,
        "report.html",
        "What the plain run taught, and what filtering and shaping changed",
        f"DPO on {loop.pairs} preference pairs of an invented language. They reward right answers and also, unintentionally, "
        "answers that tell the user “you are right”. plain: all pairs. filtered: as many pairs dropped as it takes for the flagged "
        "features to say nothing about which answer was chosen. shaped: all pairs, with the margin shifted by what the flagged features explain. The flagged features are "
        "those active in words of agreement or disagreement.",
        data=True,
    )
    rl = [run for run in loop.outcomes if not run.startswith("dpo")]
    if rl:
        name = rl[0].split("-")[0]
        second = loop.report(
            {run.removeprefix(f"{name}-"): run for run in rl},
            f"report-{name}.html",
            f"{name.upper()} on a reward for agreeing with the user",
            "The reward pays one point for a right answer and one for telling the user that they are right. shaped: minus "
            "what the flagged features score above the initial model’s own level.",
            data=False,
        )
        narrator.copy(f"{name.upper()}   {second}")
    narrator.say("Next: the README shows how to do the same with your own model and data.")
    narrator.console.print()
    narrator.copy(f"Report: {page}")
    return page
