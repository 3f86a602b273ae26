"""The features a run taught most, as a table in the dashboards the trainer reports to: TensorBoard, W&B, trackio."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from .record import RunRecord

ROWS = 50
"""Features in a table."""

COLUMNS = ("feature", "label", "attribution", "standard_error", "q_value", "share", "lift")
REPORTERS = (TensorBoardCallback, WandbCallback, TrackioCallback)


def reports_tables(callbacks: Sequence[TrainerCallback]) -> bool:
    """Whether a dashboard that knows tables is among a trainer's callbacks."""
    return any(isinstance(one, REPORTERS) for one in callbacks)


def publish(callbacks: Sequence[TrainerCallback], record: RunRecord, global_step: int) -> None:
    """Show each dictionary's features with the largest |attribution|, beside the metrics, as `train/sae/features`.

    With several dictionaries the name is `train/sae/<dictionary>/features`. To be called on the main process, while
    the reporters still listen.

    Args:
        callbacks: the trainer's, among them the reporters.
        record: of the run.
        global_step: where on the dashboards' axis the table stands.
    """
    names = [described["name"] for described in record.dictionaries]
    for name in names:
        key = "train/sae/features" if len(names) == 1 else f"train/sae/{name}/features"
        table = top_features(record, name)
        for reporter in callbacks:
            if isinstance(reporter, TensorBoardCallback) and reporter.tb_writer is not None:
                reporter.tb_writer.add_text(key, as_markdown(table), global_step)
            elif isinstance(reporter, WandbCallback):
                _publish_wandb(key, table, global_step)
            elif isinstance(reporter, TrackioCallback):
                _publish_trackio(key, table, global_step)


def top_features(record: RunRecord, dictionary: str) -> pd.DataFrame:
    """The columns of `RunRecord.features` that a person reads first, with the sides under the trainer's own names."""
    features = record.features(dictionary).head(ROWS)
    sides = dict(zip(("chosen", "rejected"), record.manifest["sides"] or (), strict=False))
    return features[[*COLUMNS, *sides, "trend"]].rename(columns=sides)


def as_markdown(table: pd.DataFrame) -> str:
    """The table for TensorBoard's Text tab."""
    rows = [
        [f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
        for row in table.itertuples(index=False)
    ]
    lines = [list(table.columns), ["---"] * len(table.columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _publish_wandb(key: str, table: pd.DataFrame, global_step: int) -> None:
    import wandb

    if wandb.run is not None:  # WANDB_DISABLED
        wandb.run.log({key: wandb.Table(dataframe=table), "train/global_step": global_step})


def _publish_trackio(key: str, table: pd.DataFrame, global_step: int) -> None:
    import trackio

    trackio.log({key: trackio.Table(dataframe=table), "train/global_step": global_step})
