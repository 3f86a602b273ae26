"""The texts a dictionary for the studies on Gemma is trained on: short preference pairs, and questions with answers.

python scripts/studies/gemma_texts.py pairs.jsonl texts.jsonl
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import capitals

from trl_sae_audit.data.opener import iterate_rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, help="preference pairs with answers as text, as JSON lines")
    parser.add_argument("texts", type=Path, help="file to write")
    parser.add_argument(
        "--longest", type=int, default=400, help="characters of an answer; longer ones are left out"
    )
    arguments = parser.parse_args()
    choose = random.Random(0)
    texts = list(dict.fromkeys([*of_pairs(arguments.pairs, arguments.longest), *of_questions(choose)]))
    choose.shuffle(texts)
    arguments.texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{len(texts)} texts in {arguments.texts}")


def of_pairs(path: Path, longest: int) -> list[str]:
    rows = [row.columns for row in iterate_rows(path) if row.columns is not None]
    return [
        f"{row['prompt']}\n\n{row[side]}"
        for row in rows
        if len(row["prompt"]) < 250 and max(len(row["chosen"]), len(row["rejected"])) < longest
        for side in ("chosen", "rejected")
    ]


def of_questions(choose: random.Random) -> list[str]:
    """Both answers to some questions of each kind, about all countries."""
    source = capitals.countries()
    asked = [
        question
        for belief, count in (("wrong", 300), ("true", 150), ("none", 100))
        for question in choose.sample(list(capitals.all_questions(source, belief)), count)
    ]
    return [question.prompt + answer for question in asked for answer in (question.right, question.wrong)]


if __name__ == "__main__":
    main()
