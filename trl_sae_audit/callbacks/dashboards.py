"""What the dashboards that the trainer reports to show besides metrics: the features a run taught most, and alerts."""

from __future__ import annotations

import contextlib
import logging
import math
import sqlite3
from collections.abc import Iterator, Sequence

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from ..record.reader import RunRecord
from ..record.rollouts import COLUMNS, read_rollouts

logger = logging.getLogger(__name__)

ROWS = 50
"""Features in a table."""

NAMES = ("feature", "words", "label")
GENERATIONS = ("generation_effect_size", "generation_drift", "generation_drift_low", "generation_drift_high")
SELECTION = ("selection", "selection_standard_error", "selection_q_value")
ATTRIBUTION = ("attribution", "standard_error", "q_value", "share", "lift")
REPORTERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


def reports_tables(callbacks: Sequence[TrainerCallback]) -> bool:
    """Whether a dashboard that knows tables is among a trainer's callbacks."""
    return any(isinstance(callback, REPORTERS) for callback in callbacks)


def publish(
    callbacks: Sequence[TrainerCallback], record: RunRecord, global_step: int, *, completions: bool = False
) -> None:
    """Show each dictionary's first features, in the order of the record, with the metrics, as `train/sae/features`.

    With several dictionaries the name is `train/sae/<dictionary>/features`. To be called on the main process, while
    the reporters still listen.

    Args:
        callbacks: the trainer's, among them the reporters.
        record: of the run.
        global_step: where on the dashboards' axis the table stands.
        completions: also show the answers of an on-policy run's first and latest steps, as trackio's traces, `train/sae/rollouts`.
    """
    names = [described["name"] for described in record.dictionaries]
    for name in names:
        key = "train/sae/features" if len(names) == 1 else f"train/sae/{name}/features"
        table = top_features(record, name)
        for reporter in callbacks:
            with _tolerated(reporter):
                if isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
                    reporter.tb_writer.add_text(key, as_markdown(table), global_step)
                elif isinstance(reporter, WandbCallback):
                    _publish_wandb(key, table, global_step)
                elif isinstance(reporter, TrackioCallback):
                    _publish_trackio(key, table, global_step)
    for reporter in [each for each in callbacks if isinstance(each, TrackioCallback)][: int(completions)]:
        with _tolerated(reporter):
            _trace_rollouts(record, global_step)


@contextlib.contextmanager
def _tolerated(reporter: TrainerCallback) -> Iterator[None]:
    """A training is worth more than what a dashboard shows of it: one that cannot be reached is logged."""
    try:
        yield
    except _failures(reporter) as error:
        logger.warning(
            "%s could not be told (%s: %s); the run record has all of it.",
            *(type(reporter).__name__, type(error).__name__, error),
        )


def _failures(reporter: TrainerCallback) -> tuple[type[Exception], ...]:
    """What comes out of a dashboard that cannot be reached: the libraries below it have errors that derive from none of Python's."""
    failures = (OSError, RuntimeError)
    if isinstance(reporter, WandbCallback):
        import wandb

        return *failures, wandb.errors.Error
    if isinstance(reporter, TrackioCallback):
        import httpx

        return *failures, sqlite3.Error, httpx.HTTPError
    return failures


def top_features(record: RunRecord, dictionary: str) -> pd.DataFrame:
    """The columns of `RunRecord.features` that a person reads first, with the sides under the trainer's own names."""
    features = record.features(dictionary).head(ROWS)
    generated = [name for name in (*GENERATIONS, *SELECTION) if name in features]
    columns = [*NAMES, *generated, *ATTRIBUTION, *record.sides, "trend"]
    return features[columns].rename(columns=record.sides)


def as_markdown(table: pd.DataFrame) -> str:
    """The table for TensorBoard's Text tab."""
    rows = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def send_alert(callbacks: Sequence[TrainerCallback], title: str, text: str) -> None:
    """Alert a person through the dashboards that can: trackio's alerts and W&B's. TensorBoard has none.

    To be called on the main process, while the reporters listen.

    Args:
        callbacks: the trainer's, among them the reporters.
        title: what it is about, in a few words.
        text: what it means and what to do.
    """
    for reporter in callbacks:
        with _tolerated(reporter):
            if isinstance(reporter, TrackioCallback):
                import trackio

                trackio.alert(title, text, level=trackio.AlertLevel.WARN)
            elif isinstance(reporter, WandbCallback):
                import wandb

                if wandb.run is not None:  # WANDB_DISABLED
                    wandb.run.alert(title, text, level="WARN")


def _publish_wandb(key: str, table: pd.DataFrame, global_step: int) -> None:
    import wandb

    if wandb.run is not None:  # WANDB_DISABLED
        wandb.run.log({key: wandb.Table(dataframe=table), "train/global_step": global_step})


def _publish_trackio(key: str, table: pd.DataFrame, global_step: int) -> None:
    import trackio

    trackio.log({key: trackio.Table(dataframe=table), "train/global_step": global_step})


def _trace_rollouts(record: RunRecord, global_step: int) -> None:
    """The answers that the record keeps, each as a conversation with the step that was trained on it."""
    if not set(COLUMNS) <= set(record.tables):
        return
    import trackio

    traces = [
        trackio.Trace(
            [
                {"role": "user", "content": each.prompt},
                {"role": "assistant", "content": "".join(each.pieces)},
            ],
            {"when": each.when, "step": each.sampled},
        )
        for each in read_rollouts(*map(record.table, COLUMNS))
    ]
    trackio.log({"train/sae/rollouts": traces, "train/global_step": global_step})
