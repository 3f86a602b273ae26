"""What is saved by reading a prompt once, for each place where several answers follow one.

    OMP_NUM_THREADS=1 python scripts/bench_prompts.py
    OMP_NUM_THREADS=1 python scripts/bench_prompts.py --model DIR --sae DIR --data pairs.jsonl --max_length 160 --prompts 4

- sampling: new tokens a second, four answers a prompt, as many rows at a time as an audit samples, a run's drift in generations, and
  `verify --samples 4` (by default `verify` samples one answer a prompt, and each is read once in any case);
- the derivative along a step, in passes forward over the same rows, and with prompts read once;
- chosen and rejected: forward and backward with both answers after one copy of the prompt, in one row with an attention mask, beside
  two whole rows. Nothing does that: above the hook point the gradient of a prompt's tokens must be known for each answer, so only the
  layers below it could share, and the saving is that times their part of the model. The gradients are compared.

Processor seconds of runs in turns, and FLOPs as torch counts them, which other work on the machine does not change. Without a model,
a random Llama of 4 layers of 256.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from tiny import model_parser, parts_of
from torch.utils.flop_counter import FlopCounterMode
from trl import DPOConfig

from trl_sae_audit.audit.lookahead.generations import Generations
from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.lookahead.run import PROMPTS_TOGETHER
from trl_sae_audit.audit.lookahead.sampled_tokens import SampledTokens, SharedPrompts
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.callbacks.generations import _SAMPLED_TOGETHER
from trl_sae_audit.models import sampling as sampling_module
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import last_hidden_state
from trl_sae_audit.models.sampling import Sampling, sample_ids
from trl_sae_audit.verification.measured import sample_answers


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    build, tokenizer, rows, dictionary = parts_of(options, options.prompts)
    model: Any = build()
    model.eval()
    config = DPOConfig("unused", max_length=options.max_length, bf16=False, report_to="none", use_cpu=True)
    loss = PreferenceLoss(tokenizer, config)
    examples = loss.tokenize(list(enumerate(rows)))
    point = resolve_hook_point(model, dictionary.hook_names)
    ahead = Lookahead(
        model, point, dictionary, loss, UpdateRule(), lambda: [examples], lambda: [], method="forward"
    )
    sampled = sampling(options, model, tokenizer, [loss.prompt_of(example) for example in examples])
    derivatives(options, ahead, tokenizer, sampled)
    pairs(options, ahead, examples)


def sampling(options: argparse.Namespace, model: Any, tokenizer: Any, prompts: list[Any]) -> Generations:
    """With the prompts read once, and once an answer, for each that samples: those of the audit."""
    how = Sampling(answers=4, max_new_tokens=options.tokens)
    shared: Any = sampling_module._SharedPrompts
    plain = shared.of
    rows = [{"prompt": tokenizer.decode(prompt)} for prompt in prompts]
    sampled: dict[str, Callable[[], list[Any]]] = {
        "an audit": lambda: sample_ids(
            model, tokenizer, prompts, how, batch_size=how.answers * PROMPTS_TOGETHER
        ),
        "drift in generations": lambda: sample_ids(
            model, tokenizer, prompts, how, batch_size=_SAMPLED_TOGETHER
        ),
        "verify --samples 4": lambda: [
            [answer] for _, _, answer in sample_answers(model, tokenizer, rows, sampling=how, batch_size=16)
        ],
    }
    found: dict[str, Any] = {}

    def run(who: str, of: Any, name: str) -> None:
        shared.of = of
        found[name] = sampled[who]()
        shared.of = plain

    print(f"sampling, {len(prompts)} prompts of {sum(map(len, prompts)) / len(prompts):.0f} tokens:")
    for who in sampled:
        names = {f"{who}, prompt read once": plain, f"{who}, for every answer": lambda model: None}
        times, flops = compare(
            {name: partial(run, who, of, name) for name, of in names.items()}, options.rounds
        )
        for name, seconds in times.items():
            tokens = sum(len(answer) for answers in found[name] for answer in answers)
            print(
                f"  {name}: {tokens / seconds:.0f} tokens/s, {flops[name] / tokens / 1e6:.1f} MFLOP a token"
            )
    return Generations(prompts, found["an audit, prompt read once"])


def derivatives(
    options: argparse.Namespace, ahead: Lookahead, tokenizer: Any, generations: Generations
) -> None:
    """Along a random direction."""
    generator = torch.Generator().manual_seed(0)
    line = ahead.jvp.line(
        {name: torch.randn(value.shape, generator=generator) for name, value in ahead.parameters.items()}
    )
    batches = list(generations.batches(tokenizer, 16, torch.device("cpu")))
    answers = [SampledTokens.of(prompts, batch) for prompts, batch in batches]

    def forward(shared: bool) -> None:
        for some in answers:
            some.shared = SharedPrompts.of(some.batch) if shared else None
            some.log_probs(ahead)(ahead.parameters)

    def along(shared: bool) -> None:
        for some in answers:
            some.shared = SharedPrompts.of(some.batch) if shared else None
            some.change_along(ahead, line)

    with torch.no_grad():
        along(False)  # verifies the derivative by differences
        runs = {
            "forward, whole rows": partial(forward, False),
            "forward, prompts once": partial(forward, True),
            "derivative, whole rows": partial(along, False),
            "derivative, prompts once": partial(along, True),
        }
        print("log-probabilities of the sampled answers, in passes forward over whole rows:")
        show(*compare(runs, options.rounds))


def pairs(options: argparse.Namespace, ahead: Lookahead, examples: list[Any]) -> None:
    """One row a pair beside two, forward and backward; every pair alone, so that nothing is padding."""
    model: Any = ahead.model
    loss: Any = ahead.loss
    batches = [loss.collate([example]) for example in examples]
    answers = [
        [ids[own.bool()] for ids, own in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
        for batch in batches
    ]
    prompts = [torch.tensor(loss.prompt_of(example)) for example in examples]
    gradients: dict[str, list[torch.Tensor]] = {}

    def score(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return ahead.gradients.head.log_probs(hidden, targets).sum()

    def run(name: str) -> None:
        model.zero_grad()
        for prompt, both in zip(prompts, answers, strict=True):
            (whole if name == "two rows" else packed)(prompt, both)
        gradients[name] = [value.grad for value in model.parameters() if value.grad is not None]

    def whole(prompt: torch.Tensor, both: list[torch.Tensor]) -> None:
        for sign, answer in zip((1, -1), both, strict=True):
            ids = torch.cat([prompt, answer])[None]
            hidden = last_hidden_state(
                ahead.point.decoder, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            )
            (sign * score(hidden[0, len(prompt) - 1 : -1], answer)).backward()

    def packed(prompt: torch.Tensor, both: list[torch.Tensor]) -> None:
        first, second = both
        n, a = len(prompt), len(first)
        ids = torch.cat([prompt, first, second])[None]
        places = torch.cat([torch.arange(n + a), torch.arange(n, n + len(second))])[None]
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen[n + a :, n : n + a] = False
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
        output = ahead.point.decoder(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False)
        hidden = output.last_hidden_state[0]
        last = hidden[n - 1 : n]
        value = score(torch.cat([last, hidden[n : n + a - 1]]), first)
        (value - score(torch.cat([last, hidden[n + a : -1]]), second)).backward()

    runs = {name: partial(run, name) for name in ("two rows", "one row")}
    print("forward and backward over the pairs:")
    times, flops = compare(runs, options.rounds)
    show(times, flops)
    one, other = (torch.cat([value.flatten() for value in gradients[name]]) for name in runs)
    lengths = [(len(prompt), sum(map(len, both))) for prompt, both in zip(prompts, answers, strict=True)]
    again, tokens = sum(prompt for prompt, _ in lengths), sum(2 * prompt + both for prompt, both in lengths)
    layers = [place for place, part in enumerate(ahead.point.path.split(".")) if part.isdigit()]
    depth = int(ahead.point.path.split(".")[layers[0]]) + 1
    count = model.config.num_hidden_layers
    below = depth / count
    print(
        f"  gradients differ by {float((one - other).norm() / one.norm()):.1e}; {again} of {tokens} tokens are read again; the hook point is "
        f"after {depth} of {count} layers: about {below * (1 - times['one row'] / times['two rows']):.1%} could be saved in time, "
        f"{below * (1 - flops['one row'] / flops['two rows']):.1%} in FLOPs"
    )


def compare(runs: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median processor seconds of each, in turns, and FLOPs."""
    flops: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        for name, run in runs.items():
            began = time.process_time()
            if number:
                run()
            else:
                with FlopCounterMode(display=False) as counter:
                    run()
                flops[name] = float(counter.get_total_flops())
            times[name].append(time.process_time() - began)
    return {name: statistics.median(each[1:] or each) for name, each in times.items()}, flops


def show(times: dict[str, float], flops: dict[str, float]) -> None:
    """Each as a multiple of the first."""
    first = next(iter(times))
    for name, seconds in times.items():
        print(
            f"  {name}: {seconds / times[first]:.2f} in time ({seconds:.2f} s), {flops[name] / flops[first]:.2f} in FLOPs"
        )


if __name__ == "__main__":
    main()
