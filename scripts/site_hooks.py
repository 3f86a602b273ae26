"""What mkdocs cannot know by itself: pages made from the notebook, the option parsers and the project's own files."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from trl_sae_audit.cli import main as cli

ROOT = Path(__file__).parent.parent
STUDIES = "What was measured"
"""The part of the menu that studies are added to."""


def on_config(config: MkDocsConfig) -> None:
    """Put every study into the menu."""
    section = next(part for part in config.nav or [] if STUDIES in part)
    section[STUDIES] += [
        f"studies/{page.name}" for page in sorted(Path(config.docs_dir, "studies").glob("*.md"))
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are made."""
    pages: dict[str, str | bytes] = {
        "reference/command-line.md": command_line(),
        "reference/changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        "reference/contributing.md": (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
        **notebook("tutorial"),
    }
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))


def command_line() -> str:
    """Every command's own `--help`."""
    parts = ["# Command line", f"```text\n{cli.top_level_help()}\n```"]
    for name in cli.COMMANDS:
        parts.append(f"## {name}\n\n```text\n{help_of(name)}\n```")
    return "\n\n".join(parts)


def help_of(*command: str) -> str:
    """What `trl-sae-audit COMMAND --help` prints in a terminal of 80 columns."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "80"
        try:
            cli.main([*command, "--help"])
        finally:
            del os.environ["COLUMNS"]
            if columns is not None:
                os.environ["COLUMNS"] = columns
    return printed.getvalue().rstrip()


def notebook(name: str) -> dict[str, Any]:
    """A notebook with its stored outputs as a page, and the pictures it shows."""
    page, resources = MarkdownExporter().from_filename(str(ROOT / "docs" / f"{name}.ipynb"))
    page += f"\n\nThis page is the notebook `docs/{name}.ipynb`, with the outputs of its last run.\n"
    return {f"{name}.md": page, **resources["outputs"]}
