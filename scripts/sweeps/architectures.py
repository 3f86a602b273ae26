"""Try every causal language model and image-text model of the installed transformers: callback and audit, against autograd.

    python scripts/sweeps/architectures.py                       # all; one line an architecture as it comes
    python scripts/sweeps/architectures.py llama gemma           # those whose model type has one of these words
    python scripts/sweeps/architectures.py --write docs/reference/architectures.md

Each is made from a tiny configuration of its own class with random weights. One DPO step of four pairs in TRL's trainer with the
callback is held against `torch.autograd.grad` of the trainer's loss, and one audit of the same pairs against that of the loss written
out here, on the model's own logits; both at a zero vector added to the layer's output. Takes about ten minutes of a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import inspect
import io
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"})
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import datasets
import torch
import transformers
import trl
from helpers.worlds import make_tokenizer, pairs
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    FeatureDictionary,
    RunRecord,
    audit_preferences,
)
from trl_sae_audit.models.hook_points import residual_width, resolve_hook_point

LAYER, FEATURES, PAIRS, BETA = "blocks.1.hook_resid_post", 48, 4, 0.1
EXACT = 1e-4
LOOSE = 1e-2  # what a mixture of experts' load balancing adds stays below
LIMIT_S = 90
SIZES = {
    ("num_hidden_layers", "num_layers", "n_layer", "n_layers"): 4,
    ("encoder_layers", "decoder_layers", "depth"): 2,
    (
        "hidden_size",
        "d_model",
        "n_embd",
        "word_embed_proj_dim",
        "embedding_size",
        "out_hidden_size",
        "embed_dim",
    ): 32,
    (
        "intermediate_size",
        "ffn_dim",
        "n_inner",
        "ffn_hidden_size",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "expert_ffn_hidden_size",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "dense_intermediate_size",
    ): 32,
    ("num_attention_heads", "n_head", "encoder_attention_heads", "decoder_attention_heads", "num_heads"): 4,
    ("num_key_value_heads", "num_kv_heads"): 2,
    ("head_dim", "attention_head_dim", "mamba_head_dim", "mamba_d_head"): 8,
    ("global_head_dim",): 8,
    ("linear_key_head_dim", "linear_value_head_dim"): 8,
    ("linear_num_key_heads",): 2,
    ("linear_num_value_heads",): 4,
    ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"): 4,
    ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"): 2,
    ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts"): 1,
    ("first_k_dense_replace",): 1,
    ("kv_lora_rank", "q_lora_rank"): 16,
    ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"): 8,
    ("state_size", "mamba_d_state", "ssm_state_size", "mamba_n_heads", "mamba_num_heads", "conv_kernel"): 8,
    ("mamba_n_groups", "n_groups"): 1,
    ("lru_width", "attention_hidden_size"): 32,
    ("rotary_dim",): 4,
    ("image_size",): 16,
    ("patch_size",): 8,
    ("vocab_size_per_layer_input", "hidden_size_per_layer_input"): 64,
    ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"): 128,
    ("num_nextn_predict_layers", "num_kv_shared_layers"): 0,
    ("laurel_rank", "hc_mult"): 4,
}
OWN: dict[str, dict[str, Any]] = {
    "reformer": {"is_decoder": True},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 1},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "bert": {"is_decoder": True},
    "rwkv": {"attention_hidden_size": 32},
}
DECODERS = (
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip
"""Encoders that are causal only where their configuration says so."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", help="only model types that have one of these words in their name"
    )
    parser.add_argument("--write", type=Path, help="also write the table into this page, between its markers")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    lines = []
    for name, model_class in architectures():
        if options.words and not any(word in name for word in options.words):
            continue
        began = time.monotonic()
        verdict = " | ".join(judge(name, model_class))
        lines.append(f"| {name} | {model_class.__name__} | {verdict} |")
        print(lines[-1], f"{time.monotonic() - began:.1f} s", flush=True)
        gc.collect()
    report = summary(lines)
    print(report)
    if options.write is not None:
        write(options.write, lines, report)
    return 0


def architectures() -> Iterator[tuple[str, Any]]:
    """Model types and their classes: causal language models first, then image-text models that are no other class."""
    seen = set()
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        for name in CONFIG_MAPPING:
            with contextlib.suppress(Exception):
                found = mapping.get(CONFIG_MAPPING[name], None)
                for model_class in found if isinstance(found, tuple) else (found,):
                    if model_class is not None and model_class not in seen:
                        seen.add(model_class)
                        yield model_class.config_class.model_type, model_class


def judge(name: str, model_class: Any) -> tuple[str, str]:
    """What came out of the callback and of the audit: "exact", the error, or the sentence of a refusal."""
    with limited(), tempfile.TemporaryDirectory() as directory:
        try:
            with quiet():
                model = make_model(name, model_class)
        except Exception as error:  # noqa: BLE001 - a sweep goes on, and shows what it met
            return f"does not build ({shorten(error)})", ""
        results = []
        for run in (train, audit):
            try:
                with quiet():
                    torch.manual_seed(0)
                    off, remark = run(model, Path(directory))
                results.append(("exact" if off < EXACT else f"**off by {off:.0e}**") + remark)
            except AuditError as refusal:
                results.append(f"refused: {shorten(refusal, 160)}")
            except Exception as error:  # noqa: BLE001
                results.append(f"does not run ({shorten(error)})")
        return results[0], results[1]


def make_model(name: str, model_class: Any) -> Any:
    torch.manual_seed(0)
    config_class = model_class.config_class
    own = {**OWN.get(name, {}), **({"is_decoder": True} if name in DECODERS else {})}
    model = model_class(tiny(config_class, own))
    tokenizer = make_tokenizer()
    if model.get_output_embeddings() is not None and model.config.get_text_config().vocab_size < len(
        tokenizer
    ):
        raise ValueError("its vocabulary is too small")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2)
    if sum(parameter.numel() for parameter in model.parameters()) > 50_000_000:
        raise ValueError("it is large even as its tiniest configuration")
    return model.float().eval()


def tiny(config_class: type[Any], own: dict[str, Any]) -> Any:
    """A configuration of the class in which all sizes that it has are small, and its parts likewise."""
    default = config_class()
    given: dict[str, Any] = {}
    for names, size in SIZES.items():
        given |= {name: size for name in names if isinstance(value_of(default, name), int)}
    if "qk_rope_head_dim" in given:  # multi-head latent attention has sizes of its own
        for name in ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"):
            given.pop(name, None)
        given["num_key_value_heads"] = 4
    elif "head_dim" in vars(default) and "head_dim" not in given:
        given["head_dim"] = 8
    given |= {
        name: 0.0
        for name, value in vars(default).items()
        if isinstance(value, float) and ("drop" in name or "jitter" in name)
    }
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    given |= {name: value for name, value in tokens.items() if hasattr(default, name)}
    for part in getattr(config_class, "sub_configs", {}):
        value = getattr(default, part, None)
        if isinstance(value, transformers.PretrainedConfig):
            given[part] = tiny(type(value), {}).to_dict()
    accepted = set(inspect.signature(config_class.__init__).parameters) | set(vars(default))
    config = config_class(**{name: value for name, value in {**given, **own}.items() if name in accepted})
    for name in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, 63)
    return config


def value_of(config: Any, name: str) -> Any:
    """A setting, None where there is none; of one that differs by layer, the common one."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 - a configuration may forbid to ask for it as one number
        return 8


def train(model: Any, directory: Path) -> tuple[float, str]:
    """Relative error of the callback's attribution in one DPO step, and whether TRL's loss is that of the model's own logits."""
    dictionary = make_dictionary(model)
    args = DPOConfig(
        str(directory / "out"),
        per_device_train_batch_size=PAIRS,
        max_steps=1,
        learning_rate=0.0,
        beta=BETA,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=False,
    )
    callback = FeatureAttributionCallback(
        dictionary, output_dir=directory / "record", top_k=FEATURES, selection=False
    )
    trainer = DPOTrainer(
        model,
        copy.deepcopy(model),
        args=args,
        train_dataset=pairs(PAIRS),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    inner = trainer.compute_loss

    def compute_loss(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        kept.append((dict(inputs), dict(kwargs)))
        return inner(model, inputs, *args, **kwargs)

    compute_loss.__module__ = "trl"
    trainer.compute_loss = compute_loss
    trainer.train()
    steps = RunRecord.load(directory / "record").steps().sort_values("feature")
    measured = torch.tensor(steps["attribution"].to_numpy())
    batch, given = kept[0]
    expected = gradient_at_layer(model, dictionary, lambda: inner(model, batch, **given))
    own = reference(model.train(), batch, BETA / (2 * PAIRS), dictionary)
    others = relative(own, expected)
    return relative(measured, expected), (
        "" if others < LOOSE else f"; TRL's loss is not the model's own, off by {others:.0e}"
    )


def audit(model: Any, directory: Path) -> tuple[float, str]:
    """Relative error of the audit's attribution."""
    dictionary = make_dictionary(model)
    found = audit_preferences(
        model.eval(),
        make_tokenizer(),
        pairs(PAIRS),
        dictionary,
        args=DPOConfig(str(directory), beta=BETA, bf16=False),
        lookahead=None,
        progress=False,
    )
    batch = one_batch(directory)
    expected = reference(model.eval(), batch, BETA / 2 / PAIRS, dictionary)
    measured = torch.tensor(found.features().sort_values("feature")["attribution"].to_numpy())
    return relative(measured, expected), ""


def reference(model: Any, batch: dict[str, Tensor], weight: float, dictionary: FeatureDictionary) -> Tensor:
    """−⟨Σ ∂L/∂h, d_f⟩ of DPO's loss where policy and reference are one model: each pair weighs its log-ratio by −β/2."""

    def loss() -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets, counted = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:].bool()
        log_probs = (
            logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].masked_fill(~counted, 0)
        )
        chosen, rejected = log_probs.sum(1).chunk(2)
        return -weight * (chosen - rejected).sum()

    return gradient_at_layer(model, dictionary, loss)


def gradient_at_layer(model: Any, dictionary: FeatureDictionary, loss: Callable[[], Tensor]) -> Tensor:
    """−⟨∂ loss / ∂ z, d_f⟩ of a zero vector z that is added to every token's hidden state at the layer."""
    layer = resolve_hook_point(model, dictionary.hook_names).module
    zero = torch.zeros(1, 1, dictionary.d_model, requires_grad=True)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        return (
            type(output)([output[0] + zero, *output[1:]])
            if isinstance(output, tuple | list)
            else output + zero
        )

    handle = layer.register_forward_hook(add)
    try:
        (gradient,) = torch.autograd.grad(loss(), zero)
    finally:
        handle.remove()
    return -(dictionary.directions @ gradient[0, 0])


def one_batch(directory: Path) -> dict[str, Tensor]:
    """The pairs as TRL's trainer collates them."""
    tokenizer = make_tokenizer()
    rows: dict[str, list[list[int]]] = {"chosen": [], "rejected": []}
    prompts = []
    for pair in pairs(PAIRS):
        prompt = tokenizer(pair["prompt"])["input_ids"]
        for side, sequences_of in rows.items():
            sequences_of.append(
                [*tokenizer(pair["prompt"] + pair[side])["input_ids"], tokenizer.eos_token_id]
            )
        prompts.append(len(prompt))
    sequences, starts = rows["chosen"] + rows["rejected"], prompts * 2
    longest = max(map(len, sequences))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in sequences])
    attended = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in sequences])
    answers = attended * (torch.arange(longest) >= torch.tensor(starts)[:, None])
    return {"input_ids": ids, "attention_mask": attended, "completion_mask": answers}


def make_dictionary(model: Any) -> FeatureDictionary:
    generator = torch.Generator().manual_seed(2)
    return FeatureDictionary(
        torch.randn(FEATURES, residual_width(model), generator=generator), LAYER, "random"
    )


def relative(measured: Tensor, expected: Tensor) -> float:
    return float((measured.double() - expected.double()).abs().max() / expected.double().abs().max())


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def shorten(error: BaseException, most: int = 90) -> str:
    said = " ".join(f"{'' if isinstance(error, AuditError) else type(error).__name__ + ': '}{error}".split())
    said = said.replace("|", "/")
    return said if len(said) <= most else f"{said[:most]}…"


def summary(lines: list[str]) -> str:
    def count(column: int, start: str) -> int:
        return sum(line.split(" | ")[column].rstrip(" |").startswith(start) for line in lines)

    built = [line for line in lines if not line.split(" | ")[2].startswith("does not build")]
    return (
        f"{len(lines)} architectures of transformers {transformers.__version__} with TRL {trl.__version__}: {len(built)} build "
        f"from a tiny configuration. Callback: {count(2, 'exact')} exact, {count(2, 'refused')} refused, "
        f"{count(2, '**off')} off, {count(2, 'does not run')} do not run. Audit: {count(3, 'exact')} exact, "
        f"{count(3, 'refused')} refused, {count(3, '**off')} off, {count(3, 'does not run')} do not run."
    )


def write(page: Path, lines: list[str], report: str) -> None:
    table = "\n".join(["| model type | class | callback | audit |", "|---|---|---|---|", *lines])
    start, end = "<!-- sweep -->", "<!-- end of sweep -->"
    text = page.read_text(encoding="utf-8")
    before, after = text.split(start)[0], text.split(end)[1]
    page.write_text(f"{before}{start}\n\n{report}\n\n{table}\n\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
