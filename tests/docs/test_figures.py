"""The figures in the README's table of results are those of the pages it links to: a figure has one place, and the README quotes it."""

from __future__ import annotations

import re

import pytest
from helpers.pages import ROOT

ROWS = [
    [cell.strip() for cell in line.strip().strip("|").split("|")]
    for line in (ROOT / "README.md")
    .read_text(encoding="utf-8")
    .split("## Results")[1]
    .split("\n## ")[0]
    .splitlines()
    if "](docs/" in line and line.startswith("|")
]


def numbers(text: str) -> set[str]:
    """Numbers as they are written, a share of three decimals also as a percentage."""
    plain = re.sub(r"\s*%", "%", text.replace("−", "-").replace(",", ""))
    written = {number.rstrip("%") for number in re.findall(r"\d+(?:\.\d+)?%?", plain)}
    shares = {number for number in written if re.fullmatch(r"0\.\d{3}", number)}
    return written | {format(100 * float(share), ".1f") for share in shares}


def test_there_are_rows() -> None:
    assert len(ROWS) >= 5


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[-1].partition("]")[0].strip("["))
def test_every_figure_stands_in_the_page_it_is_of(row: list[str]) -> None:
    page = re.search(r"\((docs/[^)#]*)", row[-1])
    assert page is not None
    there = numbers((ROOT / page.group(1)).read_text(encoding="utf-8"))
    missing = {number for number in numbers(row[1]) if number not in there}
    assert not missing, f"{missing} in the README, but not in {page.group(1)}"
