"""`trl-sae-audit flag`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..audit_result import Audit
from ..flags import Flag, append_flag
from ..terminal import OutputArguments, to_copy
from .arguments import parse
from .preferences import first_as_option

DESCRIPTION = (
    "Mark a feature of an audit as one that should not be taught, in a file that people read and edit. "
    "Example: trl-sae-audit flag runs/audit --feature 1423 --label sycophancy --reason 'agrees with wrong beliefs'"
)


@dataclass
class FlagArguments:
    """The flag."""

    audit: str = field(metadata={"help": "Directory of the audit; may stand first, without --audit."})
    feature: int = field(metadata={"help": "Index of the feature."})
    label: str = field(default="", metadata={"help": "What to call it."})
    reason: str = field(default="", metadata={"help": "Why it is flagged."})
    weight: float = field(default=1.0, metadata={"help": "How much it counts beside the other flags."})
    direction: Literal["up", "down", "both"] = field(
        default="up",
        metadata={"help": "up: training should not strengthen the feature; down: not weaken it; both."},
    )
    flags: str = field(default="flags.yaml", metadata={"help": "The file; begun if it does not exist."})


def main(argv: Sequence[str]) -> int:
    arguments, output = parse(
        "flag", DESCRIPTION, (FlagArguments, OutputArguments), first_as_option(argv, "audit")
    )
    audit = Audit.load(arguments.audit)
    flag = Flag(
        dictionary=audit.dictionary.name,
        feature=arguments.feature,
        label=arguments.label,
        reason=arguments.reason,
        weight=arguments.weight,
        direction=arguments.direction,
        identity=audit.dictionary.identity,
    )
    flag.check(audit.dictionary)
    flags = append_flag(arguments.flags, flag)
    row = audit.features().set_index("feature").loc[arguments.feature]
    output.show(
        {"flags": arguments.flags, "number": len(flags), "flag": flag, "found": row.to_dict()},
        f"Flagged {flag.name} ({flag.dictionary}/{flag.feature}): attribution {row['attribution']:+.3g} ± "
        f"{row['standard_error']:.2g}, q {row['q_value']:.2g}.",
        to_copy(f"{arguments.flags} has {len(flags)} {'flag' if len(flags) == 1 else 'flags'}."),
    )
    return 0
