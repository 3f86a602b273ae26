"""Do the scores find what was planted? Ranks of the features that carry a planted behaviour, and false flags.

    python scripts/studies/recovery.py

In the lab, where the features that carry a behaviour are known from activations and rules, without any gradient.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import comb
from typing import Any

import numpy as np
import pandas as pd
from common import Cell, markdown_table, new_figure, save_figure, write_report
from lab_scores import NAMES, audit_directory, audited, planted_pairs, scores_of, study

from trl_sae_audit import Audit, load_dictionary
from trl_sae_audit.hook_points import resolve_hook_point
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.evaluation import wilson_interval
from trl_sae_audit.residual_stream import hidden_states
from trl_sae_audit.rewards import answer_ids
from trl_sae_audit.sampling import answer_batches
from trl_sae_audit.statistics import benjamini_hochberg, sign_flip_p

NAME = "recovery"
PLANTS = ("agrees", "padded", "marked")
DEFAULT, HALF = 0.7, 0.5
SMALL = (0.2, 0.1, 0.05)
PROBE = 100
TOP = 3
SHUFFLES = 20
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
    pairs = planted_pairs(world, plant, strength)
    audit = audited(world, pairs, f"{plant}-{strength}-small", dictionary, None, PROBE)
    carriers, right = world.carriers(plant), set(world.carriers("right"))
    table = audit.features().set_index("feature").sort_index()
    rows = []
    for name, score in scores_of(audit).items():
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
                "flagged": int((table["q_value"] < Q).sum()) if name == NAMES["attribution"] else None,
                "flagged_carriers": int((table["q_value"] < Q)[carriers].sum())
                if name == NAMES["attribution"]
                else None,
            }
        )
    return rows


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
    point = resolve_hook_point(world.model(), dictionary.hook_point)
    before, total = np.zeros(dictionary.d_sae), np.zeros(dictionary.d_sae)
    for places, batch in answer_batches(world.tokenizer, ids, 50):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        active = dictionary.encode(hidden_states(point, inputs)).numpy()
        for row, place in enumerate(places):
            last = len(ids[place][0]) - 1
            before += active[row, last]
            total += active[row, last : last + 1 + len(ids[place][1])].sum(0)
    return before, total


def _false_flags(world: World, dictionary: Any) -> list[dict[str, Any]]:
    """Where labels say nothing every flag is false: answers drawn alike for both sides, and a planted set with its labels
    exchanged at random (which flips an example's contribution), `SHUFFLES` times."""
    seed = world.config.seed
    pairs = world.preferences({}, 640, seed)
    audit = audited(world, pairs, "nothing-small", dictionary, None, PROBE)
    table = audit.features()
    rows = [{"score": "alike", "flagged": int((table["q_value"] < Q).sum()), "features": len(table)}]
    pairs = planted_pairs(world, "agrees", DEFAULT)
    planted = audited(world, pairs, f"agrees-{DEFAULT}-small", dictionary, None, PROBE)
    contributions = planted.contributions(range(len(table)))
    generator = np.random.default_rng(seed)
    for shuffle in range(SHUFFLES):
        signs = generator.choice([-1.0, 1.0], len(contributions))[:, None]
        q = benjamini_hochberg(sign_flip_p(contributions * signs, n_flips=4999, seed=shuffle))
        rows.append({"score": "shuffled", "flagged": int((q < Q).sum()), "features": len(q)})
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
    for name in [name for name in NAMES.values() if name in set(rows["score"])]:
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
    one = rows[rows["score"] == NAMES["attribution"]]
    chance: dict[str, Any] = {"score": "by chance", f"a carrier in the top {TOP}": f"{by_chance(one):.0%}"}
    for plant in PLANTS:
        chance[plant] = f"{by_chance(one[one['plant'] == plant]):.0%}"
    return pd.DataFrame([*lines, chance]).fillna("")


def share_table(rows: pd.DataFrame) -> pd.DataFrame:
    """Share of worlds with a carrier in the top three, by strength."""
    lines = []
    for name in [name for name in NAMES.values() if name in set(rows["score"])]:
        line = {"score": name}
        for strength in sorted(rows["strength"].unique(), reverse=True):
            part = rows[(rows["score"] == name) & (rows["strength"] == strength)]
            if len(part):
                line[f"{strength:.0%}"] = f"{int((part['rank'] <= TOP).sum())} of {len(part)}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def figure(rows: pd.DataFrame) -> str:
    """Rank of the best carrier against the planted share."""
    drawing, axes = new_figure(len(PLANTS), width=3.6, height=3.2)
    for axis, plant in zip(axes, PLANTS, strict=True):
        for name in (
            "attribution",
            "activation attribution",
            "disparity",
            "mean activation difference",
            "lookahead, writing",
            "lookahead, presence",
        ):
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
    shown = [name for name in NAMES.values() if name in set(rows["score"])]
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
    worlds = strong.groupby(["seed", "plant", "strength"]).ngroups
    shares = " and ".join(f"{share:.0%}" for share in sorted(strong["strength"].unique()))
    sections = [
        f"Preference sets of 640 pairs in which a right answer wins in half of the pairs and a planted behaviour in a stated share; "
        f"{worlds} of them ({strong['seed'].nunique()} worlds × {len(PLANTS)} behaviours, shares of {shares}). "
        "The truth: the features that *carry* the behaviour, by their activations on held-out answers and the rules of the "
        "language (`trl_sae_audit.lab.ground_truth`; between 2 and 34 of 256 features). Asked: is one of them among the three "
        "features with the largest score? Echoing a wrong value has no carrier in any of these worlds, so it cannot be looked for.",
        markdown_table(default_table(strong)),
        "By chance: three features drawn at random; padding has many carriers. *Carriers or right*: of the three features, those "
        "that carry the planted behaviour or being right, which these data teach as well. The lookaheads look at "
        f"{PROBE} held-out prompts, with four answers each.",
        *_smaller(planted),
        "## Where the first features are active",
        _why(default),
        "Attribution is the push along a direction, whether or not the feature is ever active, and at the token where a word is "
        "chosen. Reading is the change on given text, where a behaviour that the model takes up more often is not seen. Only writing "
        "follows the push to the words it leads to. Carriers with small activations change the *mean* activation little; the share of "
        "answers in which a feature is *present* counts all features alike. It also comes closest to how the truth is defined, by "
        "whether a feature is active in an answer, and so does disparity.",
        "## False flags",
        *_flags(strong, null),
    ]
    write_report(NAME, "Do the scores find what was planted?", sections)


def _smaller(planted: pd.DataFrame) -> list[str]:
    if planted["strength"].nunique() == 1:
        return [ranks_figure(planted)]
    return ["## Smaller shares", figure(planted), markdown_table(share_table(planted))]


def _why(default: pd.DataFrame) -> str:
    """Where the three features first by each score are active, against where the carriers are."""
    lines = []
    activity = _activity_of_top(default)
    before = default[default["plant"] == "agrees"].groupby("score")["active_before"].mean()
    for name in [name for name in NAMES.values() if name in activity]:
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
        audit = Audit.load(audit_directory(f"{plant}-{DEFAULT}-small", seed, None))
        table = audit.features().set_index("feature").sort_index()
        active = ((table["chosen_active"] + table["rejected_active"]) / 2).to_numpy()
        for name, score in scores_of(audit).items():
            found.setdefault(name, []).append(float(active[np.argsort(-score, kind="stable")[:TOP]].mean()))
        carriers = build_world(seed, progress=False).carriers(plant)
        found.setdefault("carriers", []).append(float(active[carriers].mean()))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _flags(strong: pd.DataFrame, null: pd.DataFrame) -> list[str]:
    lines = []
    for kind, text in (
        ("alike", "both answers drawn alike"),
        ("shuffled", f"agreement planted at {DEFAULT:.0%}, labels exchanged at random"),
    ):
        part = null[null["score"] == kind]
        if len(part):
            hits = int((part["flagged"] > 0).sum())
            low, high = wilson_interval(hits, len(part))
            lines.append(
                {
                    "labels say nothing": text,
                    "audits": len(part),
                    f"with any feature at q < {Q:g}": f"{hits} ({hits / len(part):.0%}; {low:.0%} to {high:.0%})",
                    "features flagged, of all": f"{int(part['flagged'].sum())} of {int(part['features'].sum())}",
                }
            )
    ours = strong[strong["score"] == NAMES["attribution"]]
    null_text = [
        f"The q-value of attribution (sign-flip test, Benjamini–Hochberg). Where labels say nothing, every flag is false, and at "
        f"most {Q:.0%} of the audits should have one.",
        markdown_table(pd.DataFrame(lines)),
    ]
    return [
        *(null_text if lines else []),
        f"In the planted sets {ours['flagged'].mean():.0f} of {ours['features'].mean():.0f} features have q < {Q:g} by attribution, of "
        f"which {ours['flagged_carriers'].mean():.1f} carry the planted behaviour (it has {ours['carriers'].mean():.1f} carriers). The "
        "others are not chance: the loss does push along them, since directions overlap and the push is where a word is chosen. So the "
        "q-value answers whether the labels ask for a direction, not whether the feature is the behaviour.",
    ]


def main() -> None:
    study(__doc__, NAME, cells, run, report)


if __name__ == "__main__":
    main()
