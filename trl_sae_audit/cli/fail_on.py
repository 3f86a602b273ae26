"""`audit --fail_on "label>effect"`: an answer for a build server, yes or no, in the exit code."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import AuditError

if TYPE_CHECKING:
    from ..audit.result import Audit
    from ..io.feature_labels import LabelSet

_FORM = re.compile(
    r"\s*(?P<name>.+?)\s*(?P<sign>[<>])\s*(?P<limit>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"
)


@dataclass(frozen=True)
class Rule:
    """What must not be: the effect size of a feature, or of those with a label, above (`>`) or below (`<`) a limit."""

    name: str
    sign: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{self.sign}{self.limit:g}"

    @property
    def feature(self) -> int | None:
        """The number of the feature, where the rule gives one."""
        return int(self.name) if self.name.isdecimal() else None


@dataclass(frozen=True)
class Finding:
    """What an audit says to a rule about one feature; `broken` is None where it cannot say."""

    rule: Rule
    feature: int
    effect_size: float
    low: float
    high: float
    broken: bool | None

    @classmethod
    def of(cls, rule: Rule, row: Mapping[Any, Any]) -> Finding:
        """By the end of the 95 % interval that is nearer to the limit: chance alone breaks no rule."""
        value, low, high = (
            float(row[name]) for name in ("effect_size", "effect_size_low", "effect_size_high")
        )
        known = all(map(math.isfinite, (low, high)))
        broken = (low > rule.limit if rule.sign == ">" else high < rule.limit) if known else None
        return cls(rule, int(row["feature"]), value, low, high, broken)

    def __str__(self) -> str:
        if self.broken is None:
            return (
                f"{self.rule}: cannot be said; the sampled answers do not differ in feature {self.feature}."
            )
        end, side = ("lower", "above") if self.rule.sign == ">" else ("upper", "below")
        verdict = f"FAILED, the {end} end is {side} {self.rule.limit:g}" if self.broken else "holds"
        return f"{self.rule}: {verdict}; feature {self.feature} has effect size {self.effect_size:+.2g} [{self.low:+.2g}, {self.high:+.2g}]."


def parse_rules(words: Iterable[str], known: Iterable[str]) -> list[Rule]:
    """The rules in `--fail_on`.

    Args:
        words: such as `sycophancy>0.1` and `1423<-0.2`.
        known: labels that there are.

    Raises:
        AuditError: one is of another form, or names a label that is not known.
    """
    rules = []
    labels = sorted({label.casefold(): label for label in known}.values())
    for word in words:
        match = _FORM.fullmatch(word)
        if match is None:
            raise AuditError(
                f'--fail_on is {word!r}; write a label or a feature\'s number, > or <, and an effect size: "sycophancy>0.1".'
            )
        rule = Rule(match["name"], match["sign"], float(match["limit"]))
        if rule.feature is None and rule.name.casefold() not in map(str.casefold, labels):
            close = difflib.get_close_matches(rule.name, labels, n=1)
            hint = (
                f"did you mean {close[0]!r}?"
                if close
                else "give --labels a file that has it, flags.yaml say, or the feature's number."
            )
            raise AuditError(f"--fail_on names the label {rule.name!r}, which no feature has; {hint}")
        rules.append(rule)
    return rules


def check_rules(rules: Sequence[Rule], audit: Audit) -> list[Finding]:
    """What an audit says to each rule, for every feature that it is about.

    Raises:
        AuditError: the audit looked ahead to no generations; the dictionary has no such feature, or none with that label.
    """
    table = audit.features().set_index("feature", drop=False)
    if rules and "effect_size" not in table:
        raise AuditError(
            "--fail_on compares effect sizes, and this audit has none: leave --no_lookahead out."
        )
    return [
        Finding.of(rule, table.loc[[feature]].to_dict("records")[0])
        for rule in rules
        for feature in _features_of(rule, audit.labels(), audit.dictionary.d_sae)
    ]


def exit_code(findings: Sequence[Finding]) -> int:
    """0 where all rules hold, 1 where one is broken, 2 where none is and one cannot be judged."""
    if any(finding.broken for finding in findings):
        return 1
    return 2 if any(finding.broken is None for finding in findings) else 0


def _features_of(rule: Rule, labels: LabelSet, d_sae: int) -> list[int]:
    if rule.feature is not None:
        if rule.feature >= d_sae:
            raise AuditError(
                f"--fail_on names feature {rule.feature}, and {labels.dictionary!r} has features 0 to {d_sae - 1}."
            )
        return [rule.feature]
    found = [label.feature for label in labels if label.text.casefold() == rule.name.casefold()]
    if not found:
        raise AuditError(
            f"--fail_on names the label {rule.name!r}, which no feature of {labels.dictionary!r} has."
        )
    return found
