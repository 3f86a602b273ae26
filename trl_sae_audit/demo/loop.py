"""The loop itself: every step does one thing with the package's public functions and leaves its files behind."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..audit import audit_preferences
from ..audit_result import Audit
from ..callback import FeatureAttributionCallback
from ..dictionary import FeatureDictionary
from ..errors import AuditError
from ..evidence import gather_evidence
from ..evidence_files import write_evidence
from ..filtering import FilterResult, filter_preferences
from ..flags import Flag, FlagSet
from ..lab.evaluation import Behaviour
from ..lab.reading import FeatureReader, find_flags
from ..lab.training import dpo_arguments, train_dpo
from ..lab.world import World, build_world
from ..margin import fit_flag_weights, shape_preference_margin
from ..objectives import PreferenceLoss
from ..outcomes import Outcome, write_outcomes
from ..report import write_report
from ..sae import load_dictionary
from ..scorer import FeatureScorer
from .narrator import Narrator, Progress
from .on_policy import train_on_policy

BEHAVIOUR = "agrees"
STRENGTHS = {"right": 0.5, BEHAVIOUR: 0.7}
USERS = (True, False)
_PUSHED_MOST = 16
WATCHED = 3
MODEL = "lab-model"  # begins like the name in the dictionary's metadata, so that the two are known to belong together
MEASURES = {
    BEHAVIOUR: ("agrees with the user", "down"),
    "right": ("answers right", "up"),
    "malformed": ("is no proper answer", "down"),
}


class Copied(World):
    """A world whose models and dictionary are read from copies, where a person finds them.

    Args:
        world: to copy from.
        directory: to copy to.
    """

    def __init__(self, world: World, directory: Path) -> None:
        super().__init__(world.config, world.directory)
        self._copies = directory
        for source, copy in (
            (world.model_path, self.model_path),
            (world.reward_model_path, self.reward_model_path),
            (world.dictionary_path, self.dictionary_path),
        ):
            shutil.copytree(source, copy)

    @property
    def model_path(self) -> Path:
        return self._copies / MODEL

    @property
    def reward_model_path(self) -> Path:
        return self._copies / "reward_model"

    @property
    def dictionary_path(self) -> Path:
        return self._copies / "dictionary"


@dataclass
class Loop:
    """State of a demo: a world, its preferences, and what was made of them.

    Args:
        directory: where everything goes.
        narrator: for the trainers' progress.
        pairs, steps, rl_steps, answers, seed: sizes.
    """

    directory: Path
    narrator: Narrator
    pairs: int
    steps: int
    rl_steps: int
    answers: int
    seed: int
    outcomes: dict[str, list[Outcome]] = field(default_factory=dict)

    # The world

    @cached_property
    def world(self) -> World:
        """Built, or read from the cache."""
        return Copied(build_world(self.seed), self.directory)

    @cached_property
    def dictionary(self) -> FeatureDictionary:
        return load_dictionary(self.world.dictionary_path)

    @cached_property
    def preferences(self) -> Dataset:
        pairs = self.world.preferences(STRENGTHS, self.pairs, self.seed)
        pairs.to_json(self.directory / "pairs.jsonl")
        return pairs

    @cached_property
    def reader(self) -> FeatureReader:
        return FeatureReader(self.world, self.dictionary)

    # Audit, flags, filter

    @cached_property
    def audit(self) -> Audit:
        return audit_preferences(
            self.world.model(),
            self.world.tokenizer,
            self.preferences,
            self.dictionary,
            args=self._arguments("audit"),
            output_dir=self.directory / "audit",
            batch_size=64,
            progress=False,
        )

    @cached_property
    def flags(self) -> FlagSet:
        """Those of the features first by activation attribution and by disparity that are active in words of agreement."""
        flags = FlagSet(
            {
                flag.feature: flag
                for by in ("activation_attribution", "disparity")
                for flag in find_flags(self.audit, self.reader, BEHAVIOUR, by)
            }.values()
        )
        if not len(flags):
            raise AuditError(
                "No feature of the audit is active in words of agreement, so there is nothing to flag: ask for more --pairs."
            )
        flags.save(self.directory / "flags.yaml")
        return flags

    def write_evidence(self) -> Path:
        """Examples, tokens and vocabulary of every flagged feature, and of those the data pushes most, beside the audit."""
        pushed = self.audit.features()["feature"].head(_PUSHED_MOST)
        found = gather_evidence(
            self.audit,
            list(
                dict.fromkeys([*(flag.feature for flag in self.flags), *(int(feature) for feature in pushed)])
            ),
            self.world.model(),
            self.world.tokenizer,
            self.preferences,
            self.dictionary,
            PreferenceLoss(self.world.tokenizer, self._arguments("audit")),
            labels={flag.feature: flag.label for flag in self.flags},
        )
        write_evidence(self.audit.directory, found)
        return self.audit.directory / "evidence.md"

    @cached_property
    def filtered(self) -> FilterResult:
        result = filter_preferences(
            self.preferences,
            self.audit,
            self.flags,
            score="max_activation",
            weights="fit",
            budget="balance",
        )
        result.save(self.directory / "filtered", format="jsonl")
        return result

    @cached_property
    def scorer(self) -> FeatureScorer:
        """A frozen copy of the model the runs begin with, calibrated on its own answers."""
        model, answers = self.world.model(), self.world.behaviour(n=256, seed=7, beliefs=USERS)
        scorer = FeatureScorer(model, self.world.tokenizer, self.dictionary, pooling="max", batch_size=64)
        return scorer.calibrate(
            (prompt, f" {answer}") for prompt, answer in zip(answers.prompts, answers.answers, strict=True)
        )

    @cached_property
    def weighted_flags(self) -> FlagSet:
        """The flags with the weights by which they explain the preferences."""
        return fit_flag_weights(self.preferences, self.scorer, self.flags)

    @cached_property
    def watched(self) -> list[Flag]:
        """The first flags of both rankings: the tokens where the loss chooses, and what answers show."""
        shown = sorted(self.weighted_flags, key=lambda flag: -flag.weight)
        return list(
            dict.fromkeys([*self.flags[:WATCHED], *(self.named[flag.feature] for flag in shown[:WATCHED])])
        )

    @cached_property
    def told(self) -> Flag:
        """The watched feature that the runs' progress tells of: the first that the loss strengthens."""
        return next((flag for flag in self.watched if flag.direction == "up"), self.watched[0])

    @cached_property
    def named(self) -> dict[int, Flag]:
        return {flag.feature: flag for flag in self.flags}

    # Runs

    @cached_property
    def before(self) -> list[Outcome]:
        """How the model behaves before any of it."""
        return self._measure(self.world.behaviour(n=self.answers, beliefs=USERS), "before")

    def dpo(self, name: str) -> list[Outcome]:
        """Audited DPO on the preferences ("plain"), on what the filter kept ("filtered"), or with a shaped margin ("shaped")."""
        pairs: Dataset = self.filtered.kept if name == "filtered" else self.preferences
        model = train_dpo(
            self.world,
            pairs,
            self._arguments(name),
            callbacks=self._callbacks(f"dpo-{name}"),
            shape=self._shape if name == "shaped" else None,
        )
        return self._finish(f"dpo-{name}", model)

    def on_policy(self, name: str, algorithm: str) -> list[Outcome]:
        """Audited RL on the biased reward, "plain" or "shaped"."""
        weights = sum(flag.weight for flag in self.weighted_flags)
        flags = FlagSet(
            dataclasses.replace(flag, weight=flag.weight / weights) for flag in self.weighted_flags
        )
        run = f"{algorithm.lower()}-{name}"
        model = train_on_policy(
            self.world,
            self.directory / "trainer" / run,
            steps=self.rl_steps,
            seed=self.seed,
            callbacks=self._callbacks(run),
            scorer=self.scorer,
            flags=flags if name == "shaped" else None,
        )
        return self._finish(run, model)

    def report(self, runs: dict[str, str], output: str, title: str, note: str, *, data: bool) -> Path:
        """One page about some runs: name → directory; the first is what it is about."""
        return write_report(
            [self.directory / directory for directory in runs.values()],
            self.directory / output,
            names=list(runs),
            title=title,
            note=note,
            audit=self.audit.directory if data else None,
            filtered=self.directory / "filtered" if data else None,
        )

    def _shape(self, pairs: Dataset, beta: float) -> Dataset:
        return shape_preference_margin(pairs, self.scorer, self.weighted_flags, 1.0, beta=beta)

    def _callbacks(self, run: str) -> list[Any]:
        audited = FeatureAttributionCallback(
            self.dictionary,
            output_dir=self.directory / run,
            watch={flag.label: flag.feature for flag in self.watched},
        )
        return [audited, Progress(self.narrator, run, self.told.label)]

    def _arguments(self, name: str) -> Any:
        logging_steps = max(1, self.steps // 4)
        return dpo_arguments(
            self.directory / "trainer" / name, self.steps, self.seed, logging_steps=logging_steps
        )

    def _finish(self, run: str, model: Any) -> list[Outcome]:
        after = self._measure(self.world.behaviour(model, n=self.answers, beliefs=USERS), "after")
        write_outcomes(self.directory / run, [*self.before, *after])
        self.outcomes[run] = after
        return after

    @staticmethod
    def _measure(behaviour: Behaviour, stage: Any) -> list[Outcome]:
        rates: dict[str, dict[str, float]] = behaviour.rates().to_dict("index")  # type: ignore[assignment]
        return [
            Outcome(
                name,
                rates[name]["rate"],
                rates[name]["low"],
                rates[name]["high"],
                n=int(rates[name]["n"]),
                label=label,
                stage=stage,
                wanted=wanted,  # type: ignore[arg-type]
                unit="share",
            )
            for name, (label, wanted) in MEASURES.items()
        ]
