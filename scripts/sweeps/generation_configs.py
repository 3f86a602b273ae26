"""Give the model's own `generation_config.json` every setting there is, and see that nothing that samples answers changes.

    python scripts/sweeps/generation_configs.py                 # prints a table, one line a setting as it comes
    python scripts/sweeps/generation_configs.py top_ num_beams  # those whose name has one of these words

Every field of the installed `GenerationConfig` is set on a tiny model, which then is audited for a reward, audited with the lookahead
to generations, compared with another model (`verify` and `diff`), and trained with `generations=`. "exact": the same numbers, to the
bit, as with an empty configuration. Takes about three minutes of one core. `docs/reliability.md` has the outcome.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false"})
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

import datasets
import pandas as pd
import torch
from helpers.worlds import make_model, make_sae_dictionary, make_tokenizer, pairs, prompts, reward_by_length
from transformers import GenerationConfig, PreTrainedModel
from trl import DPOConfig, DPOTrainer

from trl_sae_audit import (
    AuditError,
    FeatureAttributionCallback,
    LookaheadConfig,
    RunRecord,
    audit_preferences,
    diff_models,
    sampled_change,
)
from trl_sae_audit.models.sampling import Sampling

SAMPLING = Sampling(2, 6)
VALUES: dict[str, Any] = {
    "temperature": 0.05, "top_k": 1, "top_p": 0.01, "min_p": 0.9, "top_h": 0.1, "typical_p": 0.1, "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5, "repetition_penalty": 5.0, "encoder_repetition_penalty": 5.0, "length_penalty": 3.0, "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1, "bad_words_ids": [[8], [9], [10]], "renormalize_logits": True, "forced_bos_token_id": 9,
    "forced_eos_token_id": 9, "remove_invalid_values": True, "exponential_decay_length_penalty": [1, 3.0],
    "suppress_tokens": list(range(8, 40)), "begin_suppress_tokens": list(range(8, 40)), "sequence_bias": [[[8], 20.0]],
    "token_healing": True, "guidance_scale": 1.5, "num_return_sequences": 2, "output_attentions": True, "output_hidden_states": True,
    "output_scores": True, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 9, "bos_token_id": 9,
    "eos_token_id": [2, 9], "decoder_start_token_id": 9, "max_length": 5, "max_new_tokens": 2, "min_length": 60, "min_new_tokens": 6,
    "early_stopping": True, "max_time": 1e-6, "stop_strings": ["w1"], "do_sample": False, "num_beams": 2, "use_cache": False,
    "cache_implementation": "static", "prompt_lookup_num_tokens": 3, "penalty_alpha": 0.6, "dola_layers": "low",
    "diversity_penalty": 1.0, "num_beam_groups": 2, "constraints": [], "force_words_ids": [[8]], "prefill_chunk_size": 2,
    "low_memory": True, "disable_compile": True, "max_matching_ngram_size": 2, "num_assistant_tokens": 2, "is_assistant": True,
    "assistant_early_exit": 1, "assistant_confidence_threshold": 0.9, "assistant_lookbehind": 1, "target_lookbehind": 1,
    "num_assistant_tokens_schedule": "constant", "use_mtp": True, "max_cache_len": 4, "assistant_ensemble_weight": 0.5,
}  # fmt: skip
"""A setting for each field that would change what is sampled, or how it comes back."""
Made = Callable[[], PreTrainedModel]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only fields whose name has one of these words")
    words = parser.parse_args().words
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    fields = [name for name in GenerationConfig().to_dict() if not name.startswith(("_", "transformers"))]
    chosen = [name for name in fields if not words or any(word in name for word in words)]
    expected = {check.__name__: check(_with({})) for check in CHECKS}
    print(f"| field | value | {' | '.join(expected)} |\n|---|---|{'---|' * len(expected)}")
    failed, untried = [], [name for name in chosen if name not in VALUES]
    for name in chosen:
        if name in untried:
            continue
        outcomes = [_outcome(check, name, expected[check.__name__]) for check in CHECKS]
        if any(outcome != "exact" for outcome in outcomes):
            failed.append(name)
        print(f"| {name} | {str(VALUES[name])[:24]} | {' | '.join(outcomes)} |", flush=True)
    print(
        f"\n{len(chosen) - len(untried)} fields, {len(failed)} not exact: {failed}. Objects, not tried: {untried}."
    )
    return bool(failed)


def _with(settings: dict[str, Any]) -> Made:
    def make() -> PreTrainedModel:
        model = make_model(make_tokenizer())
        for name, value in settings.items():
            setattr(model.generation_config, name, copy.deepcopy(value))
        return model

    return make


def _outcome(check: Callable[[Made], pd.DataFrame], name: str, expected: pd.DataFrame) -> str:
    try:
        return "exact" if check(_with({name: VALUES[name]})).equals(expected) else "DIFFERENT"
    except AuditError as error:
        return f"refused: {error}"
    except Exception as error:  # noqa: BLE001 - a sweep goes on, and shows what it met
        return f"ERROR {type(error).__name__}: {error}".replace("\n", " ")[:120]


def reward_audit(make: Made) -> pd.DataFrame:
    """The answers of an audit of a reward."""
    audit = audit_preferences(
        make(),
        make_tokenizer(),
        prompts(4),
        make_sae_dictionary(),
        "policy_gradient",
        reward=reward_by_length,
        sampling=SAMPLING,
        lookahead=None,
        progress=False,
    )
    return audit.answers()[["completion", "reward", "advantage"]]


def lookahead(make: Made) -> pd.DataFrame:
    """What an audit of pairs predicts of generations."""
    audit = audit_preferences(
        make(),
        make_tokenizer(),
        pairs(8),
        make_sae_dictionary(),
        lookahead=LookaheadConfig(prompts(4), sampling=SAMPLING),
        progress=False,
    )
    return audit.features().sort_values("feature")[["feature", "predicted_change_in_generations"]]


def verify(make: Made) -> pd.DataFrame:
    """The measured change in generations."""
    other = make_model(make_tokenizer(), seed=1)
    found = sampled_change(
        make(), other, make_tokenizer(), make_sae_dictionary(), prompts(4), sampling=SAMPLING
    )
    return pd.DataFrame({"change": found.change})


def diff(make: Made) -> pd.DataFrame:
    other = make_model(make_tokenizer(), seed=1)
    found = diff_models(other, make(), make_tokenizer(), make_sae_dictionary(), prompts(4), sampling=SAMPLING)
    return found.writes


def drift(make: Made) -> pd.DataFrame:
    """A run's drift in generations, of answers sampled when it starts."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        callback = FeatureAttributionCallback(
            make_sae_dictionary(),
            directory + "/record",
            generations=SAMPLING,
            generation_prompts=prompts(4)["prompt"],
            generation_steps=1,
        )
        args = DPOConfig(
            directory,
            max_steps=1,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        )
        model = make()
        DPOTrainer(
            model,
            ref_model=make_model(make_tokenizer()),
            args=args,
            train_dataset=pairs(4),
            processing_class=make_tokenizer(),
            callbacks=[callback],
        ).train()
        return RunRecord.load(directory + "/record").table("generation_drift")


CHECKS = (reward_audit, lookahead, verify, diff, drift)

if __name__ == "__main__":
    sys.exit(main())
