"""`trl-sae-audit train-sae`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from ..terminal import OutputArguments, table, to_copy
from ..train_sae import TrainedDictionary, train_dictionary
from ..train_sae_config import TrainSAEConfig
from .arguments import ModelArguments, TextArguments, load_model, parse

DESCRIPTION = (
    "Train a sparse autoencoder on the residual stream of a model on given texts, save it in sae-lens' format, and "
    "check it on texts held out. Ends with an error if the SAE is dead, and keeps it in OUTPUT_DIR.failed then. "
    "Example: trl-sae-audit train-sae --model_name_or_path ./model --texts pairs.jsonl --hook_point model.layers.9 "
    "--output_dir ./sae"
)


def main(argv: Sequence[str]) -> int:
    model_arguments, text_arguments, config, output = parse(
        "train-sae", DESCRIPTION, (ModelArguments, TextArguments, TrainSAEConfig, OutputArguments), argv
    )
    started = time.monotonic()
    model, tokenizer = load_model(model_arguments)
    texts = text_arguments.read(tokenizer)
    trained = train_dictionary(model, tokenizer, texts, config, dataset=text_arguments.texts)
    seconds = time.monotonic() - started
    output.show(
        {**asdict(trained), "seconds": seconds},
        summary(trained, seconds),
        to_copy(f"Saved in {trained.path}"),
    )
    return 0


def summary(trained: TrainedDictionary, seconds: float) -> Table:
    """The figures of a trained dictionary, with what they mean."""
    distinct = "" if trained.distinct_tokens is None else f", {trained.distinct_tokens:,} of them different"
    rows = (
        ("features", f"{trained.d_sae:,} at {trained.hook_point}"),
        ("trained on", f"{trained.training_tokens:,} tokens{distinct}; {seconds:.0f} s in all"),
        ("checked on", f"{trained.held_out_tokens:,} held-out tokens"),
        ("FVU", f"{trained.fvu:.3f}  fraction of variance unexplained: 0 perfect, 1 useless"),
        (
            "token FVU",
            f"{trained.token_fvu:.3f}  the same token by token: what a few huge activations cannot flatter",
        ),
        ("L0", f"{trained.l0:.1f}  active features a token"),
        ("dead", f"{trained.dead:.1%}  of the features active on no held-out token"),
    )
    return table("The dictionary", {"": "left", " ": "left"}, rows, head=False)
