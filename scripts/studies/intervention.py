"""Does acting on the flags work? Filtered, shaped and shielded DPO against the plain run and a run without the plant.

    python scripts/studies/intervention.py

In the lab, where agreeing with the user is planted in the preferences beside being right. Flags are found in the audit, as
a user finds them; the features that really carry the behaviour, which only the lab knows, are a second set beside them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, markdown_table, new_figure, run_cells, save_figure, write_report
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging

from trl_sae_audit import (
    Audit,
    FeatureDictionary,
    FeatureScorer,
    FeatureShieldCallback,
    FixedPenalty,
    Flag,
    FlagSet,
    audit_preferences,
    filter_preferences,
    load_dictionary,
    shape_preference_margin,
)
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.preferences import realised_strengths
from trl_sae_audit.lab.reading import FeatureReader, find_flags
from trl_sae_audit.lab.training import Shape, dpo_arguments, train_dpo
from trl_sae_audit.margin import fit_flag_weights
from trl_sae_audit.statistics import Interval, bootstrap_interval

NAME = "intervention"
BEHAVIOUR = "agrees"
QUALITY, PLANT = {"right": 0.5}, {BEHAVIOUR: 0.7}
LARGE, SMALL = 1920, 640
PROMPTS = 1000
PROBE = 64
MOST_INFLUENCES = 2  # each is a backward pass over the probe and a pass over the data

Rates = dict[str, Any]


class Seed:
    """One world, one preference set, and what an audit of it gives; everything is made when it is first asked for.

    Args:
        seed: of the world, the data and the training.
        pairs: how many.
    """

    def __init__(self, seed: int, pairs: int) -> None:
        self.seed, self.n = seed, pairs
        self.world: World = build_world(seed, progress=False)
        self.dictionary = load_dictionary(self.world.dictionary_path)
        self._scratch = tempfile.TemporaryDirectory()
        self.args = dpo_arguments(self._scratch.name, seed=seed)

    @cached_property
    def planted(self) -> Dataset:
        return self.world.preferences(QUALITY | PLANT, self.n, self.seed)

    @cached_property
    def unplanted(self) -> Dataset:
        return self.world.preferences(QUALITY, self.n, self.seed)

    @cached_property
    def audit(self) -> Audit:
        return self._audited()

    @cached_property
    def audit_with_lookahead(self) -> Audit:
        return self._audited(lookahead=self.world.preferences({}, PROBE, self.seed + 1, split="heldout"))

    def _audited(self, **options: Any) -> Audit:
        return audit_preferences(
            self.world.model(),
            self.world.tokenizer,
            self.planted,
            self.dictionary,
            args=self.args,
            batch_size=64,
            progress=False,
            **options,
        )

    def flags(self, kind: str) -> FlagSet:
        """ "asked": where the loss pushes; "shown": what tells the answers apart; "true": what carries the behaviour."""
        return {"asked": self._asked, "shown": self._shown, "true": self._true}[kind]

    @cached_property
    def _reader(self) -> FeatureReader:
        return FeatureReader(self.world, self.dictionary)

    @cached_property
    def _asked(self) -> FlagSet:
        return find_flags(self.audit, self._reader, BEHAVIOUR, "activation_attribution")

    @cached_property
    def _shown(self) -> FlagSet:
        return find_flags(self.audit, self._reader, BEHAVIOUR, "disparity")

    @cached_property
    def _true(self) -> FlagSet:
        return FlagSet([Flag(self.dictionary.name, feature) for feature in self.world.carriers(BEHAVIOUR)])

    def filtered(self, kind: str, score: str, *, control: bool = False) -> Dataset:
        """What is kept of the planted pairs when the rest shall not teach the flags, or as many at random."""
        flags, audit = self.flags(kind), self.audit
        if score == "influence":
            flags, audit = flags[:MOST_INFLUENCES], self.audit_with_lookahead
        result = filter_preferences(
            self.planted,
            audit,
            flags,
            score=score,
            weights="fit",
            budget="balance",
            control=True,
            seed=self.seed,
        )
        return result.control if control else result.kept

    def shape(self, kind: str, sign: float = 1.0) -> Shape:
        scorer = FeatureScorer(
            self.world.model(), self.world.tokenizer, self.dictionary, pooling="max", batch_size=64
        )

        def shaped(pairs: Dataset, beta: float) -> Dataset:
            fitted = fit_flag_weights(pairs, scorer, self.flags(kind))
            penalty = FixedPenalty(sign, allow_negative=True)
            return shape_preference_margin(pairs, scorer, fitted, penalty, beta=beta)

        return shaped

    def shield(self, kind: str) -> FeatureShieldCallback:
        return FeatureShieldCallback(self.dictionary, self.flags(kind))

    def trained(self, pairs: Dataset, **options: Any) -> Rates:
        """Rates of a model trained on pairs, at held-out prompts of users with a belief."""
        model = train_dpo(self.world, pairs, dpo_arguments(self._scratch.name, seed=self.seed), **options)
        rates = self.world.behaviour(model, n=PROMPTS, beliefs=(True, False)).rates()["rate"]
        return {"pairs": len(pairs), **{str(name): float(rate) for name, rate in rates.items()}}


class FreezeAbove(TrainerCallback):
    """Nothing above a dictionary's layer is trained."""

    def __init__(self, dictionary: FeatureDictionary) -> None:
        self.layer = int(dictionary.hook_point.rsplit(".", 1)[1])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        for part in (*model.model.layers[self.layer + 1 :], model.model.norm, model.lm_head):
            part.requires_grad_(False)


Arm = Callable[[Seed], Rates]
ARMS: dict[str, Arm] = {
    "plain": lambda s: s.trained(s.planted),
    "nothing planted": lambda s: s.trained(s.unplanted),
    "filtered by attribution": lambda s: s.trained(s.filtered("asked", "attribution")),
    "filtered by activation attribution": lambda s: s.trained(s.filtered("asked", "activation_attribution")),
    "filtered by influence": lambda s: s.trained(s.filtered("shown", "influence")),
    "filtered by activation gap": lambda s: s.trained(s.filtered("shown", "max_activation")),
    "as many at random": lambda s: s.trained(s.filtered("shown", "max_activation", control=True)),
    "shaped": lambda s: s.trained(s.planted, shape=s.shape("shown")),
    "shielded": lambda s: s.trained(s.planted, callbacks=[s.shield("asked")]),
    "filtered and shaped": lambda s: s.trained(s.filtered("shown", "max_activation"), shape=s.shape("shown")),
    "true features: filtered by activation gap": lambda s: s.trained(s.filtered("true", "max_activation")),
    "true features: shaped": lambda s: s.trained(s.planted, shape=s.shape("true")),
}
ASIDE: dict[str, Arm] = {
    "shaped with the opposite sign": lambda s: s.trained(s.planted, shape=s.shape("shown", -1.0)),
    "upper layers frozen: plain": lambda s: s.trained(s.planted, callbacks=[FreezeAbove(s.dictionary)]),
    "upper layers frozen: shielded": lambda s: s.trained(
        s.planted, callbacks=[FreezeAbove(s.dictionary), s.shield("asked")]
    ),
}
"""Arms that answer a question of their own."""
TRUE = [arm for arm in ARMS if arm.startswith("true")]
MAIN = [arm for arm in ARMS if arm not in TRUE and arm != "filtered by influence"]
INFLUENCE = ["plain", "nothing planted", "filtered by influence", "filtered by activation gap"]
SCORES = {
    "attribution": "asked",
    "activation_attribution": "asked",
    "influence": "shown",
    "activation": "shown",
    "max_activation": "shown",
}
"""Filter score → the list of flags it is used with."""


def cells(seeds: int, arms: Iterable[str], pairs: int) -> list[Cell]:
    """Seed by seed."""
    arms = list(arms)
    return [{"pairs": pairs, "seed": seed, "arm": arm} for seed in range(seeds) for arm in arms]


class Runner:
    """Runs cells; keeps the seed of the last one, whose audit serves the next."""

    def __init__(self) -> None:
        self._seed: Seed | None = None

    def __call__(self, cell: Cell) -> Iterable[dict[str, Any]]:
        if self._seed is None or (self._seed.seed, self._seed.n) != (cell["seed"], cell["pairs"]):
            self._seed = Seed(cell["seed"], cell["pairs"])
        rates = (ARMS | ASIDE)[cell["arm"]](self._seed)
        return [{f"{name}_rate" if name != "pairs" else "kept": value for name, value in rates.items()}]


def run_kept(cell: Cell) -> Iterable[dict[str, Any]]:
    """What each filter score keeps, with nothing trained: how far the pairs that stay still favour agreeing, and being right."""
    setting = Seed(cell["seed"], cell["pairs"])
    yield {"score": "", **_favours(setting.planted)}
    for score, kind in SCORES.items():
        yield {"score": score, **_favours(setting.filtered(kind, score))}


def _favours(pairs: Dataset) -> dict[str, float]:
    strength = realised_strengths(pairs)["strength"]
    return {"kept": len(pairs), BEHAVIOUR: float(strength[BEHAVIOUR]), "right": float(strength["right"])}


# What it shows

INTRODUCTION = f"""In the lab, {LARGE} pairs: in half of them the chosen answer is right and the
other wrong; in seven of ten it agrees with the user in words and the other does not, independently. Every arm is 40 steps of DPO with 16
pairs each from the same model; the filtered ones go through fewer pairs more often. Judged by rule on {PROMPTS} answers to held-out
questions of users with a belief. Intervals: 95 %, bootstrap over seeds, paired by seed; with five seeds they are too narrow and cover about
85 %.

- *excess removed*: (plain − arm) / (plain − nothing planted) in the rate of agreeing.
- Flags are found as a user finds them, with no label of any answer: of the first 20 features by `activation_attribution` (where the loss
  pushes) or by `disparity` (what chosen answers have more of) those whose strongest places lie in words of agreeing or disagreeing, which a
  rule reads in place of a person (`trl_sae_audit.lab.reading`). Gradient scores and the shield use the first list, activation gaps and
  shaping the second.
- *true features*: the lab's carriers of agreeing, known from activations and labels.
- Filters: `weights="fit"`, `budget="balance"`; *activation gap* is `score="max_activation"`. *shaped*: `shape_preference_margin` with its
  fitted coefficient, scorer with `pooling="max"`. No number in any of them is set by hand."""


READING = """**What works.** Filtering by the activation gap, and shaping, take away nearly all of what the plant taught, and answers are right as
often as after the plain run. Dropping as many pairs at random leaves the behaviour where it was. With the features that
really carry the behaviour it goes no better: nothing is lost by finding the flags in the audit.

**What does not, and why.**

- *Attribution* takes a pair's whole gradient along the feature. Most of it is pushed at tokens that have nothing to do with agreeing, so pairs that
  teach it hardly differ from pairs that do not. Counted only where the feature is active (*activation attribution*) it sees the token at which
  “right” or “mistaken” is chosen, and most of the behaviour goes; what it does not see there, the choice whether to say anything to the user's
  belief at all, may be the rest.
- *The shield* takes flagged directions out of the gradient at the hook point, layer 1 of 3. The layers above are trained as before."""
ON_SCORES = """*favours agreeing by*: share of pairs whose chosen answer alone agrees, less the share whose rejected one alone does; 0 teaches nothing.
Influence on the features' activation over held-out text asks how a step changes what is active on given words, and not which words the model will
choose: it keeps the behaviour."""
ON_ASIDE = """*Opposite sign*: the margin shifted by p the other way, as if r − p were learned by subtracting p in the loss; it is r + p that is learned then. *Upper
layers frozen*: only what lies at and below the hook point is trained, so that the shield stands in the way of all that is learned."""


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm: rates, the share of the excess that is gone, the change of quality; intervals over seeds."""
    wide = rows.pivot(index="seed", columns="arm")
    lines = []
    for arm in [arm for arm in ARMS | ASIDE if arm in set(rows["arm"])]:
        of_arm = wide.loc[wide["kept", arm].notna()]
        behaviour, quality = (of_arm.xs(f"{name}_rate", axis=1) for name in (BEHAVIOUR, "right"))
        lines.append(
            {
                "arm": arm,
                "seeds": len(of_arm),
                "pairs": f"{of_arm['kept', arm].mean():.0f}",
                "agrees": f"{behaviour[arm].mean():.3f}",
                "excess removed": "" if arm == "plain" else percent(removed(behaviour, arm)),
                "right": f"{quality[arm].mean():.3f}",
                "right − plain": ""
                if arm == "plain"
                else signed(bootstrap_interval((quality[arm] - quality["plain"]).to_numpy())),
                "malformed": f"{of_arm['malformed_rate', arm].mean():.3f}",
            }
        )
    return pd.DataFrame(lines)


def removed(behaviour: Any, arm: str) -> Interval:
    """(plain − arm) / (plain − nothing planted), each a mean over seeds, seeds drawn again together."""
    columns = np.stack(
        [behaviour["plain"] - behaviour[arm], behaviour["plain"] - behaviour["nothing planted"]], axis=1
    )
    return bootstrap_interval(columns, lambda sample: sample[:, 0].mean() / sample[:, 1].mean())


def kept_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds of what each score keeps."""
    means = rows.groupby("score", sort=False)[["kept", BEHAVIOUR, "right"]].mean()
    return pd.DataFrame(
        {
            "score": [score or "(all pairs)" for score in means.index],
            "flags": [SCORES.get(score, "") for score in means.index],
            "pairs kept": [f"{value:.0f}" for value in means["kept"]],
            "favour agreeing by": [f"{value:+.2f}" for value in means[BEHAVIOUR]],
            "favour being right by": [f"{value:+.2f}" for value in means["right"]],
        }
    )


def signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def percent(interval: Interval) -> str:
    return f"{interval.estimate:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def figure(rows: pd.DataFrame) -> str:
    """Behaviour and quality of every arm, a dot a seed."""
    drawing, (left, right) = new_figure(2, width=4.8, height=3.6)
    arms = [arm for arm in ARMS if arm in set(rows["arm"])][::-1]
    for axes, name, title in ((left, BEHAVIOUR, "agrees with the user"), (right, "right", "answers right")):
        colour = "#c0392b" if axes is left else "#2471a3"
        values = rows.pivot(index="seed", columns="arm", values=f"{name}_rate")[arms]
        for place, arm in enumerate(arms):
            axes.plot(values[arm], [place] * len(values), "o", color="#999999", markersize=3)
            axes.plot(values[arm].mean(), place, "o", color=colour, markersize=7)
        for reference, style in (("plain", "--"), ("nothing planted", ":")):
            axes.axvline(values[reference].mean(), color="black", linestyle=style, linewidth=0.8)
        axes.set_yticks(range(len(arms)), arms if axes is left else [""] * len(arms))
        axes.set_xlabel(f"share of {PROMPTS} held-out answers")
        axes.set_title(title)
    text = "Rate of agreeing and of right answers for every arm; one small dot a seed, a large one their mean"
    return save_figure(drawing, NAME, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="worlds, each with its own data and training")
    parser.add_argument("--true", type=int, default=3, help="of them with the true features too")
    parser.add_argument("--aside", type=int, default=2, help="of them for the questions aside")
    parser.add_argument("--kept", type=int, default=3, help="of them for what each score keeps, untrained")
    parser.add_argument("--influence", type=int, default=2, help="of them trained on what influence keeps")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    run = Runner()
    main_cells = cells(arguments.seeds, MAIN, LARGE)
    rows = run_cells(NAME, main_cells + cells(arguments.true, TRUE, LARGE), run)
    sections = [INTRODUCTION, markdown_table(table(rows)), figure(rows), READING]
    if arguments.aside:
        beside = ["plain", "nothing planted", "shaped", "shielded"]
        first = rows["seed"].lt(arguments.aside) & rows["arm"].isin(beside)
        aside = run_cells(NAME, cells(arguments.aside, ASIDE, LARGE), run)
        sections += ["## Questions aside", markdown_table(table(pd.concat([rows[first], aside]))), ON_ASIDE]
    if arguments.kept:
        kept = run_cells(
            f"{NAME}-kept", [{"pairs": SMALL, "seed": seed} for seed in range(arguments.kept)], run_kept
        )
        title = f"## What each filter score keeps of {SMALL} pairs"
        sections += [title, markdown_table(kept_table(kept)), ON_SCORES]
    if arguments.influence:
        trained = run_cells(NAME, cells(arguments.influence, INFLUENCE, SMALL), run)
        sections += [
            f"## Trained on what is kept of {SMALL} pairs",
            markdown_table(table(trained)),
        ]
    write_report(NAME, "Intervention: does acting on the flags work?", sections)


if __name__ == "__main__":
    main()
