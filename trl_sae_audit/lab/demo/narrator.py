"""How the demo speaks: short paragraphs of at most 80 columns, and tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from ...console import Justify, single_line, table
from ...metric_names import feature_metric

WIDTH = 80
REWARDS = ("reward", "objective/scores")
"""What GRPO and PPO call the mean reward in their logs."""


class Narrator:
    """Says what is being done, and why.

    Args:
        console: to speak through.
    """

    def __init__(self, console: Console) -> None:
        console.file = sys.stdout  # keeps this one when a trainer's own prints are redirected
        console.width = min(console.width, WIDTH)
        self.console = console
        self._step = 0
        self._start = time.monotonic()

    def step(self, title: str, text: str) -> None:
        """Begin a numbered part: what happens in it, and why."""
        self._step += 1
        seconds = time.monotonic() - self._start
        self.console.print(
            Text.assemble((f"\n{self._step}. {title}", "bold"), (f"   [{seconds:.0f} s]", "dim"))
        )
        self.say(text)

    def say(self, text: str, style: str = "") -> None:
        """A paragraph."""
        self.console.print(Padding(Text(text, style), (0, 0, 0, 3)))

    def quote(self, name: str, text: str, style: str) -> None:
        """A text from the data, next to its name."""
        grid = Table.grid(padding=(0, 2))
        grid.add_column(min_width=8, justify="right", style="dim")
        grid.add_column(style=style)
        grid.add_row(name, text.strip())
        self.console.print(Padding(grid, (0, 0, 0, 3)))

    def table(self, title: str, columns: Mapping[str, Justify], rows: Iterable[Sequence[str | Text]]) -> None:
        """A table in the style of the commands."""
        self.console.print(Padding(table(title, columns, rows), (1, 0, 0, 2)))

    def copy(self, line: str) -> None:
        """A path or command, on one line."""
        self.console.print(single_line(f"   {line}"), crop=False)


class Progress(TrainerCallback):
    """Prints a line for each of the trainer's logs: the reward, if there is one, and what the steps select for in one feature.

    Args:
        narrator: prints the line.
        name: of the run.
        label: of the watched feature.
    """

    def __init__(self, narrator: Narrator, name: str, label: str) -> None:
        self.narrator = narrator
        self.name = name
        self.label = label

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if state.global_step % args.logging_steps:  # PPO logs every update
            return
        parts = [f"reward {logs[name]:.2f}" for name in REWARDS if name in logs]
        metric = feature_metric("sae", self.label, "selection")
        if metric in logs:
            parts.append(f"selection of “{self.label}”: {logs[metric]:+.4f}")
        if parts and "train_runtime" not in logs:
            self.narrator.say(f"{self.name:<13} step {state.global_step:>2}   {'   '.join(parts)}", "dim")
