"""How long does a report take, how large is it, and does it stay smooth? On a simulated run, everything else real.

Writes the run record of a long run over many features (random attribution with a few features that move; the steps' own
numbers drawn, not computed from gradients), then the report, then, where there is a Chromium, opens it, scrolls through it and
sorts its table, at the width of a phone and with its processor four times slower.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from trl_sae_audit import FeatureDictionary
from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.record.writer import RecordWriter
from trl_sae_audit.report import write_report

TOP = 20
BLOCK = 64


def simulate(directory: Path, steps: int, features: int) -> None:
    """A record of that size: totals of every feature, rows of the top features, gradient, health and log."""
    generator = np.random.default_rng(0)
    dictionary = FeatureDictionary(torch.randn(features, 16), "model.layers.12", "simulated")
    watch = {"one": 1, "two": 2, "three": 3}
    totals = FeatureTotals(features)
    drift = np.zeros(features)
    drift[:200] = generator.normal(0, 0.5, 200)
    noise = generator.normal(0, 1, (BLOCK, features)).astype(np.float32)
    header = {
        "trainer": "DPOTrainer", "model": "simulated", "sides": ["chosen", "rejected"],
        "dictionaries": [asdict(dictionary.info)], "config": {"watch": {dictionary.name: watch}, "top_k": TOP},
    }  # fmt: skip
    writer = RecordWriter.create(directory, header)
    variance = np.ones((BLOCK, features), np.float32)
    share = np.full((BLOCK, features), 1 / features, np.float32)
    for start in range(0, steps, BLOCK):
        n = min(BLOCK, steps - start)
        rows = noise[:n] + (drift * (start / steps)).astype(np.float32)
        totals.update(rows, 0.4 * rows, 0.6 * rows, variance[:n], share[:n], np.full(n, 7))
        step = np.arange(start + 1, start + n + 1)
        logged = np.concatenate([list(watch.values()), generator.integers(4, features, TOP)])
        count, names = n * len(logged), {feature: label for label, feature in watch.items()}
        values = rows[:, logged].reshape(-1)
        writer.append(
            "steps",
            {
                "step": np.repeat(step, len(logged)), "dictionary": [dictionary.name] * count,
                "feature": np.tile(logged, n), "label": [names.get(int(f), "") for f in logged] * n,
                "attribution": values, "standard_error": np.ones(count), "positive": 0.4 * values, "negative": 0.6 * values,
            },
        )  # fmt: skip
        own = [dictionary.name] * n
        writer.append(
            "gradient",
            {"step": step, "dictionary": own, "norm": 1 + generator.random(n), "coverage": np.full(n, 0.4),
             "coverage_random": np.full(n, 0.1), "finite": np.ones(n, bool)},
        )  # fmt: skip
        writer.append(
            "health",
            {"step": step, "dictionary": own, "fvu": np.full(n, 0.2), "token_fvu": np.full(n, 0.25), "l0": np.full(n, 40.0)},
        )  # fmt: skip
        writer.append("log", {"step": step, "name": ["loss"] * n, "value": generator.random(n)})
    writer.close("finished", steps, {dictionary.name: totals})


def look(page_path: Path, chromium: str) -> dict[str, float]:
    """Milliseconds until the page can be used, the longest frame of a scroll through it, and of a sort."""
    from playwright.sync_api import sync_playwright

    frames = """(act) => new Promise((done) => {
        let last = performance.now(), longest = 0, left = 60;
        const frame = (now) => {
            longest = Math.max(longest, now - last);
            last = now;
            if (act === "scroll") window.scrollBy(0, document.documentElement.scrollHeight / 60);
            left -= 1;
            if (left) requestAnimationFrame(frame); else done(longest);
        };
        if (act === "sort") document.querySelector('#table button[data-sort="lift"]').click();
        requestAnimationFrame(frame);
    })"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 390, "height": 844}, bypass_csp=True)
        page = context.new_page()
        page.goto("about:blank")
        context.new_cdp_session(page).send("Emulation.setCPUThrottlingRate", {"rate": 4})
        started = time.perf_counter()
        page.goto(page_path.as_uri())
        page.wait_for_selector("#table tbody tr")
        found = {"open": 1000 * (time.perf_counter() - started)}
        for act in ("scroll", "sort"):
            found[act] = page.evaluate(frames, act)
        browser.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--features", type=int, nargs="+", default=[65_536])
    options = parser.parse_args()
    columns = (
        "features",
        "steps",
        "wall s",
        "processor s",
        "MB",
        "peak memory MiB (with the simulation)",
        "open ms",
        "worst frame of a scroll ms",
        "sort ms",
    )
    table = Table(title="A report, built and opened", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    for features in options.features:
        with tempfile.TemporaryDirectory() as root:
            directory = Path(root) / "record"
            simulate(directory, options.steps, features)
            wall, processor = time.perf_counter(), time.process_time()
            page = write_report(directory)
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            seen = look(page, chromium) if chromium else {}
            cells = [
                f"{features:,}",
                f"{options.steps:,}",
                f"{wall:.1f}",
                f"{processor:.1f}",
                f"{page.stat().st_size / 1e6:.1f}",
            ]
            cells.append(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}")
            table.add_row(
                *cells, *(f"{seen[name]:.0f}" if seen else "–" for name in ("open", "scroll", "sort"))
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
