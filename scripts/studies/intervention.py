"""Does acting on the flags work? Filtered, weighted, shaped and shielded DPO against the plain run and a run without the plant.

    python scripts/studies/intervention.py

In the lab, where agreeing with the user is planted in the preferences beside being right. Everything is a default: the audit, the
filter, the shaping. What is flagged is what a reader of the audit's first ten features would flag.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, bootstrap_interval, markdown_table, new_figure, run_cells, save_figure, write_report
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from transformers.utils import logging

from trl_sae_audit import (
    Audit,
    FeatureDictionary,
    FeatureScorer,
    FeatureShieldCallback,
    FixedPenalty,
    FlagSet,
    audit_preferences,
    filter_preferences,
    load_dictionary,
    shape_preference_margin,
)
from trl_sae_audit.filtering.api import FilterResult
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.preferences import realised_strengths
from trl_sae_audit.lab.reading import FeatureReader, find_flags
from trl_sae_audit.lab.training import Shape, dpo_arguments, train_dpo
from trl_sae_audit.shaping.margin import fit_flag_weights
from trl_sae_audit.statistics import Interval

NAME = "intervention"
BEHAVIOUR = "agrees"
QUALITY, PLANT = {"right": 0.5}, {BEHAVIOUR: 0.7}
PAIRS = 1920
READ = 10
PROMPTS = 1000

Rates = dict[str, Any]


class Seed:
    """One world, one preference set, and what an audit of it gives; everything is made when it is first asked for.

    Args:
        seed: of the world, the data and the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.world: World = build_world(seed, progress=False)
        self.dictionary = load_dictionary(self.world.dictionary_path)
        self._scratch = tempfile.TemporaryDirectory()

    @cached_property
    def planted(self) -> Dataset:
        return self.world.preferences(QUALITY | PLANT, PAIRS, self.seed)

    @cached_property
    def unplanted(self) -> Dataset:
        return self.world.preferences(QUALITY, PAIRS, self.seed)

    @cached_property
    def perfect(self) -> Dataset:
        """What a filter that knows the plant keeps."""
        return self.planted.filter(lambda row: not row[f"planted_{BEHAVIOUR}"])

    @cached_property
    def audit(self) -> Audit:
        return audit_preferences(
            self.world.model(),
            self.world.tokenizer,
            self.planted,
            self.dictionary,
            args=dpo_arguments(self._scratch.name, seed=self.seed),
            batch_size=64,
            progress=False,
        )

    @cached_property
    def flags(self) -> FlagSet:
        """Those of the audit's first features that a reader takes for words of agreeing or disagreeing."""
        reader = FeatureReader(self.world, self.dictionary)
        return find_flags(self.audit, reader, BEHAVIOUR, "effect_size", READ)

    @cached_property
    def filtered(self) -> FilterResult:
        return filter_preferences(self.planted, self.audit, self.flags, control=True, seed=self.seed)

    def kept_by(self, **options: Any) -> Dataset:
        """What a filter with other options keeps."""
        return filter_preferences(self.planted, self.audit, self.flags, check=False, **options).kept

    @cached_property
    def scorer(self) -> FeatureScorer:
        return FeatureScorer(self.world.model(), self.world.tokenizer, self.dictionary, batch_size=64)

    def shape(self, pairs: Dataset, beta: float) -> Dataset:
        return shape_preference_margin(pairs, self.scorer, self.flags, beta=beta)

    def shape_wrongly(self, pairs: Dataset, beta: float) -> Dataset:
        fitted = fit_flag_weights(pairs, self.scorer, self.flags)
        penalty = FixedPenalty(-1.0, allow_negative=True)
        return shape_preference_margin(pairs, self.scorer, fitted, penalty, beta=beta)

    def shield(self) -> FeatureShieldCallback:
        return FeatureShieldCallback(self.dictionary, self.flags)

    def trained(self, pairs: Dataset, *, shape: Shape | None = None, **options: Any) -> Rates:
        """Rates of a model trained on pairs, at held-out prompts of users with a belief; and what the pairs favour."""
        arguments = dpo_arguments(self._scratch.name, seed=self.seed)
        model = train_dpo(self.world, pairs, arguments, shape=shape, **options)
        rates = self.world.behaviour(model, n=PROMPTS, beliefs=(True, False)).rates()["rate"]
        strength = realised_strengths(pairs)["strength"]
        return {
            "kept": len(pairs),
            "favours_agreeing": float(strength[BEHAVIOUR]),
            "favours_right": float(strength["right"]),
            **{f"{name}_rate": float(rate) for name, rate in rates.items()},
        }

    def filtered_run(self) -> Rates:
        """The default filter, with what it said about itself."""
        check = self.filtered.check
        assert check is not None
        effects = check.flagged[["before", "after"]].abs().sum()
        return self.trained(self.filtered.kept) | {
            "planted": int(sum(self.planted[f"planted_{BEHAVIOUR}"])),
            "flags": len(self.flags),
            "predicted": float(effects["after"] / effects["before"]),
            "remaining": len(check.remaining),
            "risen": len(check.risen),
        }


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
    "filtered": Seed.filtered_run,
    "shaped": lambda s: s.trained(s.planted, shape=s.shape),
    "resampled by weights": lambda s: s.trained(s.kept_by(strategy="resample")),
    "perfect filter": lambda s: s.trained(s.perfect),
    "as many at random": lambda s: s.trained(s.filtered.control),
    "filtered and shaped": lambda s: s.trained(s.filtered.kept, shape=s.shape),
    "as many, highest scores first": lambda s: s.trained(s.kept_by(budget=s.filtered.summary["dropped"])),
    "as many by attribution": lambda s: s.trained(
        s.kept_by(score="attribution", weights="flags", budget=s.filtered.summary["dropped"])
    ),
}
ASIDE: dict[str, Arm] = {
    "shielded": lambda s: s.trained(s.planted, callbacks=[s.shield()]),
    "shaped with the opposite sign": lambda s: s.trained(s.planted, shape=s.shape_wrongly),
    "upper layers frozen: plain": lambda s: s.trained(s.planted, callbacks=[FreezeAbove(s.dictionary)]),
    "upper layers frozen: shielded": lambda s: s.trained(
        s.planted, callbacks=[FreezeAbove(s.dictionary), s.shield()]
    ),
}
"""Arms that answer a question of their own."""
EXTREMES = ["plain", "nothing planted"]


def cells(seeds: int, arms: Iterable[str]) -> list[Cell]:
    """Seed by seed."""
    arms = list(arms)
    return [{"pairs": PAIRS, "seed": seed, "arm": arm} for seed in range(seeds) for arm in arms]


class Runner:
    """Runs cells; keeps the seed of the last one, whose audit serves the next."""

    def __init__(self) -> None:
        self._seed: Seed | None = None

    def __call__(self, cell: Cell) -> Iterable[dict[str, Any]]:
        if self._seed is None or self._seed.seed != cell["seed"]:
            self._seed = Seed(cell["seed"])
        return [(ARMS | ASIDE)[cell["arm"]](self._seed)]


# What it shows

INTRODUCTION = f"""In the lab, {PAIRS} pairs: in half of them the chosen answer is right and the
other wrong; in seven of ten it agrees with the user in words and the other does not, independently. Every arm is 40 steps of DPO with 16
pairs each from the same model; the filtered ones go through fewer pairs more often. Judged by rule on {PROMPTS} answers to held-out
questions of users with a belief. Intervals: 95 %, bootstrap over worlds, paired by world.

- *excess removed*: (plain − arm) / (plain − nothing planted) in the rate of agreeing.
- *favours agreeing by*: share of the pairs kept whose chosen answer alone agrees, less the share whose rejected one alone does.
- Nothing is chosen by hand. Flags: of the first {READ} features of the default audit those that are strongest at words of agreeing or
  disagreeing, which a rule reads in place of a person (`trl_sae_audit.lab.reading`). *filtered*: `filter_preferences(dataset, audit,
  flags)`. *shaped*: `shape_preference_margin` with its fitted coefficients. *resampled by weights*: `strategy="resample"`, as many pairs as there were.
- Controls: *perfect filter* drops exactly the pairs in which agreeing is planted. *As many*: as many pairs as the default filter drops,
  at random, or those with the highest scores, or those with the highest attribution."""
ON_ASIDE = """*Shielded*: the flagged directions are taken out of the gradient at the hook point, layer 1 of 3; the layers above are trained as
before. *Opposite sign*: the margin shifted by p the other way, as if r − p were learned by subtracting p in the loss; it is r + p that is
learned then. *Upper layers frozen*: only what is at and below the hook point is trained, so that the shield is in the way of all that is
learned."""


def reading(rows: pd.DataFrame) -> str:
    """What the default filter did, world by world, against what it is meant to do."""
    wide = rows.pivot(index="seed", columns="arm")
    own = rows[rows["arm"] == "filtered"].set_index("seed")
    rates = wide.xs(f"{BEHAVIOUR}_rate", axis=1)
    excess = rates["plain"] - rates["nothing planted"]
    ratio = (PAIRS - own["kept"]) / own["planted"]
    lines = []
    for arm in ("filtered", "shaped", "resampled by weights", "perfect filter"):
        share = (rates["plain"] - rates[arm]) / excess
        lines.append(
            f"- *{arm}*: at least 90 % of the excess is gone in {int((share >= 0.9).sum())} of {len(share)} worlds "
            f"(lowest {share.min():.0%}, median {share.median():.0%})."
        )
    return "\n".join(
        [
            f"The filter drops {ratio.mean():.3f} times as many pairs as were planted (worlds: {ratio.min():.3f} to {ratio.max():.3f}), by "
            f"{own['flags'].min():.0f} to {own['flags'].max():.0f} flags. World by world:",
            "",
            *lines,
            "",
            "Predicted again on what is kept, a step does to the flagged features "
            f"{own['predicted'].mean():.0%} of what it did on all pairs (sizes added up; worlds: {own['predicted'].min():.0%} to "
            f"{own['predicted'].max():.0%}); {own['remaining'].mean():.1f} of {own['flags'].mean():.1f} flagged features are still "
            f"predicted to move as the flag objects to, and {own['risen'].mean():.1f} others clearly more than before.",
        ]
    )


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """One line an arm: rates, the share of the excess that is gone, the change of quality; intervals over worlds."""
    wide = rows.pivot(index="seed", columns="arm")
    lines = []
    for arm in [arm for arm in ARMS | ASIDE if arm in set(rows["arm"])]:
        of_arm = wide.loc[wide["kept", arm].notna()]
        behaviour, quality = (of_arm.xs(f"{name}_rate", axis=1) for name in (BEHAVIOUR, "right"))
        lines.append(
            {
                "arm": arm,
                "worlds": len(of_arm),
                "pairs": f"{of_arm['kept', arm].mean():.0f}",
                "favours agreeing by": f"{of_arm['favours_agreeing', arm].mean():+.3f}",
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
    """(plain − arm) / (plain − nothing planted), each a mean over worlds, worlds drawn again together."""
    columns = np.stack(
        [behaviour["plain"] - behaviour[arm], behaviour["plain"] - behaviour["nothing planted"]], axis=1
    )
    return bootstrap_interval(columns, lambda sample: sample[:, 0].mean() / sample[:, 1].mean())


def signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def percent(interval: Interval) -> str:
    return f"{interval.estimate:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def figure(rows: pd.DataFrame) -> str:
    """Behaviour and quality of every arm, a dot a world."""
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
    text = (
        "Rate of agreeing and of right answers for every arm; one small dot a world, a large one their mean"
    )
    return save_figure(drawing, NAME, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10, help="worlds, each with its own data and training")
    parser.add_argument("--aside", type=int, default=2, help="of them for the questions aside")
    arguments = parser.parse_args()
    disable_progress_bars()
    logging.disable_progress_bar()
    run = Runner()
    rows = run_cells(NAME, cells(arguments.seeds, ARMS), run)
    sections = [INTRODUCTION, markdown_table(table(rows)), figure(rows), reading(rows)]
    if arguments.aside:
        first = rows["seed"].lt(arguments.aside) & rows["arm"].isin([*EXTREMES, "shaped"])
        aside = run_cells(NAME, cells(arguments.aside, ASIDE), run)
        sections += ["## Questions aside", markdown_table(table(pd.concat([rows[first], aside]))), ON_ASIDE]
    write_report(NAME, "Filtered, weighted, shaped, shielded", sections)


if __name__ == "__main__":
    main()
