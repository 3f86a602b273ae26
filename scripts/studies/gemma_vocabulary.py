"""Gemma with a smaller vocabulary, for a CPU: of 262,144 tokens the commonest, and those the questions about capitals, or
some preference pairs, need.

    python scripts/studies/gemma_vocabulary.py runs/gemma/model runs/gemma/short
    python scripts/studies/gemma_vocabulary.py runs/gemma/model runs/gemma/pairs --pairs pairs.jsonl

Scoring every token of the vocabulary is most of the work of training a model of this size. Cut to fewer, with the rows of
the embedding unchanged, the model computes the same states and logits for what is left, and its probabilities are those
given that one of these tokens comes next; how much they had together is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import capitals
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from trl_sae_audit.data.opener import iterate_rows

COMMONEST = 16_000
"""A token's id is about its rank: merges are numbered in the order in which they were found."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="directory of the model, see scripts/gemma.py")
    parser.add_argument("short", type=Path, help="directory to write")
    parser.add_argument("--commonest", type=int, default=COMMONEST, help="first ids to keep")
    parser.add_argument(
        "--pairs",
        type=Path,
        help="preference pairs, as JSON lines, to keep the tokens of, instead of the questions'",
    )
    arguments = parser.parse_args()
    texts = pair_texts(arguments.pairs) if arguments.pairs else question_texts()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    wanted = {number for row in tokenizer(texts)["input_ids"] for number in row}
    description = json.loads((arguments.model / "tokenizer.json").read_text(encoding="utf-8"))
    short, kept = cut_tokenizer(description, {*range(arguments.commonest), *wanted})
    sample = texts[:: len(texts) // 20]
    mass = probability_of(model, tokenizer, kept, sample)
    cut_model(model, kept)
    model.save_pretrained(arguments.short)
    tokenizer.save_pretrained(arguments.short)
    (arguments.short / "tokenizer.json").write_text(json.dumps(short), encoding="utf-8")
    check(tokenizer, AutoTokenizer.from_pretrained(arguments.short), texts)
    print(
        f"{len(kept)} of {len(description['model']['vocab'])} tokens kept; in {len(sample)} of these texts they have {mass:.4f} of "
        "the probability"
    )


def question_texts() -> list[str]:
    """Both answers to every question."""
    asked = [
        question
        for belief in capitals.PROMPTS
        for question in capitals.all_questions(capitals.countries(), belief)
    ]
    return [question.prompt + answer for question in asked for answer in (question.right, question.wrong)]


def pair_texts(path: Path) -> list[str]:
    """Both answers after every prompt."""
    rows = [row.columns for row in iterate_rows(path) if row.columns is not None]
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def cut_tokenizer(description: dict[str, Any], wanted: Iterable[int]) -> tuple[dict[str, Any], list[int]]:
    """A `tokenizer.json` of the wanted ids and the parts they are merged from, and which those are, by their new id."""
    names = {number: name for name, number in description["model"]["vocab"].items()}
    merges = [tuple(pair) for pair in description["model"]["merges"]]
    parts: dict[str, set[str]] = {}
    for pair in merges:
        parts.setdefault("".join(pair), set()).update(pair)
    kept, unseen = set(), [names[number] for number in wanted]
    while unseen:
        name = unseen.pop()
        if name not in kept:
            kept.add(name)
            unseen += parts.get(name, ())
    numbers = sorted(description["model"]["vocab"][name] for name in kept)
    new = {names[number]: place for place, number in enumerate(numbers)}
    short = {
        **description["model"],
        "vocab": new,
        "merges": [pair for pair in merges if kept.issuperset({*pair, "".join(pair)})],
    }
    added = [
        {**token, "id": new[token["content"]]}
        for token in description["added_tokens"]
        if token["content"] in new
    ]
    processor = json.loads(json.dumps(description["post_processor"]))
    for token in processor["special_tokens"].values():
        token["ids"] = [new[name] for name in token["tokens"]]
    return {**description, "model": short, "added_tokens": added, "post_processor": processor}, numbers


def cut_model(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """Leave the kept rows of the embedding, which is the head as well."""
    embedding = model.get_input_embeddings()
    embedding.weight = nn.Parameter(embedding.weight.detach()[torch.tensor(kept)].clone())
    embedding.num_embeddings = model.config.vocab_size = len(kept)
    model.tie_weights()
    model.get_output_embeddings().out_features = len(kept)


@torch.no_grad()
def probability_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, kept: Sequence[int], texts: Sequence[str]
) -> float:
    """The mean probability that the next token is one of those kept, over the texts' tokens."""
    found = []
    for text in texts:
        logits = model(**tokenizer(text, return_tensors="pt")).logits[0]
        found.append((logits[:, kept].logsumexp(-1) - logits.logsumexp(-1)).exp())
    return float(torch.cat(found).mean())


def check(long: PreTrainedTokenizerBase, short: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """That every text is cut into the same tokens as before."""
    for text in texts:
        before, after = (each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (long, short))
        if before != after:
            raise SystemExit(f"The smaller vocabulary cuts {text!r} otherwise: {after} instead of {before}")


if __name__ == "__main__":
    main()
