"""The site builds without a broken link and asks nothing of the outside; the tutorial runs from top to bottom."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import nbformat
import pytest
import yaml
from helpers.pages import ROOT
from mkdocs.commands.build import build
from mkdocs.config import load_config

import trl_sae_audit
from trl_sae_audit.cli import main as cli

sys.path.insert(0, str(ROOT / "scripts"))
import notebook

OUTSIDE = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//[^>]*>"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|preconnect|preload|icon|dns-prefetch))[^>]*href=["'](?:https?:)?//[^>]*>"""
    r"""|(?:url\(|@import )["']?(?:https?:)?//[^)]*\)"""
)
"""What makes a browser ask another host when it shows a page."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(directory))
    assert config.strict
    warned: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mkdocs").addHandler(handler)
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    logging.getLogger("mkdocs").removeHandler(handler)
    assert not warned
    return directory


def test_no_page_asks_another_host(site: Path) -> None:
    shown = [path for path in site.rglob("*") if path.suffix in (".html", ".css")]
    assert len(shown) > 20
    for path in shown:
        assert not OUTSIDE.findall(path.read_text(encoding="utf-8")), path


def test_outside_is_recognised() -> None:
    for asked in (
        '<script async src="https://cdn/x.js"></script>',
        '<link rel="preconnect" href="https://fonts.gstatic.com">',
        '<link href="//fonts/css" rel="stylesheet">',
        "@font-face{src:url(https://fonts/x.woff2)}",
    ):
        assert OUTSIDE.search(asked), asked
    assert not OUTSIDE.search('<a href="https://huggingface.co">a link is followed by people only</a>')


def test_the_reference_has_every_public_name_and_command(site: Path) -> None:
    python = (site / "reference" / "python.html").read_text(encoding="utf-8")
    for name in trl_sae_audit.__all__:
        if not name.startswith("__"):
            assert f'id="trl_sae_audit.{name}"' in python, name
    shell = (site / "reference" / "command-line.html").read_text(encoding="utf-8")
    for name in cli.COMMANDS:
        assert f"usage: trl-sae-audit {name}" in shell


def test_the_site_has_every_page(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        built = site / page.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file() or built.with_name("index.html").is_file(), page
    assert "iVBOR" in (site / "tutorial.html").read_text() or list(site.glob("output*.png")), "no picture"


def test_the_tutorial_runs_and_is_stored_as_it_runs() -> None:
    stored = nbformat.read(notebook.TUTORIAL, as_version=4)
    run = notebook.run()
    cells = [(old, new) for old, new in zip(stored.cells, run.cells, strict=True) if old.cell_type == "code"]
    assert len(cells) > 8
    for old, new in cells:
        assert [output.output_type for output in old.outputs] == [
            output.output_type for output in new.outputs
        ]


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (trl_sae_audit.__version__, "Apache-2.0")


def test_the_pages_outside_the_site_link_to_what_is_there() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"
