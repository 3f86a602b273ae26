"""The figures in the tables of results are those of the pages they link to: a figure has one place, and the README and the list of the
studies quote it."""

from __future__ import annotations

import re

import pytest
from helpers.pages import ROOT

TABLES = {"README.md": "## Results", "docs/studies/README.md": "## In the lab"}
ROWS = [
    (page, [cell.strip() for cell in line.strip().strip("|").split("|")])
    for page, heading in TABLES.items()
    for line in (ROOT / page).read_text(encoding="utf-8").split(heading)[1].split("\n## ")[0].splitlines()
    if "](" in line and line.startswith("|")
]


def numbers(text: str) -> set[str]:
    """Numbers as they are written, a share of three decimals also as a percentage."""
    plain = re.sub(r"\s*%", "%", text.replace("−", "-").replace(",", ""))
    written = {number.rstrip("%") for number in re.findall(r"\d+(?:\.\d+)?%?", plain)}
    shares = {number for number in written if re.fullmatch(r"0\.\d{3}", number)}
    return written | {format(100 * float(share), ".1f") for share in shares}


def test_there_are_rows() -> None:
    assert {page for page, _ in ROWS} == set(TABLES)
    assert len(ROWS) >= 10


@pytest.mark.parametrize(("page", "row"), ROWS, ids=[row[0][:40] for _, row in ROWS])
def test_every_figure_stands_in_the_page_it_is_of(page: str, row: list[str]) -> None:
    link = re.search(r"\(([^)#]*)", row[-1])
    assert link is not None
    linked = (ROOT / page).parent / link.group(1)
    there = numbers(linked.read_text(encoding="utf-8"))
    missing = {number for number in numbers(row[1]) if number not in there}
    assert not missing, f"{missing} in {page}, but not in {linked.name}"
