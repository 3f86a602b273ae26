"""Pictures of what the terminal shows: every command's help, and commands run in a directory such as the demo's, to be looked at.

`python scripts/pictures.py pictures` draws the helps at 80 and 120 columns, light and dark; with `--run commands.txt --cwd runs` also the
output of each line of that file, in which {width} stands for the columns. Needs chromium.
"""

from __future__ import annotations

import argparse
import html
import io
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, MONOKAI, TerminalTheme
from rich.text import Text

from trl_sae_audit.cli.main import COMMANDS

THEMES: dict[str, TerminalTheme] = {"light": DEFAULT_TERMINAL_THEME, "dark": MONOKAI}
COMMAND = (
    "import sys; sys.argv[0] = 'trl-sae-audit'; from trl_sae_audit.cli.main import main; sys.exit(main())"
)
LINE, CHARACTER, MARGIN = 16, 7.85, 40  # pixels


def printed(argv: list[str], width: int, cwd: Path) -> str:
    """What a command prints in a terminal of `width` columns, standard error included."""
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    terminal = {"COLUMNS": str(width), "FORCE_COLOR": "1", "TERM": "xterm-256color", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *argv],
        cwd=cwd,
        env=os.environ | terminal,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.stdout


def filled(argv: list[str], width: int) -> list[str]:
    return [word.replace("{width}", str(width)) for word in argv]


def page(shown: dict[str, str], width: int, theme: TerminalTheme) -> tuple[str, int]:
    """HTML of several outputs, each as a terminal of `width` columns, and its height in pixels. What is wider wraps, as there."""
    parts, lines = [], 0
    for title, text in shown.items():
        console = Console(width=width, file=io.StringIO(), record=True, force_terminal=True)
        console.print(Text.from_ansi(text), overflow="fold", crop=False)
        code = console.export_html(theme=theme, inline_styles=True, code_format="<pre>{code}</pre>")
        parts.append(f"<h2>$ {html.escape(title)}</h2>{code}")
        lines += code.count("\n") + 4
    colours = f"background:{theme.background_color.hex};color:{theme.foreground_color.hex}"
    style = f"body{{margin:12px;{colours}}} pre,h2{{font:13px/{LINE}px monospace;margin:0 0 16px}} h2{{font-weight:bold;margin:0}}"
    edge = f"pre{{width:{width}ch;border-right:1px dotted gray}}"
    return f"<meta charset=utf-8><style>{style}{edge}</style>{''.join(parts)}", lines * LINE + MARGIN


def draw(document: str, size: tuple[int, int], target: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "page.html"
        source.write_text(document, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        window = f"--window-size={size[0]},{size[1]}"
        command = ["chromium", *flags, window, f"--screenshot={target}", source.as_uri()]
        subprocess.run(command, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output_dir", type=Path, help="where the pictures go")
    parser.add_argument(
        "--run", type=Path, help="a file with a command a line, without trl-sae-audit, to run too"
    )
    parser.add_argument("--cwd", type=Path, default=Path(), help="where these run")
    parser.add_argument("--widths", type=int, nargs="+", default=[80, 120], help="columns")
    parser.add_argument("--no_helps", action="store_true", help="only what --run says")
    parser.add_argument("--a_picture", type=int, default=3, help="commands on a picture")
    options = parser.parse_args()
    helps = [] if options.no_helps else [["--help"], *([name, "--help"] for name in COMMANDS)]
    lines = options.run.read_text(encoding="utf-8").splitlines() if options.run else []
    commands = [*helps, *(shlex.split(line) for line in lines if line.strip())]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for width in options.widths:
        shown = {shlex.join(argv): printed(filled(argv, width), width, options.cwd) for argv in commands}
        (options.output_dir / f"{width}.txt").write_text(
            "\n".join(f"$ {title}\n{text}" for title, text in shown.items()), encoding="utf-8"
        )
        titles = list(shown)
        for name, theme in THEMES.items():
            for start in range(0, len(titles), options.a_picture):
                part = {title: shown[title] for title in titles[start : start + options.a_picture]}
                document, height = page(part, width, theme)
                size = (round(width * CHARACTER) + MARGIN, height)
                draw(document, size, options.output_dir / f"{width}-{name}-{start:02}.png")


if __name__ == "__main__":
    main()
