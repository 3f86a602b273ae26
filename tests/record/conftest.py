"""A finished record, and processes that start clean."""

import multiprocessing

import pytest
from helpers.records import HEADER, F, write_steps

from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.record.writer import RecordWriter


@pytest.fixture
def written(tmp_path):
    """A finished record of seven steps."""
    writer = RecordWriter.create(tmp_path / "run", HEADER)
    totals = write_steps(writer, FeatureTotals(F), range(1, 8))
    writer.close("finished", 7, {"mine": totals})
    return tmp_path / "run"


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "trl_sae_audit.record.reader", "trl_sae_audit.record.writer"])
    return context
