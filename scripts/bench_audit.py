"""How fast an audit is, how much memory and disk it takes, and what its statistics find.

    python scripts/bench_audit.py speed --model /path/to/gemma --sae /path/to/sae --data pairs.jsonl --pairs 16
    python scripts/bench_audit.py lookahead --model /path/to/gemma --sae /path/to/sae --data pairs.jsonl --pairs 8
    python scripts/bench_audit.py scale --pairs 100000
    python scripts/bench_audit.py tiny --pairs 100000
    python scripts/bench_audit.py power

`speed` and `lookahead` print ratios of times of alternating runs on the same batches in one process, so that a busy
machine slows both alike. `tiny` audits that many streamed pairs with a model of a few thousand weights, so that what
remains is the audit itself; `scale` leaves the model out altogether. `power` plants effects of known size.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from trl_sae_audit import audit_preferences, load_dictionary
from trl_sae_audit.audit.gradients import PROMPT_TAIL, AuditPass, ExampleArrays
from trl_sae_audit.audit.lookahead.lookahead import Lookahead
from trl_sae_audit.audit.lookahead.optimizer_step import UpdateRule
from trl_sae_audit.audit.objectives import PreferenceLoss, TokenizedExample
from trl_sae_audit.audit.prompt_states import state_size
from trl_sae_audit.audit.statistics import ResamplingConfig, feature_statistics
from trl_sae_audit.audit.store import AuditStore, Part
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.models.hook_points import HookPoint, resolve_hook_point
from trl_sae_audit.models.language_head import LanguageHead
from trl_sae_audit.models.residual_stream import last_hidden_state
from trl_sae_audit.saes.dictionary import FeatureDictionary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "lookahead", "tiny", "scale", "power"))
    parser.add_argument("--model")
    parser.add_argument("--dictionary", "--sae", dest="sae")
    parser.add_argument("--dataset", "--data", dest="data")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    {"speed": speed, "lookahead": lookahead, "tiny": tiny, "scale": scale, "power": power}[options.what](
        options
    )


def load(
    options: argparse.Namespace,
) -> tuple[nn.Module, HookPoint, FeatureDictionary, PreferenceLoss, list[TokenizedExample]]:
    from trl import DPOConfig

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dictionary = load_dictionary(options.sae)
    args = DPOConfig("unused", max_length=options.max_length, bf16=False, report_to="none")
    loss = PreferenceLoss(tokenizer, args)
    rows = [(row.index, row.columns) for row in iterate_rows(options.data) if row.columns is not None]
    examples = loss.tokenize(rows[: options.pairs])
    return model, resolve_hook_point(model, dictionary.hook_names), dictionary, loss, examples


def speed(options: argparse.Namespace) -> None:
    """Audit against a forward pass alone, and against the same gradients from a full backward pass."""
    model, point, dictionary, loss, examples = load(options)
    tokens = sum(int(loss.collate([example])["attention_mask"].sum()) for example in examples)
    audit = AuditPass(model, point, dictionary, loss)
    no_activations = AuditPass(model, point, dictionary, loss, activations=False)
    head = LanguageHead(model, point.decoder)

    def batches() -> list[dict[str, torch.Tensor]]:
        ordered = sorted(examples, key=lambda example: -example.size)
        size = options.batch_size
        return [loss.collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]

    @torch.no_grad()
    def forward() -> None:
        """The floor: hidden states, and logits where the loss needs them."""
        for batch in batches():
            predicted = batch["completion_mask"][:, 1:].bool()
            hidden = last_hidden_state(point.decoder, batch)[:, :-1][predicted]
            head.score(hidden, batch["input_ids"][:, 1:][predicted])

    def naive() -> None:
        """Policy forward, reference forward, full backward, hook: what a trainer's step would cost."""
        for batch in batches():
            caught: list[torch.Tensor] = []
            handle = point.module.register_forward_hook(
                lambda m, a, output, caught=caught: caught.append(output)
            )
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            log_probs = _log_probs(model(**inputs).logits, batch)
            handle.remove()
            with torch.no_grad():
                reference = _log_probs(model(**inputs).logits, batch)
            hidden = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
            hidden.retain_grad()
            ratios = log_probs - reference
            first, second = ratios.chunk(2)
            (-torch.nn.functional.logsigmoid(0.1 * (first - second)).mean()).backward()
            dictionary.project(hidden.grad.sum(1))  # type: ignore[union-attr]
            for parameter in model.parameters():
                parameter.grad = None

    runs: dict[str, Callable[[], Any]] = {
        "forward alone": forward,
        "audit": lambda: audit.run(examples, options.batch_size),
        "audit without activations": lambda: no_activations.run(examples, options.batch_size),
        "full backward with reference": naive,
    }
    times = _alternate(runs, options.rounds)
    print(f"{len(examples)} pairs, {tokens} tokens, hook point {point.path}, d_sae {dictionary.d_sae}")
    for name, seconds in times.items():
        print(
            f"{name:32s} {tokens / seconds:8.1f} tokens/s  {times['forward alone'] / seconds:5.2f} of forward alone"
        )
    print(
        f"audit is {times['full backward with reference'] / times['audit']:.2f} times as fast as the full backward"
    )


def _log_probs(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    log_probs = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (log_probs * batch["completion_mask"][:, 1:]).sum(1)


def _alternate(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median processor seconds of each, run in turns: others on the machine do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.process_time()
            run()
            times[name].append(time.process_time() - started)
            print(f"  {name}: {times[name][-1]:.1f} s of processor time", flush=True)
    return {name: statistics.median(values) for name, values in times.items()}


def lookahead(options: argparse.Namespace) -> None:
    """Predicted change of every feature against one epoch of training on the same pairs."""
    model, point, dictionary, loss, examples = load(options)
    probe = examples[: max(2, len(examples) // 4)]
    size = options.batch_size

    def batches(some: list[TokenizedExample]) -> list[list[TokenizedExample]]:
        return [some[start : start + size] for start in range(0, len(some), size)]

    def ahead() -> Lookahead:
        return Lookahead(
            model, point, dictionary, loss, UpdateRule(), lambda: batches(examples), lambda: batches(probe)
        )

    def epoch() -> None:
        """Forward, reference forward, backward, AdamW: gradients as the lookahead takes them, and the rest."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        looking = ahead()
        for some in batches(examples):
            batch = loss.collate(some)
            predicted = batch["completion_mask"][:, 1:].bool()
            with torch.no_grad():
                hidden = last_hidden_state(point.decoder, batch)[:, :-1][predicted]
                looking.gradients.head.score(hidden, batch["input_ids"][:, 1:][predicted])
            for name, gradient in looking.gradients.of_batch(batch).items():
                looking.parameters[name].grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    def influence() -> None:
        looking.influence(looking.activation_gradient(0))

    looking = ahead()
    looking.update()
    times = _alternate(
        {
            "epoch": epoch,
            "predicted change": lambda: ahead().predicted_change(),
            "influence, one flag": influence,
        },
        options.rounds,
    )
    print(f"{len(examples)} pairs, probe of {len(probe)}, derivative: {looking.jvp.method}")
    for name, seconds in times.items():
        print(f"{name:24s} {seconds:8.1f} s  {seconds / times['epoch']:.2f} of one epoch")


def tiny(options: argparse.Namespace) -> None:
    """Time, memory and disk of whole audits by a model of next to no cost."""
    tokenizer = _word_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    model = LlamaForCausalLM(config)
    dictionary = FeatureDictionary(torch.randn(64, 16), "model.layers.0", "tiny")
    for pairs in (options.pairs // 10, options.pairs):
        with tempfile.TemporaryDirectory() as directory:
            started = time.process_time()
            stream = IterableDataset.from_generator(_random_pairs, gen_kwargs={"count": pairs})
            audit = audit_preferences(
                model,
                tokenizer,
                stream,
                dictionary,
                output_dir=directory,
                batch_size=256,
                lookahead=None,
                progress=False,
            )
            passed = time.process_time()
            audit.features()
            done = time.process_time()
            disk = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{pairs:7d} pairs: pass {passed - started:6.1f} s, statistics {done - passed:6.1f} s of one core, peak memory {peak:6.0f} MiB, "
            f"disk {disk / 2**20:6.1f} MiB",
            flush=True,
        )


def _word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", *(f"w{i}" for i in range(60))])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>")


def _random_pairs(count: int) -> Iterator[dict[str, str]]:
    rng = random.Random(0)
    for _ in range(count):
        words = [" ".join(f"w{rng.randrange(60)}" for _ in range(rng.randint(2, 8))) for _ in range(3)]
        yield {"prompt": words[0] + " ", "chosen": words[1], "rejected": words[2]}


def scale(options: argparse.Namespace) -> None:
    """Time, memory and disk of everything but the model."""
    d_model, d_sae, active, size = 64, 1024, 40, 512
    rng = np.random.default_rng(0)
    dictionary = FeatureDictionary(torch.randn(d_sae, d_model), "model.layers.1", "simulated")
    for pairs in (options.pairs // 10, options.pairs // 2, options.pairs):
        with tempfile.TemporaryDirectory() as directory:
            started = time.perf_counter()
            header = {"dictionary": {**dictionary.info.__dict__}, "settings": {"seed": 0}}
            store = AuditStore.create(Path(directory) / "audit", header, dictionary, {})
            parts = -(-pairs // size)
            for number in range(parts):
                rows = np.arange(number * size, min((number + 1) * size, pairs))
                store.write_part(number, _simulated(rows, d_model, d_sae, active, rng))
            store.finish(parts, 1)
            wrote = time.perf_counter()
            feature_statistics(store.parts, dictionary, pairs, ResamplingConfig())
            done = time.perf_counter()
            disk = sum(path.stat().st_size for path in Path(directory).rglob("*") if path.is_file())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{pairs:7d} pairs: write {wrote - started:6.1f} s, statistics {done - wrote:6.1f} s, peak memory {peak:6.0f} MiB, "
            f"disk {disk / pairs:6.0f} bytes a pair ({8 * 2 * d_model} of them gradients and residuals, {active} active features an answer)",
            flush=True,
        )


def _simulated(rows: np.ndarray, d_model: int, d_sae: int, active: int, rng: np.random.Generator) -> Part:
    n = len(rows)
    feature = np.sort(rng.integers(0, d_sae, size=(2 * n, active), dtype=np.int32), axis=1).reshape(-1)
    values = rng.random((3, len(feature)), dtype=np.float32)
    arrays = ExampleArrays(
        gradient=rng.standard_normal((n, 2, d_model), dtype=np.float32),
        side=np.tile(np.array([1, -1], np.int8), (n, 1)),
        length=rng.integers(5, 200, size=(n, 2)).astype(np.int32),
        log_prob=np.zeros((n, 2), np.float32),
        weight=np.tile(np.array([0.05, -0.05], np.float32), (n, 1)),
        residual=rng.standard_normal((n, 2, d_model), dtype=np.float32),
        indptr=np.arange(0, 2 * n * active + 1, active, dtype=np.int64),
        feature=feature,
        mean=values[0],
        max_activation=values[1],
        activation_attribution=values[2],
        selected=0.05 * values[0],
        peak=np.zeros(len(feature), np.int32),
        active_tokens=np.zeros(len(feature), np.int32),
        token_indptr=np.zeros(n * 2 + 1, np.int64),
        token=np.zeros(0, np.int32),
        prompt_tail=np.full((n, 2, PROMPT_TAIL), -1, np.int32),
        prompt_state=np.zeros((n, state_size(d_model)), np.float32),
    )
    return Part(rows, rng.integers(0, 256, size=(n, 32), dtype=np.uint8), [], arrays, {})


def power(options: argparse.Namespace) -> None:
    """Share of 200 planted features among 2,000 found at q ≤ 0.05, by effect in standard deviations."""
    rng = np.random.default_rng(0)
    curve: dict[str, dict[str, float]] = {}
    for n in (50, 100, 400):
        curve[str(n)] = {}
        for effect in (0.1, 0.2, 0.3, 0.4, 0.6):
            contributions = rng.standard_normal((n, 1, 2000)).astype(np.float32)
            contributions[:, :, :200] -= effect
            parts = [_plain_part(contributions)]
            dictionary = FeatureDictionary(torch.eye(2000), "model.layers.0", "each dimension")
            table = feature_statistics(parts.copy, dictionary, n, ResamplingConfig(n_flips=1999, n_halves=1))
            found = table["q_value"] <= 0.05
            curve[str(n)][str(effect)] = float(found[:200].mean())
            curve[str(n)][f"false at {effect}"] = float(found[200:].mean())
    print(json.dumps(curve, indent=2))


def _plain_part(gradient: np.ndarray) -> Part:
    n = len(gradient)
    nothing = np.zeros(0, np.float32)
    arrays = ExampleArrays(
        gradient=gradient,
        side=np.ones((n, 1), np.int8),
        length=np.full((n, 1), 5, np.int32),
        log_prob=np.zeros((n, 1), np.float32),
        weight=np.ones((n, 1), np.float32),
        residual=np.zeros_like(gradient),
        indptr=np.zeros(n + 1, np.int64),
        feature=np.zeros(0, np.int32),
        mean=nothing,
        max_activation=nothing,
        activation_attribution=nothing,
        selected=nothing,
        peak=np.zeros(0, np.int32),
        active_tokens=np.zeros(0, np.int32),
        token_indptr=np.zeros(n * 1 + 1, np.int64),
        token=np.zeros(0, np.int32),
        prompt_tail=np.full((n, 1, PROMPT_TAIL), -1, np.int32),
        prompt_state=np.zeros((n, state_size(gradient.shape[-1])), np.float32),
    )
    return Part(np.arange(n), np.zeros((n, 32), np.uint8), [], arrays, {})


if __name__ == "__main__":
    main()
