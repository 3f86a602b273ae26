"""Do the scores find what was planted? Ranks of the features that carry a planted behaviour, and false flags.

    python scripts/studies/recovery.py

In the lab, where the features that carry a behaviour are known from activations and rules, without any gradient.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from functools import lru_cache
from math import comb
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
from common import Cell, markdown_table, new_figure, save_figure, write_report
from datasets import Dataset
from lab_scores import PAIRS, planted_pairs, study, swapped

from trl_sae_audit import Audit, FeatureDictionary, audit_preferences, load_dictionary
from trl_sae_audit.audit.rewards import answer_ids
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.evaluation import wilson_interval
from trl_sae_audit.lab.training import dpo_arguments
from trl_sae_audit.models.batches import answer_batches
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states

NAME = "recovery"
SCORES = {
    "effect_size": "effect size (the default)",
    "selection": "selection",
    "projection_difference": "projection difference",
    "predicted_change_in_generations": "lookahead, in generations",
    "predicted_frequency_change": "lookahead, frequency",
    "disparity": "disparity",
    "mean_activation_difference": "mean activation difference",
    "attribution": "attribution",
    "activation_attribution": "activation attribution",
}
"""The scores, by their column in an audit."""
GOALS = {0.7: 14, 0.5: 14, 0.2: 14, 0.1: 12, 0.05: 8}
"""Sets of fifteen in which the default ranking is to have a carrier among the first three, by planted share."""
CHOSEN_ON = (0, 1)
"""Seeds on which the effect size's unit was chosen."""
PLANTS = ("agrees", "padded", "marked")
DEFAULT, HALF = 0.7, 0.5
SMALL = (0.2, 0.1, 0.05)
TOP = 3
SHUFFLES = 4
Q = 0.05


def cells(seeds: int) -> list[Cell]:
    """The default strength, the null, half of the pairs, and ever smaller shares."""
    worlds = [(seed, plant) for seed in range(seeds) for plant in PLANTS]

    def planted(strength: float) -> list[Cell]:
        return [{"seed": seed, "plant": plant, "strength": strength} for seed, plant in worlds]

    null = [{"seed": seed, "plant": "nothing", "strength": 0.0} for seed in range(seeds)]
    return planted(DEFAULT) + null + planted(HALF) + [cell for share in SMALL for cell in planted(share)]


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    """Of a planted set, the rank of each carrier by each score; of one without labels, what is flagged all the same."""
    world = build_world(cell["seed"], progress=False)
    dictionary = load_dictionary(world.dictionary_path)
    if cell["plant"] == "nothing":
        return _false_flags(world, dictionary)
    strength, plant = cell["strength"], cell["plant"]
    audit = _by_default(world, planted_pairs(world, plant, strength), f"{plant}-{strength}", dictionary)
    carriers, right = world.carriers(plant), set(world.carriers("right"))
    flagged = set(audit.beyond_chance()["feature"])
    rows = []
    for name, score in _scores_of(audit).items():
        order = np.argsort(-score, kind="stable")
        ranks = {int(feature): place + 1 for place, feature in enumerate(order)}
        top = [int(feature) for feature in order[:TOP]]
        rows.append(
            {
                "score": name,
                "rank": min(ranks[feature] for feature in carriers),
                "median_rank": float(np.median([ranks[feature] for feature in carriers])),
                "carriers": len(carriers),
                "in_top": sum(feature in carriers or feature in right for feature in top),
                "features": len(score),
                "active_before": _share_before(cell["seed"], top) if plant == "agrees" else None,
                "flagged": len(flagged) if name == SCORES["effect_size"] else None,
                "flagged_carriers": len(flagged & set(carriers)) if name == SCORES["effect_size"] else None,
                "data_say": _selected_for(audit, carriers) if name == SCORES["effect_size"] else None,
                "first_have": _behaviour_in(world, plant, top) if name == SCORES["effect_size"] else None,
            }
        )
    return rows


def _by_default(world: World, pairs: Dataset, name: str, dictionary: FeatureDictionary) -> Audit:
    """An audit as users have it, kept in `runs/studies/audits/default-NAME-SEED`."""
    with tempfile.TemporaryDirectory() as scratch:
        return audit_preferences(
            world.model(),
            world.tokenizer,
            pairs,
            dictionary,
            args=dpo_arguments(scratch, seed=world.config.seed),
            batch_size=32,
            output_dir=_directory(name, world.config.seed),
            progress=False,
        )


def _directory(name: str, seed: int) -> Path:
    return common.RAW / "audits" / f"default-{name}-{seed}"


def _scores_of(audit: Audit) -> dict[str, np.ndarray]:
    """Every score, in the order of the features: name → [d_sae]; -inf where it is not known, in features that no answer has."""
    table = audit.features().set_index("feature").sort_index()
    return {name: table[column].fillna(-np.inf).to_numpy(np.float64) for column, name in SCORES.items()}


def _selected_for(audit: Audit, carriers: list[int]) -> float:
    """The carriers' largest selection, in standard errors: whether these pairs ask for the behaviour at all."""
    table = audit.features().set_index("feature").loc[carriers]
    return float((table["selection"] / table["selection_standard_error"]).max())


def _behaviour_in(world: World, plant: str, features: list[int]) -> list[float]:
    """Of the answers in which each feature is active, the share that have the behaviour; last the share of all answers."""
    truth = world.ground_truth
    table = truth[truth["behaviour"] == plant].set_index("feature")
    of_all = float((table["precision"] * table["frequency"] / table["recall"]).median())
    return [*map(float, table["precision"][features]), of_all]


def _share_before(seed: int, features: list[int]) -> float:
    """How much of the activation of some features lies on the token at which an answer's first word is chosen, the prompt's
    last: its share of that on the prompt's last token and the answer, over held-out texts."""
    before, total = _activity(seed)
    return float(before[features].sum() / max(total[features].sum(), 1e-12))


@lru_cache(maxsize=1)
def _activity(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Activation on the prompt's last token, and on that and the answer: [d_sae] each."""
    world = build_world(seed, progress=False)
    dictionary = load_dictionary(world.dictionary_path)
    pairs = world.preferences({}, 100, 900, split="heldout")
    ids = [
        answer_ids(world.tokenizer, prompt, answer)
        for prompt, answer in zip(pairs["prompt"], pairs["chosen"], strict=True)
    ]
    point = resolve_hook_point(world.model(), dictionary.hook_names)
    before, total = np.zeros(dictionary.d_sae), np.zeros(dictionary.d_sae)
    for places, batch in answer_batches(world.tokenizer, ids, 50):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        active = dictionary.encode(hidden_states(point, inputs)).numpy()
        for row, place in enumerate(places):
            last = len(ids[place][0]) - 1
            before += active[row, last]
            total += active[row, last : last + 1 + len(ids[place][1])].sum(0)
    return before, total


def _false_flags(world: World, dictionary: FeatureDictionary) -> list[dict[str, Any]]:
    """Where labels say nothing every flag is false: answers drawn alike for both sides, and a planted set with its labels
    exchanged in a random half of the pairs, `SHUFFLES` times."""
    seed = world.config.seed
    sets = {"alike": world.preferences({}, PAIRS, seed)}
    planted = planted_pairs(world, "agrees", DEFAULT)
    sets |= {f"exchanged-{n}": swapped(planted, SHUFFLES * seed + n) for n in range(SHUFFLES)}
    rows = []
    for name, pairs in sets.items():
        audit = _by_default(world, pairs, name, dictionary)
        flagged = len(audit.beyond_chance())
        rows.append({"score": name.split("-")[0], "flagged": flagged, "features": audit.dictionary.d_sae})
    return rows


# What it shows


def by_chance(rows: pd.DataFrame) -> float:
    """Probability that one of the carriers is among three features drawn at random, mean over the worlds."""
    return float(
        np.mean(
            [
                1 - comb(int(n) - int(c), TOP) / comb(int(n), TOP)
                for n, c in zip(rows["features"], rows["carriers"], strict=True)
            ]
        )
    )


def default_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a score: how often a carrier is in the top three, by behaviour and in all."""
    lines = []
    for name in [name for name in SCORES.values() if name in set(rows["score"])]:
        part = rows[rows["score"] == name]
        hits, n = int((part["rank"] <= TOP).sum()), len(part)
        low, high = wilson_interval(hits, n)
        line = {"score": name, f"a carrier in the top {TOP}": f"{hits} of {n} ({low:.0%} to {high:.0%})"}
        line["in the first place"] = f"{int((part['rank'] == 1).sum())} of {n}"
        line[f"of the top {TOP}, carriers or right"] = f"{part['in_top'].mean() / TOP:.0%}"
        line["rank of the best carrier: median"] = f"{part['rank'].median():.0f}"
        line["worst"] = f"{part['rank'].max():.0f}"
        for plant in PLANTS:
            of_plant = part[part["plant"] == plant]["rank"]
            line[plant] = f"{int((of_plant <= TOP).sum())} of {len(of_plant)}"
        lines.append(line)
    one = rows[rows["score"] == rows["score"].iloc[0]]
    chance: dict[str, Any] = {"score": "by chance", f"a carrier in the top {TOP}": f"{by_chance(one):.0%}"}
    for plant in PLANTS:
        chance[plant] = f"{by_chance(one[one['plant'] == plant]):.0%}"
    return pd.DataFrame([*lines, chance]).fillna("")


def share_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of worlds with a carrier in the top three, by strength."""
    lines = []
    for name in [name for name in SCORES.values() if name in set(rows["score"])]:
        line = {"score": name}
        for strength in sorted(rows["strength"].unique(), reverse=True):
            part = rows[(rows["score"] == name) & (rows["strength"] == strength)]
            if len(part):
                line[f"{strength:.0%}"] = f"{int((part['rank'] <= TOP).sum())} of {len(part)}"
        lines.append(line)
    goals = {
        f"{strength:.0%}": f"{GOALS[strength]}"
        for strength in sorted(rows["strength"].unique(), reverse=True)
    }
    return pd.DataFrame([*lines, {"score": "goal, of 15"} | goals]).fillna("")


def missed_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The sets in which the default ranking has no carrier among the first three."""
    part = rows[(rows["score"] == SCORES["effect_size"]) & (rows["rank"] > TOP)]
    return pd.DataFrame(
        {
            "planted": part["plant"],
            "share": [f"{strength:.0%}" for strength in part["strength"]],
            "world": part["seed"],
            "rank of the best carrier": part["rank"],
            "its selection, in standard errors": [f"{value:+.1f}" for value in part["data_say"]],
            "of the answers in which its first three are active, have the behaviour": [
                ", ".join(f"{share:.0%}" for share in shares[:-1]) for shares in part["first_have"]
            ],
            "of all answers": [f"{shares[-1]:.0%}" for shares in part["first_have"]],
        }
    )


def figure(rows: pd.DataFrame) -> str:
    """Rank of the best carrier against the planted share."""
    drawing, axes = new_figure(len(PLANTS), width=3.6, height=3.2)
    for axis, plant in zip(axes, PLANTS, strict=True):
        for column in ("effect_size", "selection", "projection_difference", "disparity", "attribution"):
            name = SCORES[column]
            part = rows[(rows["plant"] == plant) & (rows["score"] == name)]
            middle = part.groupby("strength")["rank"].median()
            axis.plot(middle.index, middle, "o-", label=name, markersize=4)
        axis.axhline(TOP, color="0.6", linewidth=0.8, linestyle="--")
        axis.set_yscale("log")
        axis.set_title(f"planted: {plant}")
        axis.set_xlabel("share of pairs it is planted in")
    axes[0].set_ylabel("rank of the best carrier, median")
    axes[0].legend(fontsize=7)
    return save_figure(
        drawing, NAME, "Median rank of the best carrier against the planted share, by behaviour and score"
    )


def ranks_figure(rows: pd.DataFrame) -> str:
    """Rank of the best carrier by every score, a dot a world."""
    shown = [name for name in SCORES.values() if name in set(rows["score"])]
    drawing, (axis,) = new_figure(1, width=7.0, height=3.4)
    for shift, plant in zip((-0.2, 0.0, 0.2), PLANTS, strict=False):
        part = rows[rows["plant"] == plant]
        places = [len(shown) - 1 - shown.index(name) + shift for name in part["score"]]
        axis.plot(part["rank"], places, "o", label=plant, alpha=0.6, markersize=4)
    axis.axvline(TOP + 0.5, color="0.6", linewidth=0.8, linestyle="--")
    axis.set_xscale("log")
    axis.set_yticks(range(len(shown)), list(reversed(shown)))
    axis.set_xlabel("rank of the best carrier among 256 features")
    axis.legend(title="planted")
    return save_figure(drawing, NAME, "Rank of the best carrier by every score, one dot a world")


def report(rows: pd.DataFrame) -> None:
    """Write docs/studies/recovery.md."""
    planted, null = rows[rows["plant"] != "nothing"], rows[rows["plant"] == "nothing"]
    strong = planted[planted["strength"] >= HALF]
    default = planted[planted["strength"] == DEFAULT]
    sections = [
        f"Preference sets of {PAIRS} pairs in which a right answer wins in half of the pairs and a planted behaviour in a stated share; "
        f"{planted['seed'].nunique()} worlds × {planted['plant'].nunique()} behaviours a share. Each is audited by default: prompts held out of "
        "the pairs, four answers each. The truth: the features that *carry* the behaviour, by their activations on held-out answers and the "
        f"rules of the language (`trl_sae_audit.lab.ground_truth`; between {planted['carriers'].min():.0f} and "
        f"{planted['carriers'].max():.0f} of {planted['features'].max():.0f} features). Asked: is one of them among the three features with "
        "the largest score?",
        *_shares(planted),
        "## Half of the pairs and more",
        markdown_table(default_table(strong)),
        "By chance: three features drawn at random; padding has many carriers. *Carriers or right*: of the three features, those "
        "that carry the planted behaviour or being right, which these data teach as well.",
        "## Where the first features are active",
        _why(default),
        "Attribution is the push along a direction, whether or not the feature is ever active, and at the token where a word is "
        "chosen. Only generations follow the push to the words it leads to.",
        "## False flags",
        *_flags(planted, null),
    ]
    write_report(NAME, "Do the scores find what was planted?", sections)


def _shares(planted: pd.DataFrame) -> list[str]:
    """How often by share, and what was missed."""
    if planted["strength"].nunique() == 1:
        return [ranks_figure(planted)]
    halves = [
        (f"the {len(CHOSEN_ON)} worlds on which its unit was chosen", planted["seed"].isin(CHOSEN_ON)),
        ("the others", ~planted["seed"].isin(CHOSEN_ON)),
    ]
    ours = planted[planted["score"] == SCORES["effect_size"]]
    found = ", ".join(
        f"{int((ours[here]['rank'] <= TOP).sum())} of {int(here[ours.index].sum())} in {name}"
        for name, here in halves
        if here[ours.index].any()
    )
    missed = missed_table(planted)
    return [
        figure(planted),
        markdown_table(share_table(planted)),
        f"The effect size finds a carrier in {found}. {_union(planted)}",
        *(
            [
                "What it does not find. Where the carriers' selection is not beyond about two standard errors, these pairs do not show the "
                "behaviour: by chance it is lost about as often as it wins. Where the first features are active mostly in answers that have "
                "the behaviour, they are of a part of it, or active in other answers too, and so do not count as carriers.",
                markdown_table(missed),
            ]
            if len(missed)
            else []
        ),
    ]


def _union(planted: pd.DataFrame) -> str:
    """In how many sets any of the scores has a carrier among its first three: no choice between them finds more."""
    best = planted.groupby(["strength", "plant", "seed"])["rank"].min().groupby("strength")
    found = ", ".join(
        f"{int((ranks <= TOP).sum())} of {len(ranks)} at {strength:.0%}"
        for strength, ranks in sorted(best, reverse=True)
    )
    return f"At least one of the scores of the table does in {found}: no choice between them for each set could find more."


def _why(default: pd.DataFrame) -> str:
    """Where the three features first by each score are active, against where the carriers are."""
    lines = []
    activity = _activity_of_top(default)
    before = default[default["plant"] == "agrees"].groupby("score")["active_before"].mean()
    for name in [name for name in SCORES.values() if name in activity]:
        lines.append(
            {
                "first by": name,
                "active in, of the answers": f"{activity[name]:.0%}",
                "on the prompt's last token, of their activation (agrees)": f"{before[name]:.0%}",
            }
        )
    lines.append(
        {"first by": "the carriers themselves", "active in, of the answers": f"{activity['carriers']:.0%}"}
    )
    return markdown_table(pd.DataFrame(lines).fillna(""))


def _activity_of_top(default: pd.DataFrame) -> dict[str, float]:
    """Share of the answers in which the first three features by each score are active, mean over the worlds."""
    found: dict[str, list[float]] = {}
    for seed, plant in default[["seed", "plant"]].drop_duplicates().itertuples(index=False):
        audit = Audit.load(_directory(f"{plant}-{DEFAULT}", seed))
        table = audit.features().set_index("feature").sort_index()
        active = ((table["chosen_active"] + table["rejected_active"]) / 2).to_numpy()
        for name, score in _scores_of(audit).items():
            found.setdefault(name, []).append(float(active[np.argsort(-score, kind="stable")[:TOP]].mean()))
        carriers = build_world(seed, progress=False).carriers(plant)
        found.setdefault("carriers", []).append(float(active[carriers].mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _flags(planted: pd.DataFrame, null: pd.DataFrame) -> list[str]:
    lines = []
    for kind, text in (
        ("alike", "both answers drawn alike"),
        ("exchanged", f"agreement planted at {DEFAULT:.0%}, labels exchanged at random"),
    ):
        part = null[null["score"] == kind]
        if len(part):
            hits = int((part["flagged"] > 0).sum())
            low, high = wilson_interval(hits, len(part))
            lines.append(
                {
                    "labels say nothing": text,
                    "audits": len(part),
                    "with any feature beyond chance": f"{hits} ({hits / len(part):.0%}; {low:.0%} to {high:.0%})",
                    "features beyond chance, of all": f"{int(part['flagged'].sum())} of {int(part['features'].sum())}",
                }
            )
    ours = planted[planted["score"] == SCORES["effect_size"]]
    by_share = (
        ours.groupby("strength")[["flagged", "flagged_carriers", "carriers"]]
        .mean()
        .sort_index(ascending=False)
    )
    told = pd.DataFrame(
        {
            "planted share": [f"{strength:.0%}" for strength in by_share.index],
            "features beyond chance": [f"{value:.1f}" for value in by_share["flagged"]],
            "of them carriers": [f"{value:.1f}" for value in by_share["flagged_carriers"]],
            "carriers in all": [f"{value:.1f}" for value in by_share["carriers"]],
        }
    )
    null_text = [
        f"`Audit.beyond_chance`: selection's sign-flip q below {Q:g}, and the effect's 95 % interval on the same side of 0. Where labels "
        f"say nothing, every flag is false, and at most {Q:.0%} of the audits should have one.",
        markdown_table(pd.DataFrame(lines)),
    ]
    return [
        *(null_text if lines else []),
        "In the planted sets, mean over the sets of a share:",
        markdown_table(told),
    ]


def main() -> None:
    study(__doc__, NAME, cells, run, report)


if __name__ == "__main__":
    main()
