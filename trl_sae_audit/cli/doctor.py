"""`trl-sae-audit doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from ..console import table
from .options import DictionaryArguments, ModelArguments, OutputArguments, TextArguments
from .parser import option

if TYPE_CHECKING:
    from ..saes.doctor import Diagnosis

DESCRIPTION = (
    "Does this dictionary fit this model? Looks at the hook point, the width, the model it was made for, and at FVU, L0 "
    "and dead features on given texts, and says which of TRL's trainers will work. Exit code 0: it fits; 1: it does not."
)
EXAMPLE = """\
trl-sae-audit doctor --model ./model --dataset pairs.jsonl --dictionary ./sae"""
_COLOURS = {"good": "green", "doubtful": "yellow", "bad": "red"}


@dataclass
class DoctorArguments:
    """How it is examined."""

    max_tokens: int = option("Use at most about that many tokens of the texts.", 20_000)
    context_size: int = option("Tokens of a window; longer texts are cut into several.", 256)
    batch_size: int = option("Windows in one forward pass of the model.", 16)
    skip_special_tokens: bool = option(
        "Leave BOS, EOS and other special tokens out.",
        True,
        negative="Keep BOS, EOS and other special tokens.",
    )
    skip_first_position: bool = option(
        "Leave out the first token of every window.", True, negative="Keep the first token of every window."
    )


OPTIONS = (ModelArguments, TextArguments, DictionaryArguments, DoctorArguments, OutputArguments)


def run(
    model_arguments: ModelArguments,
    texts: TextArguments,
    dictionary_arguments: DictionaryArguments,
    arguments: DoctorArguments,
    output: OutputArguments,
) -> int:
    from ..models.residual_stream import TokenRules
    from ..saes.doctor import diagnose

    dictionary, model, tokenizer = dictionary_arguments.load_with(model_arguments)
    diagnosis = diagnose(
        model,
        tokenizer,
        texts.read(tokenizer),
        dictionary,
        rules=TokenRules(
            arguments.context_size, arguments.skip_special_tokens, arguments.skip_first_position
        ),
        batch_size=arguments.batch_size,
        max_tokens=arguments.max_tokens,
    )
    show(diagnosis, output)
    return 0 if diagnosis.fits else 1


def show(diagnosis: Diagnosis, output: OutputArguments) -> None:
    """Print the findings, the trainers and the verdict."""
    findings = [
        (check.name, check.found, Text(check.state, _COLOURS[check.state]), check.remark)
        for check in diagnosis.checks
    ]
    trainers = [
        (trainer.name, Text("yes", "green") if trainer.works else Text("no", "red"), trainer.remark)
        for trainer in diagnosis.trainers
    ]
    output.show(
        diagnosis.to_dict(),
        table(
            f"Dictionary {diagnosis.dictionary}",
            dict.fromkeys(("check", "found", "state", "remark"), "left"),
            findings,
        ),
        table(
            f"Trainers in TRL {diagnosis.trl_version}",
            dict.fromkeys(("trainer", "works", "remark"), "left"),
            trainers,
        ),
        Text(diagnosis.verdict, "bold" if diagnosis.fits else "bold red"),
    )
