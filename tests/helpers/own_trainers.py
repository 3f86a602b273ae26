"""Trainers and models as users write them: what they override, each a function from TRL's class to theirs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration, Trainer

from helpers.worlds import make_config

Class = type[Trainer]


def scaled_loss(base: Class) -> Class:
    class ScaledLossTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 3.0 * super().compute_loss(*args, **kwargs) + 1.0

    return ScaledLossTrainer


def second_forward(base: Class) -> Class:
    """Adds a penalty on the logits, from another forward of the same batch."""

    class SecondForwardTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            logits = model(input_ids=_ids(inputs), attention_mask=_mask(inputs)).logits
            weight = torch.arange(1.0, 1.0 + len(logits), dtype=logits.dtype)[:, None, None]
            return loss + 0.01 * (weight * logits.square()).mean()

    return SecondForwardTrainer


def detached_forward(base: Class) -> Class:
    """Runs the model once more with a graph that the loss does not use, before and after."""

    class DetachedForwardTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            given = {"input_ids": _ids(inputs), "attention_mask": _mask(inputs)}
            before = model(**given).logits.detach().mean()
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            return loss + 0 * (before + model(**given).logits.detach().mean())

    return DetachedForwardTrainer


def replay(base: Class) -> Class:
    """Adds the cross entropy of other texts, as many rows as the batch has or other ones."""

    class ReplayTrainer(base):  # type: ignore[misc,valid-type]
        rows = 3

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            generator = torch.Generator().manual_seed(int(_ids(inputs).sum()))
            other = torch.randint(4, 60, (self.rows, 9), generator=generator)
            extra = model(input_ids=other, labels=other).loss
            return super().compute_loss(model, inputs, *args, **kwargs) + 0.3 * extra

    return ReplayTrainer


def chosen_then_rejected(base: Class) -> Class:
    """DPO written by hand: a forward for the chosen rows, another for the rejected."""

    class TwoForwardsTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            halves = [
                {
                    name: inputs[name].chunk(2)[half]
                    for name in ("input_ids", "attention_mask", "completion_mask")
                }
                for half in (0, 1)
            ]
            chosen, rejected = (_logps(model, half) for half in halves)
            with torch.no_grad():
                chosen_reference, rejected_reference = (_logps(self.ref_model, half) for half in halves)
            margin = (chosen - chosen_reference) - (rejected - rejected_reference)
            return -F.logsigmoid(self.beta * margin).mean()

    return TwoForwardsTrainer


def swapped(base: Class) -> Class:
    """Trains on the preferences turned round, by handing TRL's loss another batch."""

    class SwappedTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            turned = {name: value.roll(len(value) // 2, 0) for name, value in inputs.items()}
            return super().compute_loss(model, turned, *args, **kwargs)

    return SwappedTrainer


def trl_own(base: Class) -> Class:
    """TRL's class as it is."""
    return base


def own_backward(base: Class) -> Class:
    """Calls backward a second time, on a loss of its own."""

    class OwnBackwardTrainer(base):  # type: ignore[misc,valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(model, inputs, *args, **kwargs)
            given = self._prepare_inputs(inputs)
            extra = (
                model(input_ids=given["input_ids"], attention_mask=given["attention_mask"])
                .logits.square()
                .mean()
            )
            self.accelerator.backward(0.01 * extra)
            return loss

    return OwnBackwardTrainer


def own_backward_in_one_loss(base: Class) -> Class:
    """The loss that `own_backward` really takes the gradient of, for two micro-batches a step."""

    class OneLossTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
            return loss + 2 * 0.01 * logits.square().mean()

    return OneLossTrainer


def fewer_rows(base: Class) -> Class:
    """Leaves the last pair of every batch out, in `_prepare_inputs`."""

    class FewerRowsTrainer(base):  # type: ignore[misc,valid-type]
        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs = super()._prepare_inputs(inputs)
            return {name: torch.cat([half[:-1] for half in value.chunk(2)]) for name, value in inputs.items()}

    return FewerRowsTrainer


def own_optimizer(base: Class) -> Class:
    class OwnOptimizerTrainer(base):  # type: ignore[misc,valid-type]
        def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
            return self.optimizer

    return OwnOptimizerTrainer


def interleaved(base: Class) -> Class:
    """A batch chosen, rejected, chosen, rejected …, with a loss that knows of it: the sides cannot be told."""

    class InterleavedTrainer(base):  # type: ignore[misc,valid-type]
        def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
            inputs = super()._prepare_inputs(inputs)
            return {name: torch.stack(value.chunk(2), 1).flatten(0, 1) for name, value in inputs.items()}

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            logps = _logps(model, inputs)
            return -F.logsigmoid(self.beta * (logps[::2] - logps[1::2])).mean()

    return InterleavedTrainer


def other_rows(base: Class) -> Class:
    """Computes its loss on rows that are not those of the batch."""

    class OtherRowsTrainer(base):  # type: ignore[misc,valid-type]
        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            return model(input_ids=_ids(inputs).flip(0)).logits.square().mean()

    return OtherRowsTrainer


def no_loss(base: Class) -> Class:
    """A training step that does everything itself."""

    class NoLossTrainer(base):  # type: ignore[misc,valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = model(input_ids=self._prepare_inputs(inputs)["input_ids"]).logits.square().mean()
            self.accelerator.backward(loss)
            return loss.detach()

    return NoLossTrainer


def late_backward(base: Class) -> Class:
    """Calls backward a micro-batch late."""

    class LateBackwardTrainer(base):  # type: ignore[misc,valid-type]
        kept: Tensor | None = None

        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
            if self.kept is not None:
                self.accelerator.backward(self.kept)
            self.kept = loss
            return loss.detach()

    return LateBackwardTrainer


def token_advantages(base: Class) -> Class:
    """GRPO with an advantage for every token."""

    class TokenAdvantagesTrainer(base):  # type: ignore[misc,valid-type]
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            advantages = inputs["advantages"]
            if advantages.ndim == 1:
                ramp = torch.linspace(0.5, 1.5, inputs["completion_ids"].shape[1], dtype=advantages.dtype)
                inputs = inputs | {"advantages": advantages[:, None] * ramp}
            return super()._compute_loss(model, inputs)

    return TokenAdvantagesTrainer


class LoopedLlama(LlamaForCausalLM):
    """Runs its middle layer twice."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers.append(self.model.layers[1])
        self.config.num_hidden_layers = len(self.model.layers)


def looped(tokenizer: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return LoopedLlama(make_config(tokenizer))


class TupleLayer(nn.Module):
    """A layer of custom code, whose output is a tuple."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, str]:
        return self.inner(hidden, **kwargs), "something else"


class _First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: tuple[Tensor, str], **kwargs: Any) -> Tensor:
        return self.inner(hidden[0], **kwargs)


def tuples(tokenizer: Any, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(tokenizer))
    model.model.layers[1] = TupleLayer(model.model.layers[1])
    model.model.layers[2] = _First(model.model.layers[2])
    return model


def two_gpus(trainer: Trainer) -> None:
    trainer.args._n_gpu = 2


def encoder_decoder(tokenizer: Any, seed: int = 0) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    )


def _ids(inputs: dict[str, Any]) -> Tensor:
    if "input_ids" in inputs:
        return inputs["input_ids"]
    return torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)


def _mask(inputs: dict[str, Any]) -> Tensor:
    if "attention_mask" in inputs:
        return inputs["attention_mask"]
    return torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)


def _logps(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    tokens, counted = batch["input_ids"][:, 1:], batch["completion_mask"][:, 1:]
    return (logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0] * counted).sum(1)
