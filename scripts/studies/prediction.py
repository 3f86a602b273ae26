"""Which score, computed before training, predicts what a DPO run does to the features?

    python scripts/studies/prediction.py

In the lab: worlds of five seeds, four planted behaviours each. Scores of an audit, against the change of every feature's mean
activation in the run, as the trained model reads held-out answers and as it writes its own.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import RAW, Cell, markdown_table, new_figure, save_figure, write_report
from lab_scores import (
    NAMES,
    along_random_directions,
    audited,
    planted_pairs,
    scores_of,
    study,
    swapped,
)
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import TrainerCallback

from trl_sae_audit import FeatureDictionary, load_dictionary, verify
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.pretraining import plain_texts
from trl_sae_audit.lab.sparse_coding import hook_point, token_activations, train_dictionary
from trl_sae_audit.lab.training import dpo_arguments, train_dpo
from trl_sae_audit.realised import (
    AnswerActivations,
    RealisedChange,
    answer_activations,
    sampled_activations,
)
from trl_sae_audit.sampling import Sampling
from trl_sae_audit.statistics import bootstrap_interval

NAME = "prediction"
PLANTS = ("agrees", "padded", "marked", "echoes")
STRENGTH, STEPS = 0.7, 40
OVER_TRAINING = (10, 40, 160)
HELD_OUT_PAIRS, HELD_OUT_PROMPTS = 250, 500
WRITING = Sampling(answers=4, max_new_tokens=56, seed=2)
READ, WRITTEN = "teacher-forced", "sampled"
ONE_RUN, MEAN_RUN = "one run", "mean of the runs"
SEVERAL = {0: 3, 3: 3, 2: 2, 1: 2, 4: 2}
"""Of which of the first worlds there are how many runs, those first whose runs agree most and least."""
AS_IT_IS, LORA = "as it is", "LoRA of rank 8"
FINELY, GENTLY = f"{LORA}, rehearsed in {STEPS // 2} long steps", f"{LORA}, a third of the learning rate"
LAYERS = {"dictionary at layer 0": 0, "dictionary at layer 2": 2}
"""What else is tried in some worlds. Of the three layers the world's own dictionary has the middle one."""
LORA_LEARNING_RATE = 3e-3
SWAPPED, SECOND_RUN, RANDOM_DIRECTIONS = ", labels swapped", "a second run", "attribution, random directions"
BATCH = 64


def cells(seeds: int) -> list[Cell]:
    """One run a world, all seeds and behaviours early; of the first worlds several runs, which differ in the order of the
    pairs, and the control; the other worlds; in two worlds a longer run, looked at three times; in the first three LoRA,
    and dictionaries of other layers."""
    worlds = [
        {"seed": seed, "plant": PLANTS[(seed + shift) % len(PLANTS)], "steps": [STEPS]}
        for shift in range(len(PLANTS))
        for seed in range(seeds)
    ]
    several = [
        {**worlds[place], "runs": runs, "control": True} for place, runs in SEVERAL.items() if place < seeds
    ]
    longer = [
        {"seed": seed, "plant": "agrees", "steps": list(OVER_TRAINING)} for seed in range(min(seeds, 2))
    ]
    others = [
        {**world, "variant": variant}
        for variant in (LORA, *LAYERS, FINELY, GENTLY)
        for world in worlds[: min(seeds, 3)]
    ]
    return worlds[:seeds] + several + worlds[seeds:] + longer + others


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    """Scores before training, one run or several, and how well each score predicted them at each length.

    A row a score and target. `of` says what is predicted: the first run, or what the runs have in common, their mean. `shared`
    is the R² with it that a score could have which knows what all such runs have in common.
    """
    meter = _meter(cell["seed"], cell.get("variant", AS_IT_IS))
    world, dictionary = meter.world, meter.dictionary
    pairs = planted_pairs(world, cell["plant"], STRENGTH)
    name = f"{cell['plant']}-{STRENGTH}{meter.suffix}"
    runs = [meter.changes(pairs, name, cell["steps"], order) for order in range(cell.get("runs", 1))]
    for steps in cell["steps"]:
        options = {"model": meter.model(), "rehearse_parts": meter.parts, **meter.arguments}
        audit = audited(world, pairs, name, dictionary, steps, **options)
        scores = scores_of(audit) | {RANDOM_DIRECTIONS: along_random_directions(audit, cell["seed"])}
        if cell.get("control"):
            others = swapped(pairs, cell["seed"])
            control = audited(world, others, f"{cell['plant']}-swapped{meter.suffix}", dictionary, steps)
            scores |= {name + SWAPPED: value for name, value in scores_of(control).items()}
        for changes in zip(*(made[steps] for made in runs), strict=True):
            yield from _compared(scores, changes, steps)


def _compared(
    scores: dict[str, np.ndarray], changes: Sequence[RealisedChange], steps: int
) -> Iterable[dict[str, Any]]:
    """Scores against the first of some runs, and against their mean."""
    targets = [(ONE_RUN, changes[0], scores, np.nan)]
    if len(changes) > 1:
        again = agreement(changes)
        of_mean = len(changes) * again / (1 + (len(changes) - 1) * again)
        targets = [
            (ONE_RUN, changes[0], scores | {SECOND_RUN: changes[1].change}, again),
            (MEAN_RUN, mean_change(changes), scores, of_mean),
        ]
    for of, target, known, shared in targets:
        found = verify(known, target, draws=200)
        for row in found.table.to_dict("records"):
            yield {
                "run_steps": steps,
                "target": target.kind,
                "of": of,
                "ceiling": found.ceiling,
                "shared": shared,
                "features": len(found.features),
                **{str(key): value for key, value in row.items()},
            }


def agreement(changes: Sequence[RealisedChange]) -> float:
    """The mean correlation of the changes that different runs make, over the features.

    If a run's change is what all runs have in common plus what is its own, this is the part of its variance that is
    common: the R² of the common part with the change in one run. Of the mean of n runs it is, by Spearman and Brown, n·r / (1 + (n − 1)·r).
    """
    counted = np.any([change.active for change in changes], axis=0)
    table = np.corrcoef([change.change[counted] for change in changes])
    return float(table[np.triu_indices(len(changes), 1)].mean())


def mean_change(changes: Sequence[RealisedChange]) -> RealisedChange:
    """The change of the runs taken together: all that they write, or read, after training."""
    after = [change.after for change in changes]
    return RealisedChange(
        changes[0].kind,
        changes[0].before,
        AnswerActivations(
            np.sum([each.sums for each in after], axis=0),
            np.sum([each.tokens for each in after], axis=0),
            after[0].prompts,
            np.any([each.active for each in after], axis=0),
        ),
    )


@lru_cache(maxsize=1)
def _meter(seed: int, variant: str) -> Meter:
    return Meter(build_world(seed, progress=False), variant)


def dictionary_at(world: World, layer: int) -> FeatureDictionary:
    """A dictionary like the world's own, of another layer; trained once."""
    directory = RAW / "dictionaries" / f"{world.config.seed}-{layer}"
    if not directory.exists():
        config = replace(world.config.dictionary, layer=layer)
        texts = plain_texts(world.language, config.texts, world.config.seed + 1)
        activations, _ = token_activations(world.model(), world.tokenizer, hook_point(layer), *texts)
        train_dictionary(config, activations, world.config.seed, directory)
    return load_dictionary(directory)


class Meter:
    """Measures what runs in a world change; what the model before does is measured once."""

    def __init__(self, world: World, variant: str = AS_IT_IS) -> None:
        self.world = world
        self.suffix = "" if variant == AS_IT_IS else "-" + variant.replace(",", "").replace(" ", "-")
        self.lora = variant.startswith(LORA)
        rate = LORA_LEARNING_RATE / (3 if variant == GENTLY else 1)
        self.arguments = {"learning_rate": rate} if self.lora else {}
        self.parts = STEPS // 2 if variant == FINELY else None
        self.dictionary = (
            dictionary_at(world, LAYERS[variant])
            if variant in LAYERS
            else load_dictionary(world.dictionary_path)
        )
        self.before = world.model()
        seed = world.config.seed
        self.pairs = world.preferences({}, HELD_OUT_PAIRS, 300 + seed, split="heldout")
        self.prompts = world.prompts(HELD_OUT_PROMPTS, 400 + seed, split="heldout")
        self.read_before = self._reads(self.before)
        self.written_before = self._writes(self.before)

    def model(self) -> Any:
        """What a run trains: the world's model, or a new adapter on it."""
        if not self.lora:
            return self.world.model()
        torch.manual_seed(self.world.config.seed)
        adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(self.world.model(), adapter)

    def changes(
        self, pairs: Any, name: str, lengths: list[int], order: int
    ) -> dict[int, list[RealisedChange]]:
        """One run as long as the longest of `lengths`, looked at after each: reading and writing.

        What a run does is kept in `runs/studies/changes`; asked for again, it costs nothing.
        """
        start = f"{name}-{self.world.config.seed}-{order}"
        places = {steps: RAW / "changes" / f"{start}-{steps}.safetensors" for steps in lengths}
        if not all(place.exists() for place in places.values()):
            kept = _Snapshots(lengths)
            with tempfile.TemporaryDirectory() as scratch:
                args = dpo_arguments(scratch, max(lengths), order, **self.arguments)
                train_dpo(self.world, pairs, args, callbacks=[kept], model=self.model())
            for steps, place in places.items():
                after = self.model()
                # of LoRA the trainer keeps a second adapter, its reference
                after.load_state_dict({key: kept.states[steps][key] for key in after.state_dict()})
                after.eval()
                keep(place, {READ: self._reads(after), WRITTEN: self._writes(after)})
        before = {READ: self.read_before, WRITTEN: self.written_before}
        return {
            steps: [
                RealisedChange(kind, before[kind], after) for kind, after in kept_at(place, before).items()
            ]
            for steps, place in places.items()
        }

    def _reads(self, model: Any) -> AnswerActivations:
        return answer_activations(model, self.world.tokenizer, self.dictionary, self.pairs, batch_size=BATCH)

    def _writes(self, model: Any) -> AnswerActivations:
        return sampled_activations(
            model,
            self.before,
            self.world.tokenizer,
            self.dictionary,
            self.prompts,
            sampling=WRITING,
            batch_size=250,
        )


def keep(place: Path, found: dict[str, AnswerActivations]) -> None:
    """Write activations, by name, to a file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    parts = ("sums", "tokens", "active")
    save_file(
        {f"{kind} {part}": getattr(each, part) for kind, each in found.items() for part in parts}, place
    )


def kept_at(place: Path, before: dict[str, AnswerActivations]) -> dict[str, AnswerActivations]:
    """What `keep` wrote there; of the same prompts as `before`."""
    arrays = load_file(place)
    return {
        kind: AnswerActivations(
            arrays[f"{kind} sums"], arrays[f"{kind} tokens"], each.prompts, arrays[f"{kind} active"]
        )
        for kind, each in before.items()
    }


class _Snapshots(TrainerCallback):
    """Keeps the weights after some steps."""

    def __init__(self, steps: list[int]) -> None:
        self.steps = set(steps)
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.states[state.global_step] = {
                name: value.detach().clone() for name, value in model.state_dict().items()
            }


# What it shows

ORDER = [
    *NAMES.values(),
    *(name + SWAPPED for column, name in NAMES.items()),
    RANDOM_DIRECTIONS,
    "random",
    SECOND_RUN,
]


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a score: mean over the worlds of each statistic with its interval, for reading and writing."""
    lines = []
    for score in [name for name in ORDER if name in set(rows["score"])]:
        line = {"score": score}
        for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
            part = rows[(rows["score"] == score) & (rows["target"] == target)]
            interval = bootstrap_interval(part["r2"].to_numpy())
            around = f"{interval.low:.2f} to {interval.high:.2f}" if len(part) > 1 else "one world"
            line[f"{heading}: R²"] = f"{interval.estimate:.2f} ({around})"
            for statistic, label in (("spearman", "ρ"), ("precision", "top 20")):
                line[f"{heading}: {label}"] = f"{part[statistic].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def leads(rows: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """By how much the best score is ahead of others in the same worlds, and how often."""
    lines = []
    for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
        wide = rows[rows["target"] == target].pivot_table(
            index=["seed", "plant"], columns="score", values="r2"
        )
        ours = wide[best[target]]
        others = [
            "disparity",
            "mean activation difference",
            "attribution",
            "activation attribution",
            f"lookahead, {heading}",
            f"rehearsal, {heading}",
            best[target] + SWAPPED,
        ]
        for other in [name for name in others if name != best[target]]:
            gap = (ours - wide[other]).dropna().to_numpy()
            interval = bootstrap_interval(gap)
            lines.append(
                {
                    "": heading,
                    "R² of": best[target],
                    "less that of": other,
                    "mean over worlds": f"{interval.estimate:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})"
                    if len(gap) > 1
                    else f"{interval.estimate:+.2f}",
                    "worlds in which it is ahead": f"{(gap > 0).sum()} of {len(gap)}",
                }
            )
    return pd.DataFrame(lines)


def by_world(rows: pd.DataFrame, target: str, scores: list[str]) -> pd.DataFrame:
    """R² in every world, with its interval over prompts, and the most that could be reached."""
    lines = []
    ours = rows[rows["target"] == target]
    for _, both in ours.groupby(["seed", "plant"], sort=True):
        world, common = both[both["of"] == ONE_RUN], both[both["of"] == MEAN_RUN].set_index("score")
        by_score, first = world.set_index("score"), world.iloc[0]
        line: dict[str, Any] = {"world": f"{first['plant']}, seed {first['seed']}"}
        for score in [name for name in scores if name in by_score.index]:
            value, low, high = by_score.loc[score, ["r2", "r2_low", "r2_high"]].to_numpy(np.float64)
            line[score] = f"{value:.2f} ({low:.2f} to {high:.2f})"
        line["slope of the first"] = f"{float(world[world['score'] == scores[0]]['slope'].iloc[0]):.2f}"
        line["given the prompts"] = f"{float(first['ceiling']):.2f}"
        if len(common):
            line["what runs share"] = f"{world['shared'].max():.2f}"
            line["the first, of the mean run"] = f"{common.loc[[scores[0]], 'r2'].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def over_training(rows: pd.DataFrame) -> pd.DataFrame:
    """R² by length of the run, mean over its worlds."""
    shown = [name for name in NAMES.values() if name in set(rows["score"])]
    lines = []
    for score in shown:
        line = {"score": score}
        for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
            for steps in OVER_TRAINING:
                part = rows[
                    (rows["score"] == score) & (rows["target"] == target) & (rows["run_steps"] == steps)
                ]
                line[f"{heading}, {steps} steps"] = f"{part['r2'].mean():.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def by_variant(rows: pd.DataFrame) -> pd.DataFrame:
    """R² of the scores in the worlds in which something else was tried, and as it is in these; means over the worlds."""
    tried = rows[rows["variant"] != AS_IT_IS]
    worlds = tried[["seed", "plant"]].drop_duplicates()
    same = rows[(rows["variant"] == AS_IT_IS) & (rows["length"] == 1)].merge(worlds)
    lines = []
    for variant, part in [(AS_IT_IS, same), *tried.groupby("variant", sort=False)]:
        line = {"": str(variant)}
        for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
            found = part[part["target"] == target].groupby("score")["r2"].mean()
            for score in ("attribution", f"lookahead, {heading}", f"rehearsal, {heading}"):
                line[f"{heading}: {score.split(',')[0]}"] = f"{found[score]:.2f}"
            if target == WRITTEN:
                line["writing: mean activation difference"] = f"{found['mean activation difference']:.2f}"
        lines.append(line)
    return pd.DataFrame(lines)


def figure(rows: pd.DataFrame) -> str:
    """R² of every score in every world, reading and writing."""
    scores = [name for name in ORDER if name in set(rows["score"]) and SWAPPED not in name]
    scores += [name + SWAPPED for name in ("rehearsal, reading", "rehearsal, writing")]
    drawing, axes = new_figure(2, width=5.2, height=4.2)
    for axis, target, title in zip(axes, (READ, WRITTEN), ("how it reads", "what it writes"), strict=True):
        for place, score in enumerate(reversed(scores)):
            values = rows[(rows["score"] == score) & (rows["target"] == target)]["r2"]
            control = SWAPPED in score or score in ("random", RANDOM_DIRECTIONS, SECOND_RUN)
            color = "0.6" if control else "C0"
            axis.plot(values, np.full(len(values), place), "o", color=color, alpha=0.35, markersize=4)
            axis.plot([values.mean()], [place], "|", color=color, markersize=14, markeredgewidth=2)
        axis.set_yticks(range(len(scores)), list(reversed(scores)) if axis is axes[0] else [])
        axis.set_xlim(-0.02, 1.02)
        axis.set_title(title)
        axis.set_xlabel("R² with the change in training")
    return save_figure(
        drawing, NAME, "R² of each score with the realised change, one dot a world; the bar is the mean"
    )


def attainable(rows: pd.DataFrame, best: dict[str, str]) -> pd.DataFrame:
    """Beside the R² of the best score what could be reached, of one run and of the mean of some; means over the worlds."""
    lines = []
    for target, heading in ((READ, "reading"), (WRITTEN, "writing")):
        for of in (ONE_RUN, MEAN_RUN):
            part = rows[(rows["target"] == target) & (rows["of"] == of)]
            ours = part[part["score"] == best[target]]
            second = part[part["score"] == SECOND_RUN]
            line = {"": heading, "predicted": of, "score": best[target]}
            for label, values in (
                ("R²", ours["r2"]),
                ("what runs share", ours["shared"]),
                ("R² / shared", ours["r2"] / ours["shared"]),
                *([("R² of a second run", second["r2"])] if len(second) else []),
            ):
                interval = bootstrap_interval(values.to_numpy())
                line[label] = f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
            lines.append(line)
    return pd.DataFrame(lines).fillna("")


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Of a world with one run and with several, the rows of the several, which have the one among them."""
    if "of" not in rows:
        rows = rows.assign(of=ONE_RUN, shared=np.nan)
    if "variant" not in rows:
        rows = rows.assign(variant=AS_IT_IS)
    rows = rows.assign(
        of=rows["of"].fillna(ONE_RUN),
        variant=rows["variant"].fillna(AS_IT_IS),
        length=rows["steps"].map(len),
    )
    return rows.drop_duplicates(
        ["seed", "plant", "variant", "length", "run_steps", "target", "of", "score"], keep="last"
    )


def report(rows: pd.DataFrame) -> None:
    """Write docs/studies/prediction.md."""
    every = latest(rows)
    rows = every[every["variant"] == AS_IT_IS]
    longer = rows["steps"].map(len) > 1
    everything, long = rows[~longer], rows[longer & (rows["of"] == ONE_RUN)]
    short = everything[everything["of"] == ONE_RUN]
    means = short.groupby(["target", "score"])["r2"].mean()
    predictors = list(NAMES.values())
    best = {target: means[target][predictors].idxmax() for target in (READ, WRITTEN)}
    worlds = short.groupby(["seed", "plant"]).ngroups
    controlled = short[short["score"] == best[READ] + SWAPPED].groupby(["seed", "plant"]).ngroups
    several = everything[everything["shared"].notna()]
    sections = [
        f"{worlds} worlds ({short['seed'].nunique()} seeds × {short['plant'].nunique()} planted behaviours, each planted in "
        f"{STRENGTH:.0%} of 640 pairs in half of which a right answer wins). A DPO run of {STEPS} AdamW steps of 16 pairs with "
        "TRL; the scores are computed before it. Target: the change of each feature's mean activation on "
        f"{HELD_OUT_PAIRS} held-out pairs that both checkpoints *read*, and on four answers each that both *write* at "
        f"{HELD_OUT_PROMPTS} held-out prompts, read by the model before. Numbers are means over the worlds; in brackets "
        "bootstrap intervals over worlds. [verify.md](../verify.md) defines R², ρ and top 20; a score that says up where the "
        "change is down has R² 0.",
        figure(short),
        markdown_table(table(short)),
        "*Labels swapped*: the same scores, from the same pairs with chosen and rejected exchanged in a random half "
        f"({controlled} worlds). *A second run*: the change in a run that differs in the order of the pairs only. "
        "*Lookahead*: first order in one usual step. *Rehearsal*: long steps of ten usual ones, as far as the run's end.",
        "What they cost, in gradients of a pair: attribution and the lookahead 640 each, once for every pair, however long the run; the "
        f"rehearsal as many as the run, which in one of {STEPS} steps is 640 as well.",
        "## What can be foretold",
        "Runs that differ in nothing but the order of the pairs do not change features alike. What they have in common is all that can "
        "be known before one of them: *what runs share* is their mean correlation over features, the R² of the common part with one "
        "run, and of the mean of several runs what Spearman and Brown's formula makes of it. It holds sampling noise as well.",
        f"{several.groupby(['seed', 'plant']).ngroups} worlds:",
        markdown_table(attainable(several, best)),
        "## Ahead of the others",
        markdown_table(leads(short, best)),
        "## World by world",
        "R² with intervals over prompts: within one run, scores are apart where these are. The slope is 1 where sizes are right as "
        "well. *What runs share*: see above; *given the prompts*: the R² to expect of a perfect score of this one run, given the number "
        "of prompts. *Of the mean run*: of two or three runs together. Empty where there was one run.",
        "Reading:",
        markdown_table(
            by_world(everything, READ, [best[READ], "disparity", best[READ] + SWAPPED, SECOND_RUN])
        ),
        "Writing:",
        markdown_table(
            by_world(
                everything,
                WRITTEN,
                [best[WRITTEN], "mean activation difference", best[WRITTEN] + SWAPPED, SECOND_RUN],
            )
        ),
    ]
    if len(long):
        sections += [
            "## Over training",
            f"{long['seed'].nunique()} worlds with `agrees`, R² after 10, 40 and 160 steps of one run (160 are four "
            "epochs); rehearsals of as many steps.",
            markdown_table(over_training(long)),
        ]
    tried = every[every["variant"] != AS_IT_IS]
    if len(tried):
        sections += [
            "## LoRA, and other layers",
            f"R² in the same {tried.groupby(['seed', 'plant']).ngroups} worlds. LoRA is trained at a learning rate of {LORA_LEARNING_RATE:g}. The model has layers 0 to 2; the world's "
            "dictionary is of layer 1, and those of the others are trained as it is.",
            markdown_table(by_variant(every[every["of"] == ONE_RUN])),
        ]
    write_report(NAME, "Which score predicts what training does?", sections)


def main() -> None:
    study(__doc__, NAME, cells, run, report)


if __name__ == "__main__":
    main()
