"""The loss an audit asks about: how much each token's log-probability matters to each example's own loss.

Everything above the log-probabilities is the loss's; everything below is the model's. So a loss is asked for one
thing only, `∂L_i/∂log π(token)`, and for DPO the answer is differentiated out of TRL's own `compute_loss`.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from datasets import Dataset
from jinja2 import TemplateError
from pyarrow import ArrowException
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig, DPOTrainer

from ..data.preferences import read_by_trl
from ..errors import AuditError
from ..models.tokenizers import Processing

ROW = "__row__"
_UNFIT = (ArrowException, TemplateError, TypeError, ValueError, KeyError)
"""What TRL's preparation of rows ends in that are no pairs of texts, or that the chat template refuses."""
_MIX_EXAMPLES = {
    "aot": "sorts the log-ratios of a batch",
    "aot_unpaired": "sorts the log-ratios of a batch",
    "sft": "averages over the tokens of a batch",
}


@dataclass(frozen=True)
class TokenizedExample:
    """One example as the trainer would see it: its number in the data, and what the collator takes.

    `size` is its number of tokens, to put examples of similar length together.
    """

    row: int
    features: dict[str, Any]
    size: int


NO_SIDE = "neither"
"""Of an answer that the loss does not ask for or against."""


def side_name(sign: int, sides: Sequence[str]) -> str:
    """What the side of an answer is called, by its sign."""
    return NO_SIDE if sign == 0 else sides[0] if sign > 0 else sides[-1]


class Loss(Protocol):
    """What the pass needs of an objective. Rows of a batch are all first answers, then all second ones."""

    name: str
    sides: tuple[str, str]
    rows_per_example: int

    @property
    def max_length(self) -> int | None:
        """Tokens at which the trainer cuts a sequence."""
        ...

    def tokenize(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[TokenizedExample]:
        """(number, columns) of some rows → examples; a row the trainer would drop is left out."""
        ...

    def collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        """Padded `input_ids`, `attention_mask`, `completion_mask` [rows, tokens], and what the loss itself needs."""
        ...

    def weights(self, batch: Mapping[str, Tensor], log_probs: Tensor, reference: Tensor) -> Tensor:
        """`∂L_i/∂log_probs` [rows, tokens − 1], of each example's own loss, not of the batch's mean."""
        ...

    def row_sides(self, batch: Mapping[str, Tensor]) -> Tensor:
        """+1 or -1 of each row of the batch."""
        ...

    def prompt_of(self, example: TokenizedExample) -> tuple[int, ...]:
        """Token ids of an example's prompt."""
        ...

    def describe(self) -> dict[str, Any]:
        """What an audit's manifest records; two audits with the same description asked the same."""
        ...


class PreferenceLoss:
    """DPO and its relatives, tokenized, collated and computed by TRL's `DPOTrainer`.

    The trainer is made for the purpose around a stand-in model of a few weights, and never trains: it is called
    with log-probabilities in place of a model, and its gradient with respect to them is taken.

    Args:
        tokenizer: of the model.
        args: the `DPOConfig` of the run to come; TRL's defaults if None.
        processing: the processor that the run will have, where it has one, which TRL lets tokenize.

    Raises:
        AuditError: for a loss whose terms mix the examples of a batch, which then have no loss of their own.
    """

    name = "dpo"
    sides = ("chosen", "rejected")
    rows_per_example = 2

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: DPOConfig | None = None,
        processing: Processing | None = None,
    ) -> None:
        self.trainer = _stand_in_trainer(tokenizer, args)
        _refuse_mixing_losses(self.trainer)
        self._processing = processing if isinstance(processing, ProcessorMixin) else tokenizer

    @property
    def max_length(self) -> int | None:
        """Tokens at which a trainer cuts prompt and answer."""
        return self.trainer.args.max_length

    def tokenize(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[TokenizedExample]:
        if not rows:
            return []
        try:
            return self._tokenized(rows)
        except _UNFIT as error:
            raise self._refusal(rows, error) from error

    def _refusal(self, rows: Sequence[tuple[int, Mapping[str, Any]]], error: Exception) -> AuditError:
        """The sentence for rows that TRL cannot tokenize: about the first that it cannot even alone."""
        which, what = (
            f"Rows {rows[0][0]} to {rows[-1][0]}",
            "are of different kinds, so that they cannot be tokenized together",
        )
        for row in rows:
            try:
                self._tokenized([row])
            except _UNFIT as own:
                error, which, what = own, f"Row {row[0]}", "cannot be tokenized"
                break
        return AuditError(
            f"{which} of the dataset (counted from 0) {what} ({type(error).__name__}: {' '.join(str(error).split())}); correct "
            "or remove what is wrong."
        )

    def _tokenized(self, rows: Sequence[tuple[int, Mapping[str, Any]]]) -> list[TokenizedExample]:
        columns = [{ROW: number, **read_by_trl(row)} for number, row in rows]
        stream = Dataset.from_list(columns).to_iterable_dataset()
        prepared = self.trainer._prepare_dataset(stream, self._processing, self.trainer.args, "audit")
        return [TokenizedExample(row[ROW], row, _longest(row)) for row in prepared]

    def collate(self, examples: Sequence[TokenizedExample]) -> dict[str, Tensor]:
        return dict(self.trainer.data_collator([example.features for example in examples]))

    def weights(self, batch: Mapping[str, Tensor], log_probs: Tensor, reference: Tensor) -> Tensor:
        device = self.trainer.accelerator.device
        leaf = log_probs.detach().to(device, torch.promote_types(log_probs.dtype, torch.float32))
        leaf.requires_grad_(True)
        inputs = {name: value.to(device) for name, value in batch.items()}
        inputs["input_ids"] = torch.zeros_like(inputs["input_ids"])
        policy, frozen = _AsModel(leaf), _AsModel(reference.detach().to(leaf))
        self.trainer.ref_model = frozen
        with torch.enable_grad():
            loss = self.trainer.compute_loss(policy, inputs)
            (slope,) = torch.autograd.grad(loss, leaf)
        self.trainer._metrics["train"].clear()
        self.trainer._metrics["eval"].clear()
        return slope.to(log_probs.device) * (len(log_probs) // 2)

    def row_sides(self, batch: Mapping[str, Tensor]) -> Tensor:
        sides = torch.ones(len(batch["input_ids"]), dtype=torch.int8)
        sides[len(sides) // 2 :] = -1
        return sides

    def prompt_of(self, example: TokenizedExample) -> tuple[int, ...]:
        return tuple(example.features["prompt_ids"])

    def describe(self) -> dict[str, Any]:
        args = self.trainer.args
        fields = (
            "loss_type",
            "loss_weights",
            "beta",
            "label_smoothing",
            "ld_alpha",
            "f_divergence_type",
            "f_alpha_divergence_coef",
            "discopop_tau",
            "max_length",
            "truncation_mode",
        )
        return {"objective": self.name} | {name: _plain(getattr(args, name)) for name in fields}


def _longest(row: Mapping[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def _plain(value: Any) -> Any:
    return value.value if hasattr(value, "value") else value


class _Outputs:
    """What `DPOTrainer` reads of a model's output; what it only logs is zero."""

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs
        self.entropy = torch.zeros_like(log_probs)
        self.mean_logits = torch.zeros_like(log_probs)
        self.is_top1 = torch.zeros_like(log_probs, dtype=torch.bool)

    @property
    def logits(self) -> Tensor:
        """For TRL 1.12, which takes log-softmaxes itself: two classes, class 0 with these log-probabilities.

        A token's id there is always 0. Certainty has no second class, so it is moved by 1e-5.
        """
        known = torch.where(self.log_probs < -1e-5, self.log_probs, self.log_probs - 1e-5)
        other = torch.log(-torch.expm1(known))
        pair = torch.stack([known, other], dim=-1)
        return torch.cat([pair, pair[:, -1:]], dim=1)


class _AsModel(nn.Module):
    """Log-probabilities that can be called like the model that gave them."""

    def __init__(self, log_probs: Tensor) -> None:
        super().__init__()
        self._log_probs = log_probs

    def forward(self, **inputs: Any) -> _Outputs:
        return _Outputs(self._log_probs)


class _ThisProcess:
    """Accelerate's place in the loss: its gathering serves logs only, and audits of several processes do not
    call the loss equally often."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def gather(self, value: Any) -> Any:
        return value

    gather_for_metrics = gather


def _stand_in_trainer(tokenizer: PreTrainedTokenizerBase, args: DPOConfig | None) -> DPOTrainer:
    given = args
    with tempfile.TemporaryDirectory() as scratch:
        args = DPOConfig(scratch, bf16=False, report_to="none") if given is None else copy.copy(given)
        for name, value in {
            "output_dir": scratch,
            "report_to": [],
            "eval_strategy": "no",
            "push_to_hub": False,
            "precompute_ref_log_probs": False,
            "sync_ref_model": False,
            "use_liger_kernel": False,
            "activation_offloading": False,
        }.items():
            setattr(args, name, value)
        pad_token = tokenizer.pad_token
        if tokenizer.eos_token is None:
            raise AuditError(
                "The tokenizer has no end-of-sequence token, which TRL ends every answer with; set tokenizer.eos_token."
            )
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            with _seeds_kept(), _quiet("trl.trainer.dpo_trainer"):
                trainer = DPOTrainer(
                    model=_few_weights(),
                    ref_model=_few_weights(),
                    args=args,
                    train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
                    processing_class=tokenizer,
                )
        except (ValueError, NotImplementedError) as error:
            raise AuditError(f"TRL refuses this DPOConfig: {error}") from error
        finally:
            if pad_token is None:
                tokenizer.pad_token = None
            if not bars:
                datasets.enable_progress_bars()
    trainer.accelerator = _ThisProcess(trainer.accelerator.device)
    return trainer


@contextlib.contextmanager
def _seeds_kept() -> Iterator[None]:
    """A trainer sets every seed when it is made; an audit must not."""
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """No warnings about the stand-in's one row of data."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _few_weights() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=2,
            intermediate_size=2,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def _refuse_mixing_losses(trainer: DPOTrainer) -> None:
    for loss_type in trainer.loss_types:
        if loss_type in _MIX_EXAMPLES:
            raise AuditError(
                f"loss_type {loss_type!r} {_MIX_EXAMPLES[loss_type]}, so an example has no loss of its own to audit; "
                "audit the other terms of the loss, or the run itself with FeatureAttributionCallback."
            )
    if trainer.use_weighting:
        raise AuditError(
            "Use_weighting needs the policy's whole distribution, which the audit does not compute; audit without it."
        )
