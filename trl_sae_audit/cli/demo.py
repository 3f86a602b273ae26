"""`trl-sae-audit demo`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from ..console import console
from ..errors import AuditError
from .options import OutputArguments
from .parser import option

DESCRIPTION = (
    "The whole loop, offline, in five minutes on a CPU. It makes a small world in which the truth is known, trains with DPO on "
    "preferences with a planted flaw and shows what goes wrong, foretells it with an audit, flags the features that should not be "
    "taught, trains again on filtered and on shaped preferences, does the same with a reward, and says at the end what was "
    "foretold and what was prevented. Everything stays in DIR, where configs/*/tiny.yaml look for it."
)
EXAMPLE = "trl-sae-audit demo"
_DEMO_MARKER = ".made-by-demo"


@dataclass
class DemoArguments:
    """What to make."""

    output_dir: str = option(
        "Directory for the model, dictionary, pairs, audit, run records and report. An earlier demo there is replaced.",
        "runs/demo",
        main=True,
    )
    pairs: int = option("Preference pairs.", 1280)
    steps: int = option("Optimizer steps of each DPO run, with 16 pairs a step.", 40)
    rl_steps: int = option("Steps of each on-policy run, with 64 answers a step; 0 skips these runs.", 20)
    answers: int = option("Held-out questions on which every model is judged by rule.", 500)
    seed: int = option("Seed of the world, the data and the runs.", 0)


OPTIONS = (DemoArguments, OutputArguments)


def run(arguments: DemoArguments, output: OutputArguments) -> int:
    directory = _empty_directory(Path(arguments.output_dir))
    from ..lab.demo.loop import Loop
    from ..lab.demo.narrator import Narrator
    from ..lab.demo.story import tell

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
    page, verdict = tell(loop, narrator)
    output.show(
        {
            "output_dir": directory,
            "report": page,
            "flags": [flag.feature for flag in loop.flags],
            "kept": loop.filter_result.summary["kept"],
            "outcomes": {"before": loop.before, **loop.outcomes},
            "verdict": verdict,
        }
    )
    return 0


def _empty_directory(directory: Path) -> Path:
    """Empty `directory`, except for the file that marks it as a demo's.

    Raises:
        AuditError: if it holds anything but an earlier demo.
    """
    if directory.exists():
        if not (directory / _DEMO_MARKER).is_file():
            raise AuditError(f"{directory} was not made by the demo; choose another --output_dir.")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / _DEMO_MARKER).touch()
    return directory
