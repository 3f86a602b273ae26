"""What contexts cost: the seconds of a real audit's pass, or of training steps, and how many of them went into contexts; memory.

    python scripts/bench_contexts.py --model ./model --dictionary ./sae --data pairs.jsonl
    python scripts/bench_contexts.py --steps 20 --model ./model --dictionary ./sae --data pairs.jsonl
    python scripts/bench_contexts.py --memory 131072

The pass notes the strongest token of each answer while it computes the mean activation anyway; that part is timed by running its
operations alone on one answer of 128 tokens, times the answers. In training steps (without --model of a tiny model) the reservoir and
the writer are timed where they are called, and the search for a feature's strongest token by encoding twice, with it and without.
Whole steps with contexts and without: scripts/bench_overhead.py, whose differences are noise below some percents.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_overhead import make_trainer, real_parts, small_parts
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sae_audit import audit_preferences, load_dictionary
from trl_sae_audit.attribution.contexts import ContextReservoir
from trl_sae_audit.attribution.responses import DrawnTokens
from trl_sae_audit.audit import run
from trl_sae_audit.callbacks.contexts import ContextWriter
from trl_sae_audit.data.opener import open_dataset
from trl_sae_audit.saes.contexts import DRAWN, KEPT, PlaceKeeper, Places


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model")
    parser.add_argument("--dictionary")
    parser.add_argument("--dataset", "--data", dest="data")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--memory", type=int, help="only the memory of the places of so many features")
    parser.add_argument("--steps", type=int, help="training steps in place of an audit")
    parser.add_argument("--batch_size", type=int, default=2, help="pairs of such a step")
    options = parser.parse_args()
    if options.memory:
        memory(options.memory)
    elif options.steps:
        training(options)
    else:
        audit(options)


def audit(options: argparse.Namespace) -> None:
    """Processor time of a whole audit without lookahead, and of its part that is contexts alone."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    dictionary = load_dictionary(options.dictionary)
    data = open_dataset(options.data).select(range(options.pairs))
    with timed_contexts() as spent:
        started = time.process_time()
        made = audit_preferences(model, tokenizer, data, dictionary, lookahead=None, progress=False)
        whole = time.process_time() - started
        started = time.process_time()
        made._words()
        words = time.process_time() - started
    hidden = torch.randn(128, dictionary.d_model)
    activations = dictionary.encode(hidden)
    kept = activations[:, (activations != 0).any(0)]
    answers = 2 * options.pairs
    notes = answers * min(note_peaks(kept) for _ in range(50))
    contexts = spent[0] + words + notes
    print(
        f"{options.pairs} pairs, {dictionary.d_sae} features: pass {whole:.1f} s of processor time; contexts {contexts:.2f} s, "
        f"{contexts / (whole + words):.1%}: notes {notes:.2f}, gathering and decoding {spent[0]:.2f}, words {words:.2f}"
    )


def training(options: argparse.Namespace) -> None:
    """Processor time of whole DPO steps with the default scores, and of what contexts do in them."""
    how = argparse.Namespace(
        **vars(options),
        features=None,
        warmup=0,
        rounds=options.steps,
        max_length=160,
        logging_steps=10,
        optim="adamw_torch",
    )
    with tempfile.TemporaryDirectory() as root, timed_training() as spent:
        parts = real_parts(how) if options.model else small_parts(how)
        trainer = make_trainer("default scores", parts, how, Path(root))
        started = time.process_time()
        trainer.train()
        whole = time.process_time() - started - spent["encode once more"]
    contexts = sum(spent.values()) - spent["encode once more"]
    told = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in spent.items())
    print(
        f"{options.steps} steps of {options.batch_size} pairs: {whole:.1f} s of processor time; contexts {contexts / whole:.2%} ({told})"
    )


@contextmanager
def timed_training() -> Iterator[dict[str, float]]:
    places = [
        (ContextReservoir, "add"),
        (ContextReservoir, "settle"),
        (ContextWriter, "write"),
        (DrawnTokens, "encode"),
    ]
    plain = {name: getattr(owner, name) for owner, name in places}
    spent = dict.fromkeys(("add", "settle", "write", "peaks", "encode once more"), 0.0)
    inside = []

    def timed(name: str) -> Any:
        def run(*arguments: Any, **more: Any) -> Any:
            inside.append(name)
            started = time.process_time()
            result = plain[name](*arguments, **more)
            inside.pop()
            if not inside:  # a write settles
                spent[name] += time.process_time() - started
            return result

        return run

    def encode(drawn: DrawnTokens, dictionary: Any, *, peaks: bool) -> Any:
        times = [time.process_time()]
        for with_peaks in (False, peaks):
            result = plain["encode"](drawn, dictionary, peaks=with_peaks)
            times.append(time.process_time())
        spent["encode once more"] += times[1] - times[0]
        spent["peaks"] += times[2] - times[1] - (times[1] - times[0])
        return result

    for owner, name in places:
        setattr(owner, name, encode if name == "encode" else timed(name))
    try:
        yield spent
    finally:
        for owner, name in places:
            setattr(owner, name, plain[name])


@contextmanager
def timed_contexts() -> Iterator[list[float]]:
    spent, plain = [0.0], run.gather_contexts

    def gather(store: Any, tokenizer: Any) -> None:
        started = time.process_time()
        plain(store, tokenizer)
        spent[0] += time.process_time() - started

    run.gather_contexts = gather
    try:
        yield spent
    finally:
        run.gather_contexts = plain


def note_peaks(kept: torch.Tensor) -> float:
    """Seconds of what the pass does for contexts in one answer of 128 tokens: its operations beside those for the means."""
    largest, peak, count = kept[0].clone(), torch.zeros(kept.shape[1]).int(), torch.zeros(kept.shape[1]).int()
    place, numbers = kept.abs().argmax(0), torch.arange(len(kept)).int()
    started = time.perf_counter()
    higher = largest.abs() > largest
    peak = torch.where(higher, numbers[place], peak)
    count += (kept != 0).sum(0, dtype=torch.int32)
    return time.perf_counter() - started


def memory(d_sae: int) -> None:
    """Peak memory of the places of a dictionary, by a stream in which every feature fills all of them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    keeper, rng = PlaceKeeper(d_sae), np.random.default_rng(0)
    started = time.process_time()
    for text in range(40):
        features = np.arange(d_sae, dtype=np.int32)
        values = rng.random(d_sae, dtype=np.float32)
        keeper.add(Places(features, values, np.full(d_sae, text), np.zeros(d_sae, np.int32)))
    spent = time.process_time() - started
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    kept = len(keeper.strongest) + len(keeper.drawn)
    print(
        f"{d_sae:,} features: {kept:,} places ({KEPT} + {DRAWN} each), peak memory {peak:.0f} MiB above the start, {spent:.1f} s for 40 texts"
    )


if __name__ == "__main__":
    main()
