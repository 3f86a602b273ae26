"""Run records written step by step, and what must hold of one."""

from pathlib import Path

import numpy as np

F = 5


HEADER = {
    "trainer": "DPOTrainer",
    "model": "tiny",
    "dictionaries": [
        {"name": "mine", "identity": "sha256:1", "hook_point": "model.layers.1", "d_sae": F, "d_model": 8}
    ],
    "config": {
        "arguments": {
            "learning_rate": 5e-6,
            "optim": Path("adamw"),
            "max_grad_norm": float("inf"),
            "seed": np.int64(3),
        },
        "watch": {"mine": {"sycophancy": 2}},
    },
}


OTHER = {"name": "other", "identity": "sha256:2", "hook_point": "model.layers.2", "d_sae": F, "d_model": 8}


def values_of(step):
    return np.random.default_rng(step).integers(-9, 10, (1, F)).astype(np.float32)


def take_step(writer, totals, step):
    """One optimizer step: a row a feature, and the totals of the same values."""
    values = values_of(step)
    totals.update(values, values, 0 * values, np.abs(values), np.abs(values) / 10)
    rows = {"step": [step] * F, "dictionary": ["mine"] * F, "feature": range(F), "attribution": values[0]}
    writer.append("steps", rows)


def write_steps(writer, totals, steps, every=1):
    for step in steps:
        take_step(writer, totals, step)
        if step % every == 0:
            writer.flush(step, {"mine": totals})
    return totals


def assert_consistent(record):
    """Rows and totals cover exactly the steps up to last_step, and agree."""
    expected = sum((values_of(step)[0] for step in range(1, record.last_step + 1)), np.zeros(F))
    if record.last_step == 0:
        assert "steps" not in record.tables
        return
    rows = record.steps("mine")
    assert sorted(rows["step"].unique()) == list(range(1, record.last_step + 1))
    assert len(rows) == F * record.last_step
    np.testing.assert_array_equal(rows.groupby("feature")["attribution"].sum(), expected)
    assert record.totals().steps == record.last_step
    np.testing.assert_array_equal(record.totals().attribution.sums["score"], expected)


def files_in(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {".lock"}


def named_in(record):
    return {entry["file"] for entry in record.manifest["files"]}


def parts_in(manifest, table):
    return [entry for entry in manifest["files"] if entry["file"].startswith(f"{table}/")]
