"""Whether the recorded scores equal float64 autograd of the loss, under a trainer's option, model, adapter or subclass.

A real TRL trainer trains a tiny model; every micro-batch it computes a loss on is kept, with the weights of that step. A
twin of it in float64, without checkpointing, then computes the same losses, and `torch.autograd.grad` of each gives the
expected scores.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.neftune import activate_neftune
from trl import DPOConfig
from trl.experimental.bema_for_ref_model import DPOTrainer as BEMADPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from helpers import trainers
from helpers.reference import StepRecorder, recorded, to_double
from helpers.trainers import CUT, SAMPLED, Kind
from helpers.worlds import D_SAE, HOOK_POINT, make_dictionary, make_tokenizer, pairs, prompts
from trl_sae_audit import AuditError, FeatureAttributionCallback, RunRecord


def token_rows(n: int) -> list[dict[str, list[int]]]:
    """Data for transformers' own Trainer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 60, (n, 9), generator=generator).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def conversations(n: int) -> Any:
    """Data for GKD."""
    rows = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]
        for row in pairs(n)
    ]
    return Dataset.from_list([{"messages": row} for row in rows])


KINDS = trainers.KINDS | {
    "GMPO": Kind(GMPOTrainer, GMPOConfig, prompts, SAMPLED, rewarded=True),
    "DPO of BEMA": Kind(BEMADPOTrainer, DPOConfig, pairs, CUT, second="ref_model"),
    "GKD": Kind(
        GKDTrainer,
        GKDConfig,
        conversations,
        CUT | {"max_new_tokens": 4, "lmbda": 0.0},
        second="teacher_model",
    ),
    "ORPO": Kind(ORPOTrainer, ORPOConfig, pairs, CUT),
    "CPO": Kind(CPOTrainer, CPOConfig, pairs, CUT),
    "Trainer": Kind(Trainer, TrainingArguments, token_rows, {}),
}
SAMPLING = ("GRPO", "RLOO", "GMPO")
PAIRED = ("DPO", "DPO of BEMA", "Reward", "CPO", "ORPO")


@dataclass
class Case:
    """One way to train.

    Attributes:
        option: what is written in the table.
        kind: the trainer, a key of KINDS.
        arguments: for its configuration.
        model: makes it of a tokenizer.
        peft: makes the adapter's configuration.
        subclass: makes the user's trainer of TRL's.
        twin_subclass: makes the twin's, if another.
        trainer: further arguments of the trainer.
        twin: arguments in which the twin differs.
        before: does something to the trainer once it is built.
        experts: the model has some.
        rounding: relative error allowed.
        randomness: the loss draws random numbers, so the twin is of the same precision and draws the same.
        errors: whether standard errors are.
        refused: what the sentence says, if training is refused.
    """

    option: str
    kind: str
    arguments: dict[str, Any] = field(default_factory=dict)
    model: Callable[..., nn.Module] | None = None
    data: Callable[[int], Any] | None = None
    peft: Callable[[], Any] | None = None
    subclass: Callable[[type[Trainer]], type[Trainer]] | None = None
    twin_subclass: Callable[[type[Trainer]], type[Trainer]] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    twin: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Trainer], None] | None = None
    experts: bool = False
    rounding: float = 1e-5
    randomness: bool = False
    errors: bool = True
    hook_point: str = HOOK_POINT
    refused: str | None = None

    @property
    def name(self) -> str:
        return f"{self.kind}: {self.option}"


class Snapshots(StepRecorder):
    """Also keeps the weights and the random state with which each loss is computed."""

    def watch(self, trainer: Trainer) -> None:
        self.weights: list[dict[str, Any]] = []
        self.random: list[Tensor] = []
        super().watch(trainer)
        watched = trainer.compute_loss

        def compute_loss(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                self.weights.append(
                    {name: copy.deepcopy(part.state_dict()) for name, part in _models(trainer)}
                )
                self.random.append(torch.get_rng_state())
            return watched(model, inputs, *args, **kwargs)

        compute_loss.__module__ = "trl"  # so that it does not count as the user's own
        trainer.compute_loss = compute_loss


def _models(trainer: Trainer) -> list[tuple[str, nn.Module]]:
    reference = getattr(trainer, "ref_model", None)
    return [("model", trainer.model)] + ([] if reference is None else [("ref_model", reference)])


def build(case: Case, directory: Path, *, twin: bool = False) -> Trainer:
    """The trainer of a case, or its twin."""
    kind = KINDS[case.kind]
    subclass = case.twin_subclass if twin and case.twin_subclass else case.subclass
    kind = replace(
        kind,
        trainer=subclass(kind.trainer) if subclass else kind.trainer,
        model=case.model or kind.model,
        data=case.data or kind.data,
    )
    dtype = torch.float64 if twin and not case.randomness else torch.float32
    settings = {"learning_rate": 1e-2, **kind.defaults, **case.arguments}
    if twin:
        settings |= {"gradient_checkpointing": False, "torch_compile": False, "bf16": False, **case.twin}
    parts = dict(case.trainer)
    if case.peft is not None:
        parts |= {"peft_config": case.peft(), "ref_model": None}  # that is the model without its adapter
    if (
        settings.get("beta") and case.kind in SAMPLING
    ):  # the reference is loaded from where the model came from
        parts["model"] = model = kind.model(make_tokenizer()).to(dtype)
        model.save_pretrained(directory / "start")
        model.config.name_or_path = str(directory / "start")
    torch.manual_seed(11)
    trainer = kind.build(directory, dtype, settings, **parts)
    for _, part in _models(trainer):
        part.to(dtype)
        if twin and case.experts:
            part.set_experts_implementation("eager")  # the fast way has no float64
    return trainer


def trained(case: Case, directory: Path) -> tuple[Snapshots, RunRecord]:
    """The case's run, recorded."""
    trainer = build(case, directory)
    snapshots = Snapshots()
    snapshots.watch(trainer)
    if case.before is not None:
        case.before(trainer)
    dictionary = make_dictionary(hook_point=case.hook_point)
    trainer.add_callback(FeatureAttributionCallback(dictionary, directory / "record", top_k=D_SAE))
    trainer.train()
    return snapshots, RunRecord.load(directory / "record")


def largest_error(case: Case, directory: Path) -> float:
    """The largest relative error of any recorded score of any step against autograd."""
    snapshots, record = trained(case, directory)
    twin = build(case, directory, twin=True)
    twin.model.train()
    if twin.neftune_noise_alpha is not None:
        activate_neftune(twin.model, twin.neftune_noise_alpha, twin.accelerator)
    dictionary = make_dictionary(hook_point=case.hook_point)
    steps, gradients = record.steps(), record.table("gradient")
    worst, seen = 0.0, 0
    assert len(snapshots.steps) == 3
    for step, microbatches in enumerate(snapshots.steps, start=1):
        seen_rows, examples, sides, total = [], [], [], 0.0
        twin.current_gradient_accumulation_steps = len(microbatches)
        for inputs, kwargs in microbatches:
            for name, part in _models(twin):
                part.load_state_dict(snapshots.weights[seen][name])
            torch.set_rng_state(snapshots.random[seen])
            seen += 1
            rows, beside = row_gradients(case, twin, inputs, kwargs, len(microbatches))
            total = total + rows.sum(0) + beside.sum(0)
            side = sides_of(case.kind, inputs, len(rows))
            sides.append(torch.zeros(len(rows)) if side is None else side)
            half = len(rows) // 2
            examples.append(rows[:half] + rows[half:] if case.kind in PAIRED else rows)
            seen_rows.append(rows)
        expected = _scores(
            total, torch.cat(seen_rows), torch.cat(sides), torch.cat(examples), dictionary.directions.double()
        )
        if not case.errors:
            del expected["standard_error"]
        elif int(gradients["examples"][step - 1]) != sum(map(len, examples)):
            return float("inf")
        worst = max([worst, *(_error(recorded(steps, step, name), expected, name) for name in expected)])
    return worst


def _scores(
    total: Tensor, rows: Tensor, sides: Tensor, examples: Tensor, directions: Tensor
) -> dict[str, np.ndarray]:
    attribution = -(total @ directions.T)
    contributions = -examples @ directions.T
    return {
        "attribution": attribution.numpy(),
        "positive": (-rows[sides > 0].sum(0) @ directions.T).numpy(),
        "negative": (-rows[sides < 0].sum(0) @ directions.T).numpy(),
        "share": (attribution / total.norm()).square().numpy(),
        "standard_error": (contributions.var(0, unbiased=True) * len(contributions)).sqrt().numpy(),
    }


def _error(measured: np.ndarray, expected: dict[str, np.ndarray], column: str) -> float:
    """Largest difference; relative to the largest score of the step, since in some losses a side all but cancels."""
    signed = ("attribution", "positive", "negative")
    scale = max(abs(expected[name]).max() for name in (signed if column in signed else (column,)))
    return float(abs(measured - expected[column]).max() / scale)


def row_gradients(
    case: Case, twin: Trainer, inputs: dict[str, Any], kwargs: dict[str, Any], microbatches: int
) -> tuple[Tensor, Tensor]:
    """∂ loss / ∂ (a zero vector added to the hook point's output, one per example), and of forwards on other rows."""
    model: Any = twin.model
    layer = next(module for name, module in model.named_modules() if name.endswith(case.hook_point))
    dtype = next(model.parameters()).dtype
    d_model = model.config.get_text_config().hidden_size
    count, places = _examples(inputs)
    zeros = torch.zeros(count, 1, d_model, dtype=dtype, requires_grad=True)
    beside = torch.zeros(1, 1, d_model, dtype=dtype, requires_grad=True)

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        if places is not None:
            hidden = hidden + zeros[places, 0][None]
        else:
            hidden = hidden + (zeros if len(hidden) == count else beside)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = layer.register_forward_hook(add)
    try:
        given = {
            name: to_double(value) if dtype == torch.float64 else value for name, value in inputs.items()
        }
        loss = twin.compute_loss(model, given, **kwargs)
        if not _is_scaled(twin, kwargs):
            loss = loss / microbatches
        found = torch.autograd.grad(loss, [zeros, beside], allow_unused=True)
    finally:
        handle.remove()
    gradients = [
        torch.zeros_like(leaf) if one is None else one
        for one, leaf in zip(found, (zeros, beside), strict=True)
    ]
    return gradients[0][:, 0].double(), gradients[1][:, 0].double()


def _examples(inputs: dict[str, Any]) -> tuple[int, Tensor | None]:
    """How many examples a batch has, and which of them each place of a packed row is of."""
    if "attention_mask" not in inputs and "position_ids" in inputs:
        places = (inputs["position_ids"][0] == 0).long().cumsum(0) - 1
        return int(places[-1]) + 1, places
    if "chosen_input_ids" in inputs:
        return 2 * len(inputs["chosen_input_ids"]), None
    ids = next(inputs[key] for key in ("input_ids", "completion_ids") if key in inputs)
    return len(ids), None


def _is_scaled(trainer: Any, kwargs: dict[str, Any]) -> bool:
    if trainer.loss_is_scaled_for_ga is not None:
        return trainer.loss_is_scaled_for_ga
    counted = kwargs.get("num_items_in_batch") is not None
    return (trainer.model_accepts_loss_kwargs and counted) or trainer.compute_loss_func is not None


def sides_of(kind: str, inputs: dict[str, Any], rows: int) -> Tensor | None:
    if kind in PAIRED:
        return torch.tensor([1.0] * (rows // 2) + [-1.0] * (rows // 2))
    if kind == "KTO":
        return torch.tensor([1.0 if label else -1.0 for label in inputs["label"]])
    if kind in SAMPLING:
        return inputs["advantages"].sign()
    return None


def refusal(case: Case, directory: Path) -> str:
    """The sentence with which training is refused, after checking that no weight has moved."""
    trainer = build(case, directory)
    if case.before is not None:
        case.before(trainer)
    dictionary = make_dictionary(hook_point=case.hook_point)
    trainer.add_callback(FeatureAttributionCallback(dictionary, directory / "record"))
    before = copy.deepcopy(trainer.model.state_dict())
    try:
        trainer.train()
    except AuditError as error:
        after = trainer.model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items()), "weights have moved"
        return str(error)
    raise AssertionError("training was not refused")


def outcome(case: Case, directory: Path) -> tuple[bool, str]:
    """Whether the case did as it should, and what it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.refused is not None:
            sentence = refusal(case, directory)
            return case.refused in sentence, f"refused: {sentence}"
        error = largest_error(case, directory)
        return (
            error <= case.rounding,
            f"exact, {error:.0e}" if error <= case.rounding else f"WRONG, {error:.1e}",
        )
