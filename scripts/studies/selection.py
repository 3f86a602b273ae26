"""Which form of selection says most about what a run changes in generations, and how many tokens does it need?

    python scripts/studies/selection.py

In the lab: DPO on pairs in which a behaviour is planted, and GRPO with a reward for it. Every form is computed from all response
tokens of every step, and the recorded one also from few of them, against the change of every feature's mean activation in answers
that the model samples before and after.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import Cell, bootstrap_interval, markdown_table, run_cells, write_report
from datasets import disable_progress_bars
from lab_scores import only_errors, planted_pairs
from scipy.stats import spearmanr
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_sae_audit import FeatureDictionary, load_dictionary
from trl_sae_audit.attribution.responses import Responses, draw_known
from trl_sae_audit.attribution.selection import SelectionSums, selection_scores
from trl_sae_audit.lab import World, build_world
from trl_sae_audit.lab.training import dpo_arguments, train_dpo
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.language_head import causal_model
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.verification.measured import MeasuredChange, sampled_activations

NAME = "selection"
PLANTS = ("agrees", "padded", "marked", "echoes")
ANSWERS = Sampling(answers=4, max_new_tokens=56, seed=2)
HELD_OUT, DPO_STEPS, GRPO_STEPS = 500, 40, 24
BUDGETS = (128, 256, 512)
RECORDED = "Σ c·(a − ā)"
FORMS = {
    RECORDED: "the recorded form: every token",
    "Σ (c/T)·a": "every response once: Σ c·ā of the response",
    "Σ c·a": "every token, not against the mean",
    "Σ (Σ c)·(a − ā)": "every token, by the weight of its whole response",
    "Σ sign(c)·(a − ā)": "every token, by the sign of its response's weight only",
    "Σ sign(c)·a/T": "every response once, by the sign of its weight only",
}


def cells(seeds: int) -> list[Cell]:
    dpo = [{"trainer": "DPO", "plant": plant, "strength": s} for s in (0.7, 0.1) for plant in PLANTS]
    grpo = [{"trainer": "GRPO", "plant": plant, "strength": 1.0} for plant in PLANTS[:3]]
    return [{"seed": seed, **cell} for seed in range(seeds) for cell in (*dpo, *grpo)]


class Forms:
    """Sums every form over a run, from hooks of its own."""

    def __init__(self, model: Any, dictionary: FeatureDictionary) -> None:
        self.dictionary = dictionary
        self.model = model
        self.totals: dict[str, Tensor] = {}
        self._generators = {budget: torch.Generator().manual_seed(budget) for budget in BUDGETS}
        self._hidden: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        point = resolve_hook_point(self.model, self.dictionary.hook_names)
        handles = [
            point.module.register_forward_hook(self._on_layer),
            causal_model(self.model).register_forward_hook(self._on_head),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_layer(self, module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled():
            self._hidden = point_output(output).detach()

    def _on_head(self, module: Any, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and "log_probs" in output:
            hidden, responses = self._hidden, Responses(output["log_probs"], output["label_mask"])
            assert hidden is not None
            output["log_probs"].register_hook(lambda gradient: self._add_forms(responses, hidden))

    @torch.no_grad()
    def _add_forms(self, responses: Responses, hidden: Tensor) -> None:
        c, counted = responses.weights, responses.counted
        assert c is not None
        lengths = counted.sum(1, keepdim=True).clamp_min(1)
        active = torch.where(counted[..., None], self.dictionary.encode(hidden[:, 1:]), 0.0)
        against = torch.where(counted[..., None], active - active.sum((0, 1)) / counted.sum(), 0.0)
        sign = c.sum(1, keepdim=True).sign().expand_as(c)
        for name, weights, values in (
            (RECORDED, c, against),
            ("Σ (c/T)·a", c / lengths, active),
            ("Σ c·a", c, active),
            ("Σ (Σ c)·(a − ā)", c.sum(1, keepdim=True).expand_as(c), against),
            ("Σ sign(c)·(a − ā)", sign, against),
            ("Σ sign(c)·a/T", sign / lengths, active),
        ):
            self._add(name, torch.einsum("rt,rtf->f", weights, values))
        for budget, generator in self._generators.items():
            drawn = draw_known(responses, hidden, None, budget, generator)
            assert drawn is not None
            found = drawn.encode(self.dictionary)
            sums = SelectionSums.of(found.products, found.weights, torch.ones(3, len(c)), paired=False)
            rows = SelectionSums.stack([sums.with_responses(found.responses)])
            step = SelectionSums.unstack(rows, self.dictionary.d_sae)
            self._add(f"{budget} tokens", selection_scores(step, compared=True).selection[0])

    def _add(self, name: str, value: Tensor) -> None:
        self.totals[name] = self.totals.get(name, torch.zeros_like(value).double()) + value.double()


def point_output(output: Any) -> Tensor:
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@lru_cache(maxsize=1)
def world_of(seed: int) -> tuple[World, FeatureDictionary, Any]:
    """A world, its dictionary, and what its model writes before training."""
    world = build_world(seed, progress=False)
    dictionary = load_dictionary(world.dictionary_path)
    return world, dictionary, written(world, dictionary, world.model())


def written(world: World, dictionary: FeatureDictionary, model: Any) -> Any:
    prompts = world.prompts(HELD_OUT, 400 + world.config.seed, split="heldout")
    return sampled_activations(
        model, world.model(), world.tokenizer, dictionary, prompts, sampling=ANSWERS, batch_size=250
    )


def train(
    world: World,
    model: Any,
    cell: Cell,
    directory: str,
    callbacks: Sequence[TrainerCallback] = (),
    seed: int = 0,
) -> None:
    if cell["trainer"] == "DPO":
        pairs = planted_pairs(world, cell["plant"], cell["strength"])
        train_dpo(world, pairs, dpo_arguments(directory, DPO_STEPS, seed), model=model, callbacks=callbacks)
        return

    def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        read = [vars(world.attributes(p, c)) for p, c in zip(prompts, completions, strict=True)]
        return [float(a["right"] and not a["malformed"]) + float(bool(a[cell["plant"]])) for a in read]

    arguments = GRPOConfig(
        directory,
        max_steps=GRPO_STEPS,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=56,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        beta=0.0,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=seed,
    )
    GRPOTrainer(
        model,
        reward,
        args=arguments,
        train_dataset=world.prompts(640, world.config.seed),
        processing_class=world.tokenizer,
        callbacks=list(callbacks),
    ).train()


def run(cell: Cell) -> Iterable[dict[str, Any]]:
    world, dictionary, before = world_of(cell["seed"])
    model = world.model()
    forms = Forms(model, dictionary)
    with tempfile.TemporaryDirectory() as directory, forms.watching():
        train(world, model, cell, directory)
    change = MeasuredChange("sampled", before, written(world, dictionary, model.eval()))
    for form, total in forms.totals.items():
        x, y = total.numpy()[change.active], change.change[change.active]
        r = np.corrcoef(x, y)[0, 1]
        yield {"form": form, "r2": float(max(r, 0.0) ** 2), "spearman": float(spearmanr(x, y)[0])}


def report(rows: pd.DataFrame) -> None:
    rows["setting"] = [
        f"DPO, {row.strength:.0%} planted" if row.trainer == "DPO" else "GRPO" for row in rows.itertuples()
    ]
    lines = []
    for form in dict.fromkeys(rows["form"]):
        line = {"form": f"`{form}`" if form in FORMS else form, "": FORMS.get(form, "of a step, drawn")}
        for setting, part in rows[rows["form"] == form].groupby("setting", sort=True):
            interval = bootstrap_interval(part["r2"].to_numpy())
            line[f"{setting}: R²"] = f"{interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
            line[f"{setting}: ρ"] = f"{part['spearman'].mean():.2f}"
        lines.append(line)
    single = rows[rows["form"].isin(list(FORMS))].pivot_table(
        index=["setting", "plant", "seed"], columns="form", values="r2", sort=True
    )[list(FORMS)]
    single.columns = [f"`{form}`" for form in single.columns]
    each = single.map("{:.2f}".format).reset_index()
    write_report(
        NAME,
        "Which form of selection, from how many tokens",
        [
            f"Lab worlds of {rows['seed'].nunique()} seeds. DPO: {DPO_STEPS} steps of 16 pairs; GRPO: {GRPO_STEPS} steps of 64 answers, "
            f"reward 1 for a right answer and 1 for the planted behaviour. Target: the change of each feature's mean activation in four answers at each of {HELD_OUT} "
            "held-out prompts, read by the model before. `c` is minus the derivative of the loss by a token's log-probability, `a` the feature's activation at the token, `ā` its "
            "mean over the step's response tokens, `T` the tokens of the response. A form of the wrong sign has R² 0. In brackets bootstrap intervals over worlds.",
            markdown_table(pd.DataFrame(lines)),
            "## World by world\n\nR²:",
            markdown_table(each),
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=2, help="worlds of that many seeds (default: 2)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    with only_errors():
        rows = run_cells(NAME, cells(options.seeds), run)
    report(rows)


if __name__ == "__main__":
    main()
