"""Tables of contexts and drift whose columns are not what they were: one sentence, not a traceback."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from trl_sae_audit import AuditError
from trl_sae_audit.record.columns import check_columns
from trl_sae_audit.record.contexts import COLUMNS, CONTEXTS

ROWS = pd.DataFrame(
    {
        "step": [1],
        "dictionary": ["d"],
        "feature": [3],
        "source": ["chosen"],
        "activation": [0.5],
        "prompt": ["p"],
        "before": ["b"],
        "at": ["a"],
        "after": ["c"],
    }
)


def test_what_a_run_writes_is_right_and_other_tables_are_not_looked_at() -> None:
    assert {*COLUMNS} <= {*ROWS}
    check_columns(ROWS, CONTEXTS, Path("r"))
    check_columns(ROWS[:0], CONTEXTS, Path("r"))
    check_columns(pd.DataFrame({"x": [1]}), "log", Path("r"))


@pytest.mark.parametrize("changed", [{"at": None}, {"at": [b"\xff"]}, {"activation": ["x"]}, {"source": [1]}])
def test_a_column_that_is_missing_or_of_another_type(changed: dict[str, list | None]) -> None:
    ((name, values),) = changed.items()
    rows = ROWS.drop(columns=name) if values is None else ROWS.assign(**{name: values})
    with pytest.raises(AuditError, match=f"Table 'contexts' of the record in r has no column '{name}'"):
        check_columns(rows, CONTEXTS, Path("r"))
