"""`trl-sae-audit doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.text import Text

from ..doctor import Diagnosis, diagnose
from ..residual_stream import TokenRules
from ..sae import load_dictionary
from ..terminal import OutputArguments, table
from .arguments import ModelArguments, TextArguments, load_model, parse

DESCRIPTION = (
    "Does this dictionary fit this model? Looks at the hook point, the width, the model it was made for, and at FVU, L0 "
    "and dead features on given texts, and says which of TRL's trainers will work. Exit code 0: it fits; 1: it does not. With "
    "--plan: what attribution would cost a run, without loading a model (doctor --plan --help). "
    "Example: trl-sae-audit doctor --model_name_or_path ./model --texts pairs.jsonl --sae ./sae"
)
_COLOURS = {"good": "green", "doubtful": "yellow", "bad": "red"}


@dataclass
class DoctorArguments:
    """What to examine."""

    sae: str = field(
        metadata={"help": "A directory saved by sae-lens, or a sae-lens release (with --sae_id)."}
    )
    sae_id: str | None = field(default=None, metadata={"help": "Which SAE of the release."})
    hook_point: str | None = field(
        default=None, metadata={"help": "Read here instead of where the SAE says it hooks."}
    )
    max_tokens: int = field(
        default=20_000, metadata={"help": "Use at most about that many tokens of the texts."}
    )
    context_size: int = field(
        default=256, metadata={"help": "Tokens of a window; longer texts are cut into several."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass of the model."})
    skip_special_tokens: bool = field(
        default=True, metadata={"help": "Leave BOS, EOS and other special tokens out."}
    )
    skip_first_position: bool = field(
        default=True, metadata={"help": "Leave out the first token of every window."}
    )

    @property
    def token_rules(self) -> TokenRules:
        return TokenRules(self.context_size, self.skip_special_tokens, self.skip_first_position)


def main(argv: Sequence[str]) -> int:
    if "--plan" in argv:
        from . import plan

        return plan.main([argument for argument in argv if argument != "--plan"])
    model_arguments, text_arguments, arguments, output = parse(
        "doctor", DESCRIPTION, (ModelArguments, TextArguments, DoctorArguments, OutputArguments), argv
    )
    dictionary = load_dictionary(arguments.sae, arguments.sae_id, hook_point=arguments.hook_point)
    model, tokenizer = load_model(model_arguments)
    diagnosis = diagnose(
        model,
        tokenizer,
        text_arguments.read(tokenizer),
        dictionary,
        rules=arguments.token_rules,
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
