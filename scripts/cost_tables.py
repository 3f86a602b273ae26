"""The tables of docs/cost.md: what attribution would cost runs from 1B to 405B parameters.

python scripts/cost_tables.py
"""

from __future__ import annotations

import argparse

from trl_sae_audit.cli.cost import (
    CostEstimate,
    ModelShape,
    RunShape,
    estimate_cost,
    format_seconds,
    format_share,
    format_size,
)

MODELS = {
    # name: parameters (with a head of its own), layers, width, GPUs
    "1B": (1.5e9, 16, 2048, 8),
    "8B": (8.03e9, 32, 4096, 8),
    "70B": (70.6e9, 80, 8192, 64),
    "405B": (405.9e9, 126, 16384, 1024),
}
VOCABULARY = 128_256
DICTIONARIES = {65_536: (4, False), 1_048_576: (2, True)}
"""Features → bytes of a weight, and whether the dictionary is offloaded."""


def shape_of(model: str) -> ModelShape:
    """In the usual proportions: what is not embedding and head is in the layers, and the heads are as wide as the stream."""
    parameters, layers, width, _ = MODELS[model]
    active = round(parameters) - 2 * VOCABULARY * width
    return ModelShape(model, layers, width, VOCABULARY, round(parameters), active, width)


def cost_of(model: str, features: int, *, token_scores: bool = False) -> CostEstimate:
    shape = shape_of(model)
    weight_bytes, offload = DICTIONARIES[features]
    run = RunShape(
        features,
        (shape.layers + 1) // 2,
        tokens=2048,
        answer_tokens=1024,
        batch=8,
        processes=MODELS[model][3],
        token_scores=token_scores,
        weight_bytes=weight_bytes,
        offload=offload,
    )
    return estimate_cost(shape, run)


def markdown(heading: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heading, ["---"] * len(heading), *rows]]


def tables() -> str:
    """Both tables, as Markdown."""
    time = [
        [
            "model",
            "GPUs",
            "features",
            "a step",
            "extra FLOPs",
            "extra time",
            "with token scores: FLOPs",
            "time",
            "an audit",
        ]
    ]
    held = [
        ["model", "features", "GPU", "host, a process", "host, mapped and shared", "network a step", "of the gradients'",
         "record after 1,000 steps"]
    ]  # fmt: skip
    for model, (_, _, _, gpus) in MODELS.items():
        for features in DICTIONARIES:
            one, tokens = cost_of(model, features), ["–", "–"]
            if not DICTIONARIES[features][1]:
                more = cost_of(model, features, token_scores=True)
                tokens = [format_share(more.flop_share), format_share(more.time_share)]
            time.append(
                [model, f"{gpus:,}", f"{features:,}", format_seconds(one.train_seconds), format_share(one.flop_share),
                 format_share(one.time_share), *tokens, format_share(one.audit)]
            )  # fmt: skip
            held.append(
                [model, f"{features:,}", format_size(sum(one.gpu.values())), format_size(sum(one.host.values())),
                 format_size(one.mapped), format_size(one.network), format_share(one.network / (2 * MODELS[model][0])),
                 format_size(one.disk_row * 1000 + one.disk_totals)]
            )  # fmt: skip
    return "\n".join([*markdown(time[0], time[1:]), "", *markdown(held[0], held[1:])])


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(tables())


if __name__ == "__main__":
    main()
