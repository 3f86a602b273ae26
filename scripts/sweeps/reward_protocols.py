"""Try every form of a reward that TRL's GRPOTrainer takes, and some that it should not, on an audit and on a shaped reward.

    python scripts/sweeps/reward_protocols.py                 # prints a table, one line a form as it comes
    python scripts/sweeps/reward_protocols.py model None      # those whose name has one of these words

"exact": the same numbers, to the bit, as TRL's own call on the same answers. "refused": an error of one sentence. Takes about a minute
of one core. `docs/reliability.md` has the outcome.
"""

from __future__ import annotations

import argparse
import contextlib
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
import torch
from helpers.rewards import PROTOCOLS, REFUSED, Protocol, answered, asked_by_trl, data, trainer_of
from helpers.shaped import FLAGS, scorer
from helpers.worlds import make_model, make_sae_dictionary, make_tokenizer
from torch import Tensor

from trl_sae_audit import AuditError, FixedPenalty, ShapedReward, audit_preferences
from trl_sae_audit.models.rewards import Rewards
from trl_sae_audit.models.sampling import Sampling


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", help="only forms whose name has one of these words")
    words = [word.lower() for word in parser.parse_args().words]
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    failed = []
    print("| reward | adapter | audit | ShapedReward |\n|---|---|---|---|")
    for name, protocol in (PROTOCOLS | REFUSED).items():
        if words and not any(word in name.lower() for word in words):
            continue
        outcomes = [_outcome(check, protocol) for check in (_adapter, _audit, _shaped)]
        expected = "refused" if name in REFUSED else "exact"
        if any(not outcome.startswith(expected) for outcome in outcomes):
            failed.append(name)
        print(f"| {name} | {' | '.join(outcomes)} |", flush=True)
    print(
        f"\n{len(failed)} not as they should be: {', '.join(failed)}"
        if failed
        else "\nAll as they should be."
    )
    return bool(failed)


def _outcome(check: Callable[[Protocol, Path], bool], protocol: Protocol) -> str:
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        try:
            return "exact" if check(protocol, Path(directory)) else "DIFFERENT"
        except AuditError as error:
            return f"refused: {error}"
        except Exception as error:  # noqa: BLE001 - a sweep goes on, and shows what it met
            return f"ERROR {type(error).__name__}: {error}".replace("\n", " ")[:200]


def _same(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.nan_to_num(-9e9), second.nan_to_num(-9e9))


def _tokenizers(protocol: Protocol) -> Any:
    return None if protocol.tokenizers is None else protocol.tokenizers()


def _adapter(protocol: Protocol, directory: Path) -> bool:
    rows = answered(protocol.conversational)
    ours = Rewards(protocol.rewards(), _tokenizers(protocol), protocol.weights)(rows)
    return _same(ours, asked_by_trl(trainer_of(protocol, directory), rows))


def _audit(protocol: Protocol, directory: Path) -> bool:
    """The rewards that an audit notes, and TRL's of the same answers."""
    tokenizer, dataset = make_tokenizer(), data(protocol.conversational)
    rewards = Rewards(protocol.rewards(), _tokenizers(protocol), protocol.weights)
    audit = audit_preferences(
        make_model(tokenizer),
        tokenizer,
        dataset,
        make_sae_dictionary(),
        "policy_gradient",
        reward=protocol.rewards(),
        reward_tokenizer=_tokenizers(protocol),
        sampling=Sampling(4, 6),
        batch_size=16,
        lookahead=None,
        progress=False,
    )
    rows = audit.answers().to_dict("records")
    for row in rows:
        row["answer"] = dataset[row["group"]]["answer"]
        if protocol.conversational:
            row["completion"] = [{"role": "assistant", "content": row["completion"]}]
    expected = asked_by_trl(trainer_of(protocol, directory), rows)
    rewards.weights = torch.ones(expected.shape[1])  # the audit was given none
    noted = torch.tensor(audit.answers()["reward"].astype(float).to_numpy(), dtype=torch.float32)
    return _same(noted, rewards.combine(expected))


def _shaped(protocol: Protocol, directory: Path) -> bool:
    """Shaped with a coefficient of 0, in a trainer, against the plain rewards in another."""
    rows, rewards = answered(protocol.conversational), protocol.rewards()
    tokenizers = _tokenizers(protocol) or [None] * len(rewards)
    shaped = [
        ShapedReward(reward, scorer(), FLAGS, FixedPenalty(0.0), reward_tokenizer=tokenizer)
        for reward, tokenizer in zip(rewards, tokenizers, strict=True)
    ]
    plain = Protocol(lambda: list(shaped), protocol.conversational, weights=protocol.weights)
    ours = asked_by_trl(trainer_of(plain, directory / "shaped"), rows)
    return _same(ours, asked_by_trl(trainer_of(protocol, directory / "plain"), rows))


if __name__ == "__main__":
    sys.exit(main())
