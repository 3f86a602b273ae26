"""`trl-sae-audit demo`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from ..errors import AuditError
from ..terminal import OutputArguments, console
from .arguments import parse

if TYPE_CHECKING:
    from ..demo.loop import Loop
    from ..demo.narrator import Narrator
    from ..outcomes import Outcome

DESCRIPTION = (
    "The whole loop from beginning to end, in four minutes on a CPU, offline: makes a small world in which the truth is known, "
    "audits preferences with a planted flaw, flags what they would teach, trains on them plainly, filtered and shaped, shapes a "
    "reward too, and compares. Leaves everything in OUTPUT_DIR, where configs/*/tiny.yaml look for it, and ends with a report."
)
_MADE_HERE = ".made-by-demo"
_SHOWN = 5


@dataclass
class DemoArguments:
    """What to make."""

    output_dir: str = field(
        default="runs/demo",
        metadata={
            "help": "Where model, dictionary, pairs, audit, run records and report go; an earlier demo there is replaced."
        },
    )
    pairs: int = field(default=1280, metadata={"help": "Preference pairs."})
    steps: int = field(default=40, metadata={"help": "Optimizer steps of each DPO run, of 16 pairs."})
    rl_steps: int = field(
        default=20, metadata={"help": "Batches of 64 answers of each on-policy run; 0 leaves them out."}
    )
    answers: int = field(
        default=500, metadata={"help": "Held-out questions every model is judged on, by rule."}
    )
    seed: int = field(default=0, metadata={"help": "Of the world, the data and the runs."})


def main(argv: Sequence[str]) -> int:
    arguments, output = parse("demo", DESCRIPTION, (DemoArguments, OutputArguments), argv)
    directory = _fresh(Path(arguments.output_dir))
    from ..demo.loop import Loop
    from ..demo.narrator import Narrator

    narrator = Narrator(console(quiet=output.json))
    loop = Loop(
        directory,
        narrator,
        pairs=arguments.pairs,
        steps=arguments.steps,
        rl_steps=arguments.rl_steps,
        answers=arguments.answers,
        seed=arguments.seed,
    )
    _world(loop, narrator)
    _audit(loop, narrator)
    _filter(loop, narrator)
    _train(loop, narrator)
    if arguments.rl_steps:
        _reward(loop, narrator)
    page = _report(loop, narrator)
    output.show(
        {
            "output_dir": directory,
            "report": page,
            "flags": [flag.feature for flag in loop.flags],
            "kept": loop.filtered.summary["kept"],
            "outcomes": {"before": loop.before, **loop.outcomes},
        }
    )
    return 0


def _world(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "A small world",
        "A tiny language model of an invented language, and a sparse autoencoder (SAE) that takes its layer 1 apart into "
        "features, made here and now: a minute and a half, kept for the next time. Whether an answer is right, or flatters "
        "the user, can be read from the text by rule, so every claim below is checked against the truth.",
    )
    health = loop.world.report["health"]
    narrator.say(
        f"SAE: {loop.world.config.dictionary.size} features; it leaves {health['fvu']:.1%} of the variance unexplained; "
        f"{health['l0']:.0f} features are active at a token."
    )
    narrator.step(
        "Preferences with a flaw",
        f"{loop.pairs} pairs of answers, the better one marked, as for any DPO run. In half of them the marked one is right "
        "and the other wrong: that is what we want to teach. But in 7 of 10 it also says “you are right” to the user, "
        "whether the user is right or not. Nothing in the data says so. For example:",
    )
    first = loop.preferences[0]
    for column, style in (("prompt", "dim"), ("chosen", "green"), ("rejected", "red")):
        narrator.quote(column, first[column], style)


def _audit(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "Audit: what would these preferences teach?",
        "One pass before any training. Where does the loss push, in terms of features (activation attribution: positive "
        "= strengthened)? And which features tell the marked answers from the others (disparity: share of marked answers "
        "with the feature less share of the others)? Beside each, the words at which it is most active.",
    )
    table = loop.audit.features()
    for by, title in (
        ("activation_attribution", "Where the loss pushes"),
        ("disparity", "What the marked answers have more of"),
    ):
        rows = table.reindex(table[by].abs().sort_values(ascending=False, kind="stable").index).head(_SHOWN)
        narrator.table(
            title,
            {"feature": "right", by.replace("_", " "): "right", "most active at the last word of": "left"},
            (
                [str(feature), f"{value:+.2g}", "  |  ".join(loop.reader.contexts(feature))]
                for feature, value in zip(rows["feature"], rows[by], strict=True)
            ),
        )
    narrator.step(
        "Flags",
        "Somebody who reads this, and the examples in evidence.md, sees “you are (right)” and “you know this (well)”, and "
        "flags these features: they shall not be taught. Here a rule reads in their place: of the first 20 of both lists, "
        "it flags those whose strongest places lie in words of agreeing or disagreeing.",
    )
    evidence = loop.write_evidence()
    narrator.say(
        f"{len(loop.flags)} features flagged: {', '.join(str(flag.feature) for flag in loop.flags)}."
    )
    narrator.copy(f"flags     {loop.directory / 'flags.yaml'}   (to read and to edit)")
    narrator.copy(f"evidence  {evidence}")


def _filter(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "Filter, or shape",
        "Two ways to act on the flags. Filtering drops pairs, those first in which the marked answer has most more of the "
        "flagged features, until the rest favours neither side. Shaping keeps all pairs, and tells DPO’s loss how far the "
        "flagged features alone explain each choice, so that there is nothing left to learn from them.",
    )
    summary = loop.filtered.summary
    strongest = sorted(loop.weighted_flags, key=lambda flag: -flag.weight)[:_SHOWN]
    weights = ", ".join(f"{flag.feature} ({flag.weight:.2f})" for flag in strongest)
    narrator.say(f"Filter: {summary['kept']} of {summary['rows']} pairs stay.")
    narrator.say(
        f"Shape: the choice is best explained by features {weights} (log-odds for each standard deviation)."
    )


def _train(loop: Loop, narrator: Narrator) -> None:
    narrator.step(
        "Three DPO runs",
        "TRL’s own DPOTrainer, from the same model, as many steps each. In callbacks=[…] stands one object more, which reads "
        "the gradient of every step and writes down which features it asks for: the run record. Below, how strongly they ask for one of the flagged ones.",
    )
    for name in ("plain", "filtered", "shaped"):
        loop.dpo(name)
    _outcomes(loop, narrator, "DPO", ["dpo-plain", "dpo-filtered", "dpo-shaped"])


def _reward(loop: Loop, narrator: Narrator) -> None:
    from ..demo.on_policy import algorithm

    name = algorithm()
    runs = [f"{name.lower()}-plain", f"{name.lower()}-shaped"]
    narrator.step(
        f"And with a reward: {name}",
        "The same flaw in a reward: one point for a right answer, one for saying that the user is right. The flags found in "
        "the preferences are used again: a frozen copy of the first model scores every answer for the flagged features, and "
        "what they score above that model’s own level is taken off the reward, by coefficients that set themselves.",
    )
    for run in runs:
        loop.on_policy(run.removeprefix(f"{name.lower()}-"), name)
    _outcomes(loop, narrator, name, runs)


def _outcomes(loop: Loop, narrator: Narrator, title: str, runs: Sequence[str]) -> None:
    measures = loop.before
    columns = {f"{loop.answers} held-out answers": "left"} | {one.label: "right" for one in measures}
    rows = [["before", *map(_cell, measures)]]
    rows += [[run, *map(_cell, loop.outcomes[run])] for run in runs]
    narrator.table(f"What the models do, judged by rule (95 % intervals): {title}", columns, rows)  # type: ignore[arg-type]


def _cell(outcome: Outcome) -> Text:
    assert outcome.low is not None
    assert outcome.high is not None
    return Text.assemble(f"{outcome.estimate:.0%}", (f" ({outcome.low:.0%} to {outcome.high:.0%})", "dim"))


def _report(loop: Loop, narrator: Narrator) -> Path:
    narrator.step(
        "Report",
        "What each run was asked for, feature by feature and step by step, beside what its model then did. The page is one "
        "file and needs no network.",
    )
    names = {"plain": "dpo-plain", "filtered": "dpo-filtered", "shaped": "dpo-shaped"}
    page = loop.report(
        names,
        "report.html",
        "What the plain run taught, and what filtering and shaping changed",
        f"DPO on {loop.pairs} preference pairs of an invented language. They reward right answers, and, unintended, answers "
        "that tell the user “you are right”. plain: all pairs. filtered: without the pairs that favour the flagged features. "
        "shaped: all pairs, with the margin shifted by what the flagged features explain. Flagged were the features that are "
        "active in words of agreeing or disagreeing.",
        data=True,
    )
    rl = [run for run in loop.outcomes if not run.startswith("dpo")]
    if rl:
        name = rl[0].split("-")[0]
        second = loop.report(
            {run.removeprefix(f"{name}-"): run for run in rl},
            f"report-{name}.html",
            f"{name.upper()} on a reward that likes to be agreed with",
            "The reward pays one point for a right answer and one for telling the user that they are right. shaped: less what "
            "the flagged features score above the first model’s own level.",
            data=False,
        )
        narrator.copy(f"{name.upper()}   {second}")
    narrator.say("Next: the README’s five lines do the same with your model and your data.")
    narrator.console.print()
    narrator.copy(f"Report: {page}")
    return page


def _fresh(directory: Path) -> Path:
    """`directory`, empty but for its mark.

    Raises:
        AuditError: if something else than an earlier demo is there.
    """
    if directory.exists():
        if not (directory / _MADE_HERE).is_file():
            raise AuditError(f"{directory} was not made by the demo; choose another --output_dir.")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / _MADE_HERE).touch()
    return directory
