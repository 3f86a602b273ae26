"""The tables of docs/cost.md: what attribution would cost runs from 1B to 405B parameters.

    python scripts/cost_tables.py

Every row is one call of `trl-sae-audit doctor --plan`, whose options stand below the tables.
"""

from __future__ import annotations

import argparse

from trl_sae_audit.commands.plan import (
    MachineArguments,
    PlanRunArguments,
    machine_of,
    percent,
    seconds,
    shapes_of,
    size,
)
from trl_sae_audit.plan import ModelShape, Plan, plan

MODELS = {
    # name: parameters (with a head of its own), layers, width, GPUs
    "1B": (1.5e9, 16, 2048, 8),
    "8B": (8.03e9, 32, 4096, 8),
    "70B": (70.6e9, 80, 8192, 64),
    "405B": (405.9e9, 126, 16384, 1024),
}
VOCABULARY = 128_256
DICTIONARIES = {65_536: ("float32", False), 1_048_576: ("bfloat16", True)}
COMMON = {"max_length": 2048, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}


def planned(model: str, features: int, *, token_scores: bool = False) -> Plan:
    parameters, layers, width, gpus = MODELS[model]
    shape = ModelShape.of_numbers(model, layers, width, VOCABULARY, round(parameters))
    dtype, offload = DICTIONARIES[features]
    arguments = PlanRunArguments(
        d_sae=features,
        dictionary_dtype=dtype,  # type: ignore[arg-type]
        offload=offload,
        processes=gpus,
        token_scores=token_scores,
        **COMMON,  # type: ignore[arg-type]
    )
    return plan(shape, *shapes_of(arguments, shape), machine_of(MachineArguments()))


def command(model: str, features: int) -> str:
    parameters, layers, width, gpus = MODELS[model]
    dtype, offload = DICTIONARIES[features]
    common = " ".join(f"--{name} {value}" for name, value in COMMON.items())
    return (
        f"trl-sae-audit doctor --plan --parameters {parameters / 1e9:g}e9 --layers {layers} --hidden_size {width} "
        f"--vocab_size {VOCABULARY} --d_sae {features} --dictionary_dtype {dtype}{' --offload' * offload} "
        f"--processes {gpus} {common}"
    )


def markdown(heading: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [heading, ["---"] * len(heading), *rows]]


def tables() -> str:
    """Both tables and the commands, as Markdown."""
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
            one, tokens = planned(model, features), ["–", "–"]
            if not DICTIONARIES[features][1]:
                more = planned(model, features, token_scores=True)
                tokens = [percent(more.flop_share), percent(more.time_share)]
            time.append(
                [model, f"{gpus:,}", f"{features:,}", seconds(one.train_seconds), percent(one.flop_share),
                 percent(one.time_share), *tokens, percent(one.audit)]
            )  # fmt: skip
            held.append(
                [model, f"{features:,}", size(sum(one.device_memory.values())), size(sum(one.host_memory.values())),
                 size(sum(one.shared_memory.values())), size(one.network), percent(one.network / one.train_network),
                 size(one.disk_row * 1000 + one.disk_totals)]
            )  # fmt: skip
    example = ["```sh", *(command(model, features) for model in MODELS for features in DICTIONARIES), "```"]
    return "\n".join([*markdown(time[0], time[1:]), "", *markdown(held[0], held[1:]), "", *example])


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    print(tables())


if __name__ == "__main__":
    main()
