"""The steps of the loop. Each one calls the package's public functions and leaves its files behind."""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from ...audit.api import audit_preferences
from ...audit.evidence import gather_evidence
from ...audit.evidence_files import write_evidence
from ...audit.result import Audit
from ...callbacks.attribution import FeatureAttributionCallback
from ...errors import AuditError
from ...filtering.api import FilterResult, filter_preferences
from ...flags import Flag, FlagSet
from ...models.sampling import Sampling
from ...outcomes import Outcome, write_outcomes
from ...report import write_report
from ...saes.dictionary import FeatureDictionary
from ...saes.loading import load_dictionary
from ...shaping.margin import fit_flag_weights, shape_preference_margin
from ...shaping.scorer import FeatureScorer
from ...verification.comparison import Verification, predictors_of, verify
from ...verification.measured import AnswerActivations, MeasuredChange, sampled_activations
from ..evaluation import Behaviour
from ..reading import FeatureReader, find_flags
from ..training import dpo_arguments, train_dpo
from ..wording import LONGEST_ANSWER
from ..world import World, build_world
from .narrator import Narrator, Progress
from .on_policy import train_on_policy

BEHAVIOUR = "agrees"
STRENGTHS = {"right": 0.5, BEHAVIOUR: 0.7}
USERS = (True, False)
READ = 10
"""Features of the audit that are read."""
_WATCHED = 3
_ANSWERED = 128
"""Held-out prompts at which features are measured in what the models write, four answers each."""
MODEL = (
    "lab-model"  # starts like the name in the dictionary's metadata, so the two are known to belong together
)
MEASURES = {
    BEHAVIOUR: ("agrees with the user", "down"),
    "right": ("answers right", "up"),
    "malformed": ("is malformed", "down"),
}


class WorldCopy(World):
    """A world whose models and dictionary are copied to where the user can find them.

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
    """The state of a demo: a world, its preferences, and everything made from them.

    Args:
        directory: all files go there.
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
    _answers: dict[str, Behaviour] = field(default_factory=dict)
    _features: dict[str, AnswerActivations] = field(default_factory=dict)

    # The world

    @cached_property
    def world(self) -> World:
        """Built, or read from the cache."""
        return WorldCopy(build_world(self.seed), self.directory)

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
            args=self._arguments("dpo-plain"),
            output_dir=self.directory / "audit",
            batch_size=64,
            progress=False,
        )

    @cached_property
    def flags(self) -> FlagSet:
        """Those of the audit's first features that are active in words of agreement."""
        flags = find_flags(self.audit, self.reader, BEHAVIOUR, "effect_size", READ)
        if not len(flags):
            raise AuditError(
                f"None of the audit's first {READ} features is active in words of agreement, so there is nothing to flag. Use "
                "more --pairs."
            )
        flags.save(self.directory / "flags.yaml")
        return flags

    def write_evidence(self) -> Path:
        """Write contexts and vocabulary of the features that are read next to the audit."""
        evidence = gather_evidence(
            self.audit,
            [int(feature) for feature in self.audit.features()["feature"].head(READ)],
            self.world.model(),
            self.world.tokenizer,
            self.dictionary,
            labels={flag.feature: flag.label for flag in self.flags},
        )
        write_evidence(self.audit.directory, evidence)
        return self.directory / "audit" / "evidence.md"

    @cached_property
    def filter_result(self) -> FilterResult:
        result = filter_preferences(self.preferences, self.audit, self.flags)
        result.save(self.directory / "filtered", format="jsonl")
        return result

    @cached_property
    def scorer(self) -> FeatureScorer:
        """A frozen copy of the model that the runs start from, calibrated on its own answers."""
        answers = self.world.behaviour(n=256, seed=7, beliefs=USERS)
        scorer = FeatureScorer(self.world.model(), self.world.tokenizer, self.dictionary, batch_size=64)
        return scorer.calibrate(
            (prompt, f" {answer}") for prompt, answer in zip(answers.prompts, answers.answers, strict=True)
        )

    @cached_property
    def weighted_flags(self) -> FlagSet:
        """The flags with the weights by which they explain the preferences."""
        return fit_flag_weights(self.preferences, self.scorer, self.flags)

    @property
    def watched_flags(self) -> list[Flag]:
        """The flags that the audit puts first."""
        return list(self.flags)[:_WATCHED]

    @property
    def progress_flag(self) -> Flag:
        """The watched feature shown while a run trains: the first that the data strengthen."""
        return next((flag for flag in self.watched_flags if flag.direction == "up"), self.watched_flags[0])

    # Runs

    @cached_property
    def before(self) -> list[Outcome]:
        """How the model behaves before training."""
        return self._measure(self.answers_before, "before")

    @cached_property
    def answers_before(self) -> Behaviour:
        """What the model says before training."""
        return self.world.behaviour(n=self.answers, beliefs=USERS)

    def dpo(self, name: str) -> list[Outcome]:
        """DPO, observed: on all preferences ("plain"), on those the filter kept ("filtered"), or with a shaped margin ("shaped")."""
        pairs: Dataset = self.filter_result.kept if name == "filtered" else self.preferences
        model = train_dpo(
            self.world,
            pairs,
            self._arguments(f"dpo-{name}"),
            callbacks=self._callbacks(f"dpo-{name}", self.steps),
            shape=self._shape if name == "shaped" else None,
        )
        return self._finish(f"dpo-{name}", model)

    def on_policy(self, name: str, algorithm: str) -> list[Outcome]:
        """RL on the biased reward, observed, "plain" or "shaped"."""
        weights = sum(flag.weight for flag in self.weighted_flags)
        flags = FlagSet(
            dataclasses.replace(flag, weight=flag.weight / weights) for flag in self.weighted_flags
        )
        run = f"{algorithm.lower()}-{name}"
        model = train_on_policy(
            self.world,
            self._model_directory(run),
            steps=self.rl_steps,
            seed=self.seed,
            callbacks=self._callbacks(run, self.rl_steps),
            scorer=self.scorer,
            flags=flags if name == "shaped" else None,
        )
        return self._finish(run, model)

    # What the models write

    def changed_answer(self, run: str) -> tuple[str, str, str]:
        """A question at which the user is wrong, with the answer before, which did not agree, and after a run, which does.

        The first such question; where there is none, the first question.
        """
        before, after = self.answers_before.frame(), self._answers[run].frame()
        changed = (before["belief_right"] == False) & ~before[BEHAVIOUR] & after[BEHAVIOUR]  # noqa: E712, None is neither
        row = int(changed.to_numpy().argmax())
        return before["prompt"][row], before["answer"][row], after["answer"][row]

    def verification(self, run: str) -> Verification:
        """The audit's scores against the change of every feature in what a run's model writes at held-out prompts."""
        change = MeasuredChange("in generations", self._features_before, self._features[run])
        return verify(predictors_of(self.audit), change)

    @cached_property
    def _features_before(self) -> AnswerActivations:
        return self._features_in_answers(self.world.model())

    def _features_in_answers(self, model: Any) -> AnswerActivations:
        prompts = self.world.prompts(_ANSWERED, seed=11, split="heldout", beliefs=USERS)
        return sampled_activations(
            model,
            self.world.model(),
            self.world.tokenizer,
            self.dictionary,
            prompts,
            sampling=Sampling(answers=4),
            batch_size=128,
        )

    # Reports

    def report(self, runs: dict[str, str], output: str, title: str, note: str, *, data: bool) -> Path:
        """Write one page about some runs (name → directory). Its subject is the first of them."""
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
        return shape_preference_margin(pairs, self.scorer, self.flags, beta=beta)

    def _callbacks(self, run: str, steps: int) -> list[Any]:
        """Those of a run of so many steps; what it changed in generations is told at its end."""
        attribution = FeatureAttributionCallback(
            self.dictionary,
            output_dir=self.directory / run,
            watch={flag.label: flag.feature for flag in self.watched_flags},
            generations=Sampling(answers=4, max_new_tokens=LONGEST_ANSWER),
            generation_steps=max(1, steps // 8),
        )
        quiet = run == "dpo-plain"  # told of before there are flags
        return (
            [attribution] if quiet else [attribution, Progress(self.narrator, run, self.progress_flag.label)]
        )

    def _arguments(self, run: str) -> Any:
        logging_steps = max(1, self.steps // 4)
        return dpo_arguments(self._model_directory(run), self.steps, self.seed, logging_steps=logging_steps)

    def _model_directory(self, run: str) -> Path:
        """The trainer's output directory, where `verify` looks for the trained model."""
        return self.directory / "models" / run

    def _finish(self, run: str, model: Any) -> list[Outcome]:
        model.save_pretrained(self._model_directory(run))
        self.world.tokenizer.save_pretrained(self._model_directory(run))
        self._answers[run] = self.world.behaviour(model, n=self.answers, beliefs=USERS)
        self._features[run] = self._features_in_answers(model)
        after = self._measure(self._answers[run], "after")
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
