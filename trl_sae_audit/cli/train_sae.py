"""`trl-sae-audit train-sae`."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..console import single_line, table
from ..saes.training_config import TrainSAEConfig
from .options import ModelArguments, OutputArguments, TextArguments, options_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ..saes.training import TrainedDictionary

DESCRIPTION = (
    "Train a sparse autoencoder on the residual stream of a model on given texts, save it in sae-lens' format, and "
    "check it on texts held out. Ends with an error if the SAE is dead, and keeps it in DIR.failed then."
)
EXAMPLE = """\
trl-sae-audit train-sae --model ./model --dataset pairs.jsonl \\
    --output_dir ./sae
trl-sae-audit train-sae --model ./model --dataset pairs.jsonl \\
    --hook_points 6 12 18 --output_dir ./saes
trl-sae-audit train-sae --model ./trained --dataset pairs.jsonl \\
    --from ./sae --output_dir ./sae-2"""
OPTIONS = (ModelArguments, TextArguments, TrainSAEConfig, OutputArguments)


def run(
    model_arguments: ModelArguments, texts: TextArguments, config: TrainSAEConfig, output: OutputArguments
) -> int:
    from ..saes.training import train_dictionaries

    started = time.monotonic()
    model, tokenizer = model_arguments.load()
    options = options_of(model_arguments, texts, config)
    trained = train_dictionaries(
        model, tokenizer, texts.read(tokenizer), config, dataset=texts.dataset, options=options
    )
    seconds = time.monotonic() - started
    documents = [{**asdict(each), "seconds": seconds} for each in trained]
    shown = [
        part for each in trained for part in (summary(each, seconds), single_line(f"Saved in {each.path}"))
    ]
    output.show(documents[0] if config.hook_points is None else {"dictionaries": documents}, *shown)
    return 0


def summary(trained: TrainedDictionary, seconds: float) -> RenderableType:
    """The figures of a trained dictionary, with what they mean."""
    rows = (
        ("features", f"{trained.d_sae:,} at {trained.hook_point}"),
        ("trained on", f"{trained.training_tokens:,} tokens{_distinct(trained)}; {seconds:.0f} s in all"),
        ("checked on", f"{trained.held_out_tokens:,} held-out tokens"),
        ("FVU", f"{trained.fvu:.3f}  fraction of variance unexplained: 0 perfect, 1 useless"),
        (
            "token FVU",
            f"{trained.token_fvu:.3f}  the same token by token: what a few huge activations cannot flatter",
        ),
        ("L0", f"{trained.l0:.1f}  active features a token"),
        ("dead", f"{trained.dead:.1%}  of the features, active on no held-out token"),
    )
    return table("The dictionary", {"": "left", " ": "left"}, rows, head=False)


def _distinct(trained: TrainedDictionary) -> str:
    if trained.distinct_tokens is None:
        return ""
    if trained.distinct_tokens == trained.training_tokens:
        return ", all different"
    return f", {trained.distinct_tokens:,} of them different"
