"""How long an audit will take, told before it begins: from counts, and from the model's own pace on a few of the tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState

from ..models.batches import token_batches
from ..models.prompt_cache import can_continue_prompts
from ..models.residual_stream import evaluation_mode, last_hidden_state
from ..models.sampling import sample_ids
from .batches import tokens_at_once
from .lookahead.run import PROMPTS_TOGETHER, AuditLookahead
from .objectives import TokenizedExample

if TYPE_CHECKING:
    from .run import AuditRun

GRADIENT, PLAIN, DERIVATIVE = 3.3, 1.8, 3.4
"""Forward passes that the other passes take as long as: with a backward pass to the parameters; with one to the hook point; with a
derivative along a step. Measured: the first and second on a model of 135M parameters (scripts/bench_lookahead.py, bench_audit.py speed),
the derivative, which is every product three times and without fused attention, on a small one (bench_prompts.py)."""
_SHORT, _LONG = 5, 600
_FEWEST = 16
"""Rows that a first look is proposed on."""
_TRIED = (2, 6)  # tokens of the answers that are sampled to see how long one takes


@dataclass(frozen=True)
class Duration:
    """Seconds of an audit, by what takes them.

    Attributes:
        parts: what → its seconds.
        plain: of the same audit without its lookahead.
        a_row: of each row, its lookahead included, where there are few.
    """

    parts: dict[str, float]
    plain: float = 0.0
    a_row: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        if self.seconds < _SHORT:
            return f"This audit will take less than {_SHORT} s."
        listed = ", ".join(f"{span(value)} {what}" for what, value in self.parts.items())
        return f"This audit will take about {span(self.seconds)}: {listed}.{self._cheaper()}"

    def _cheaper(self) -> str:
        """What a first look would cost, where the audit takes long."""
        if self.seconds <= _LONG or not self.a_row:
            return ""
        ways = [f"{span(self.plain)} without the lookahead (--no_lookahead)"]
        rows = int(_LONG / self.a_row)
        if rows >= _FEWEST:
            ways.append(f"{span(rows * self.a_row)} on {rows:,} rows (--max_rows {rows})")
        return f" A first look takes less: about {', or '.join(ways)}."


def estimate_duration(run: AuditRun, ahead: AuditLookahead) -> Duration:
    """Of an audit with its lookahead, on as many processes as there are.

    Takes a forward pass over one batch and some tokens of sampled answers.
    """
    examples, processes = ahead.split.examples, PartialState().num_processes
    if not examples:
        return Duration({})
    forward = _seconds_a_token(run, examples)
    an_example = (
        forward * run.loss.rows_per_example * sum(example.size for example in examples) / len(examples)
    )
    others = max(ahead.rows - len(examples), 0)
    parts = {f"the gradient of {len(examples):,} examples": GRADIENT * an_example * len(examples)}
    if others:
        parts[f"{others:,} more"] = PLAIN * an_example * others
    a_row = GRADIENT * an_example
    sampling = ahead.config.sampling
    if sampling is not None:
        prompts = ahead.prompts
        answers = sampling.answers * len(prompts)
        once = 1 if can_continue_prompts(run.point.decoder) else sampling.answers
        read = once * sum(map(len, prompts)) + answers * sampling.max_new_tokens
        asked = {
            f"sampling {answers:,} answers": _sampling_seconds(run, ahead),
            "derivatives along the step": DERIVATIVE * ahead.config.groups * forward * read,
        }
        parts |= asked
        is_share = len(prompts) < ahead.config.prompts  # fewer rows then have fewer prompts
        a_row += sum(asked.values()) / (ahead.rows if is_share else 4 * len(prompts))
    return Duration(
        {what: value / processes for what, value in parts.items()},
        plain=PLAIN * an_example * ahead.rows / processes,
        a_row=a_row / processes,
    )


@torch.no_grad()
def _seconds_a_token(run: AuditRun, examples: Sequence[TokenizedExample]) -> float:
    """Of a forward pass, on the batch of middling length."""
    lengths = [example.size * run.loss.rows_per_example for example in examples]
    batches = list(token_batches(lengths, tokens_at_once(run.model)))
    places = batches[len(batches) // 2]
    batch = run.loss.collate([examples[place] for place in places])
    inputs = {name: batch[name].to(run.device) for name in ("input_ids", "attention_mask")}
    with evaluation_mode(run.model):
        seconds = [_timed(lambda: last_hidden_state(run.point.decoder, inputs), run.device) for _ in range(2)]
    return min(seconds) / sum(lengths[place] for place in places)


def _sampling_seconds(run: AuditRun, ahead: AuditLookahead) -> float:
    sampling, prompts = ahead.config.sampling, ahead.prompts[:PROMPTS_TOGETHER]
    assert sampling is not None

    def sample(tokens: int) -> object:
        few = replace(sampling, max_new_tokens=min(tokens, sampling.max_new_tokens))
        return sample_ids(
            run.model, ahead.tokenizer, prompts, few, batch_size=sampling.answers * len(prompts)
        )

    short, long = (_timed(partial(sample, tokens), run.device) for tokens in _TRIED)
    a_token = max(long - short, 0.0) / (_TRIED[1] - _TRIED[0])
    calls = len(ahead.prompts) / len(prompts)
    return calls * (short + a_token * max(sampling.max_new_tokens - _TRIED[0], 0))


def _timed(function: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def span(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
