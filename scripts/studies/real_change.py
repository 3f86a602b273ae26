"""What the studies of prediction on a real model share: answers before and after a training, and each score against the change."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from trl_sae_audit import Audit, FeatureAttributionCallback, RunRecord
from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.models.sampling import Sampling
from trl_sae_audit.saes.dictionary import FeatureDictionary
from trl_sae_audit.verification.comparison import verify
from trl_sae_audit.verification.measured import (
    AnswerActivations,
    MeasuredChange,
    read_answers,
    sample_answers,
)

LIVE = ("generation_drift", "selection", "attribution")
AUDITED = (
    "effect_size",
    "predicted_change_in_generations",
    "predicted_frequency_change",
    "selection",
    "projection_difference",
    "disparity",
    "mean_activation_difference",
    "attribution",
)
WEIGHTED = "live: generation_drift at the last look by weights"
SECOND_RUN = "a second run"
MEASUREMENT = {
    "held_out": (45, "prompts that the training has not, to measure on"),
    "prompt_tokens": (64, "leave longer prompts out"),
    "answer_tokens": (48, "tokens at which answers are cut"),
    "answers": (6, "sampled to each held-out prompt"),
}
"""Sizes that the studies share."""
LOOK_STEPS = 5
Prompt = dict[str, Any]


class Meter:
    """Measures what a training changes in what a model writes to some prompts; the model before reads all answers.

    Args:
        directory: where answers, audit and records are kept.
        base: the model before training.
        cell: has the sizes of `MEASUREMENT`.
    """

    def __init__(
        self,
        directory: Path,
        base: Any,
        tokenizer: PreTrainedTokenizerBase,
        dictionary: FeatureDictionary,
        prompts: list[Prompt],
        cell: common.Cell,
    ) -> None:
        self.directory = directory
        self.base, self.tokenizer, self.dictionary = base, tokenizer, dictionary
        self.prompts, self.cell = prompts, cell
        self.seconds: dict[str, float] = {}
        self._began = time.process_time()

    def stop(self, part: str) -> None:
        """The processor time since the last stop was this part's."""
        now = time.process_time()
        self.seconds[part], self._began = round(now - self._began, 1), now

    def audit(self, make: Callable[[Path], Audit]) -> Audit:
        """The audit, made once for all runs."""
        path = self.directory / "audit"
        found = Audit.load(path) if (path / MANIFEST).exists() else make(path)
        self.stop("audit")
        return found

    def callback(self, run: int) -> FeatureAttributionCallback:
        """Observes a training; looks at generations every `LOOK_STEPS` steps and when it ends."""
        return FeatureAttributionCallback(
            self.dictionary,
            output_dir=self._record(run),
            overwrite=True,
            generations=Sampling(answers=4, max_new_tokens=self.cell["answer_tokens"], seed=11),
            generation_prompts=self.prompts,
            generation_steps=LOOK_STEPS,
        )

    def answers(self, writer: Any, when: str) -> AnswerActivations:
        """What `writer` answers, as the model before training reads it; kept, and the texts beside it."""
        path = self.directory / f"{when}.npz"
        if path.exists():
            return load_answers(path)
        sampling = Sampling(self.cell["answers"], self.cell["answer_tokens"], seed=5)
        answered = sample_answers(writer, self.tokenizer, self.prompts, sampling=sampling, batch_size=48)
        found = read_answers(self.base, self.tokenizer, self.dictionary, answered, batch_size=32)
        rows = [
            {
                "prompt": prompt,
                "answer": self.tokenizer.decode(answer, skip_special_tokens=True),
                "tokens": len(answer),
                "ended": self.tokenizer.eos_token_id in answer,
            }
            for prompt, _, answer in answered
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
        np.savez(
            path, sums=found.sums, tokens=found.tokens, prompts=np.array(found.prompts), active=found.active
        )
        self.stop(f"answers {when.partition('-')[0]}")
        return found

    def compared(self, run: int, audit: Audit, after: AnswerActivations) -> list[dict[str, Any]]:
        """A row a score: how well it says what the run changed, and what is known of the measurement."""
        record = RunRecord.load(self._record(run))
        change = MeasuredChange("in generations", self.answers(self.base, "before"), after)
        before, live = (each.features().set_index("feature").sort_index() for each in (audit, record))
        scores = {f"audit: {name}": before[name] for name in AUDITED if name in before} | {
            f"live: {name}": live[name] for name in LIVE
        }
        looks = record.table("generation_looks")
        weighted = looks.loc[~looks["sampled_again"], "step"]
        if bool(looks["sampled_again"].iloc[-1]) and len(weighted):
            scores[WEIGHTED] = record.drift().loc[weighted.iloc[-1]].reindex(live.index)
        found = verify(
            {name: np.nan_to_num(values.to_numpy(np.float64)) for name, values in scores.items()}, change
        )
        look = looks.iloc[-1]
        shared = {
            "ceiling": found.ceiling,
            "split_half": split_half(change),
            "features": len(found.features),
            "prompts": len(change),
            "sampled": int(look["answers"]),
            "effective": float(look["effective_sample_size"]),
            "covered": float(look["covered_share"]),
            "sampled_again": bool(look["sampled_again"]),
            "weighted": int(weighted.iloc[-1]) if len(weighted) else 0,
            "seconds": self.seconds,
        }
        return [
            {**{str(key): value for key, value in row.items()}, **shared}
            for row in found.table.to_dict("records")
        ]

    def _record(self, run: int) -> Path:
        return self.directory / f"record-{run}"


def load_answers(path: Path) -> AnswerActivations:
    kept = np.load(path)
    return AnswerActivations(kept["sums"], kept["tokens"], tuple(kept["prompts"].tolist()), kept["active"])


def split_half(change: MeasuredChange, draws: int = 100) -> float:
    """Reliability of the measured change: the mean correlation between two random halves of the prompts over the active features,
    made that of all prompts by Spearman and Brown's formula."""
    active, n = change.active, len(change)
    random = np.random.default_rng(0)
    found = []
    for _ in range(draws):
        half = np.zeros(n)
        half[random.permutation(n)[: n // 2]] = 1
        one, other = change.resampled(np.stack([half, 1 - half]))[:, active]
        found.append(np.corrcoef(one, other)[0, 1])
    mean = float(np.mean(found))
    return 2 * mean / (1 + mean)


# What it shows


def described(cell: dict[str, Any]) -> str:
    """What a row of `Meter.compared` says of the measurement."""
    again = (
        f", so they were sampled again; the last look by weights is of step {cell['weighted']}"
        if cell["sampled_again"]
        else ""
    )
    return (
        f"Measured on {cell['answers']} answers of at most {cell['answer_tokens']} tokens to each of {cell['prompts']} other prompts; {cell['features']} features are active in them. "
        f"Ceiling, the R² to expect of a perfect score with so few prompts: {cell['ceiling']:.2f}; reliability by split halves of the prompts: {cell['split_half']:.2f}. "
        f"The {cell['sampled']} answers of `generation_drift` were worth {cell['effective']:.0f} at the end and covered {cell['covered']:.0%} of what was written then{again}. "
        "In brackets 95 % intervals over prompts."
    )


def processor_time(cell: dict[str, Any]) -> str:
    parts = ", ".join(f"{part} {value / 60:.1f} min" for part, value in cell["seconds"].items())
    return f"Processor time: {parts}."


def score_table(directory: Path, cells: pd.DataFrame) -> pd.DataFrame:
    """A line a score of the first run, the largest R² first; beside them a second run's change, if there was one."""
    table: list[dict[Any, Any]] = cells[cells["run"] == 0].to_dict("records")
    if (cells["run"] == 1).any():
        table += second_run(directory)
    lines = [
        {
            "score": row["score"],
            "R²": f"{row['r2']:.3f} [{row['r2_low']:.3f}, {row['r2_high']:.3f}]",
            "R² / ceiling": f"{row['r2'] / row['ceiling']:.2f}" if row["ceiling"] > 0 else "",
            "ρ": f"{row['spearman']:+.2f} [{row['spearman_low']:+.2f}, {row['spearman_high']:+.2f}]",
            "top 20 found": f"{row['precision']:.0%}",
        }
        for row in sorted(table, key=lambda row: -row["r2"])
    ]
    return pd.DataFrame(lines)


def second_run(directory: Path) -> list[dict[Any, Any]]:
    """How well the change in the second run predicts that in the first; both are measured on the same prompts, with other weights."""
    before, first, second = (
        load_answers(directory / f"{when}.npz") for when in ("before", "after-0", "after-1")
    )
    one, other = (MeasuredChange("in generations", before, after) for after in (first, second))
    found = verify({SECOND_RUN: other.change}, one)
    table = found.table[found.table["score"] == SECOND_RUN]
    return table.assign(ceiling=found.ceiling).to_dict("records")
