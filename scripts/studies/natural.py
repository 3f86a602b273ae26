"""What do real pairs teach a real instruct model, and did the audit say so? Style by rule, in the pairs and in what the model writes.

    python scripts/studies/real_prediction.py runs/smol/model runs/smol/sae pairs.jsonl
    python scripts/studies/natural.py runs/smol/model pairs.jsonl

Reads the audit, the answers and the pairs of `real_prediction.py`; trains and samples nothing.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import real_prediction
from transformers import AutoTokenizer

from trl_sae_audit import Audit

NAME = "natural"
LINES = 20
_LIST = re.compile(r"^\s*([-*•]|\d+[.)])\s", re.MULTILINE)

STYLES: dict[str, Callable[[str], bool]] = {
    "has a list": lambda text: bool(_LIST.search(text)),
    "has bold, headings or code": lambda text: bool(re.search(r"\*\*|^#+ |`", text, re.MULTILINE)),
    "begins with a list": lambda text: bool(_LIST.match(text)),
    "begins with assent (Sure, Certainly, Of course, Yes, Absolutely)": lambda text: bool(
        re.match(r"(sure|certainly|of course|yes|absolutely|great)\b", text, re.IGNORECASE)
    ),
    "begins with Here are, Here is": lambda text: bool(re.match(r"here('s| is| are)\b", text, re.IGNORECASE)),
    "begins with the speaker (I, As an AI)": lambda text: bool(re.match(r"(I\b|as an ai)", text)),
    "apologizes or refuses": lambda text: bool(
        re.search(r"\bsorry\b|\bI can't\b|\bI cannot\b|\bunable to\b|\bapologi", text)
    ),
    "has an exclamation mark": lambda text: "!" in text,
}
"""Measures by rule: whether an answer …"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="directory of the model, for its tokenizer")
    parser.add_argument("pairs", type=Path, help="the preference pairs, as JSON lines")
    parser.add_argument(
        "--study", default=real_prediction.NAME, help="name of the prediction study's results"
    )
    parser.add_argument("--name", default=NAME, help="of this study's part of the page")
    arguments = parser.parse_args()
    cell = common.stored_cells(arguments.study).iloc[0].to_dict()
    directory = real_prediction.directory_of(arguments.study, cell)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    pairs, _ = real_prediction.split(arguments.pairs, tokenizer, cell)
    audit = Audit.load(directory / "audit")
    looked = audit.lookahead
    ahead = (
        "It was audited without a lookahead."
        if looked is None
        else f"The default audit took its step on {looked['pairs']} of them, and sampled four answers at each of {looked['prompts']} of their prompts."
    )
    sections = [
        f"{len(pairs)} real pairs ({len({pair['prompt'] for pair in pairs})} prompts of at most {cell['prompt_tokens']} tokens, answers cut at {cell['answer_tokens']} tokens at the end of a sentence where "
        f"there is one). {ahead}",
        *(
            []
            if looked is None
            else [f"## First {LINES} lines of the audit", common.markdown_table(audit_table(audit))]
        ),
        f"{len(audit.beyond_chance())} of {audit.dictionary.d_sae} features are beyond chance (`Audit.beyond_chance`).",
        f"## First {LINES} by selection in standard errors",
        common.markdown_table(selection_table(audit)),
        "## Measured",
        f"By rule. In the pairs: chosen less rejected. Written: {cell['answers']} answers at temperature 1 to each of {cell['held_out']} other prompts, at most "
        f"{cell['answer_tokens']} tokens, before and after the run; in brackets 95 % bootstrap intervals of the change over prompts.",
        common.markdown_table(style_table(pairs, directory, tokenizer)),
    ]
    common.write_report(arguments.name, "What real pairs teach", sections, page=NAME)


def audit_table(audit: Audit) -> pd.DataFrame:
    table = audit.features().head(LINES)
    return pd.DataFrame(
        {
            "feature": table["feature"],
            "effect size": table["effect_size"].map("{:+.4f}".format),
            "95 % interval": [
                f"{low:+.4f} to {high:+.4f}" if np.isfinite(high - low) else "–"
                for low, high in zip(table["effect_size_low"], table["effect_size_high"], strict=True)
            ],
            "words": table["words"].map(in_a_cell),
        }
    )


def selection_table(audit: Audit) -> pd.DataFrame:
    table = audit.features()
    error = table["selection_standard_error"]
    table["z"] = table["selection"] / error.where(error > 0)
    table = table.iloc[np.argsort(-table["z"].abs().fillna(0).to_numpy(), kind="stable")].head(LINES)
    return pd.DataFrame(
        {
            "feature": table["feature"],
            "selection in standard errors": table["z"].map("{:+.1f}".format),
            "q": table["selection_q_value"].map("{:.2g}".format),
            "words": table["words"].map(in_a_cell),
        }
    )


def in_a_cell(words: Any) -> str:
    return re.sub(r"\s+", " ", str(words)).replace("|", "/").replace("<", "&lt;").replace("*", "\\*")


def style_table(pairs: list[dict[str, str]], directory: Path, tokenizer: Any) -> pd.DataFrame:
    before, after = (read_answers(directory / f"{when}.jsonl") for when in ("before", "after-0"))
    lines = []

    def line(label: str, sides: list[np.ndarray], written: list[pd.Series], form: str) -> None:
        chosen, rejected = sides
        change = common.bootstrap_interval(
            np.stack([frame.groupby(before["prompt"], sort=False).mean() for frame in written], axis=1),
            lambda rows: float((rows[:, 1] - rows[:, 0]).mean()),
        )
        lines.append(
            {
                "": label,
                "chosen": form.format(chosen.mean()),
                "rejected": form.format(rejected.mean()),
                "written before": form.format(written[0].mean()),
                "after": form.format(written[1].mean()),
                "change": f"{signed(form).format(change.estimate)} [{signed(form).format(change.low)}, {signed(form).format(change.high)}]",
            }
        )

    def tokens(side: str) -> np.ndarray:
        return np.array([len(tokenizer(pair[side], add_special_tokens=False)["input_ids"]) for pair in pairs])

    line(
        "tokens",
        [tokens("chosen"), tokens("rejected")],
        [frame["tokens"] for frame in (before, after)],
        "{:.1f}",
    )
    for label, has in STYLES.items():
        sides = [np.array([has(pair[side]) for pair in pairs], float) for side in ("chosen", "rejected")]
        line(label, sides, [frame["answer"].map(has).astype(float) for frame in (before, after)], "{:.1%}")
    return pd.DataFrame(lines)


def signed(form: str) -> str:
    return form.replace("{:", "{:+")


def read_answers(path: Path) -> pd.DataFrame:
    return pd.DataFrame([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])


if __name__ == "__main__":
    main()
