"""A shield: flagged directions are taken out of the gradient on its way down, so no layer below learns them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..errors import AuditError
from ..flags import Flag, FlagSet, distinct_names
from ..models.hook_points import layer_output
from ..saes.compatibility import check_dictionary
from ..saes.dictionary import FeatureDictionary
from ..trainers.engines import check_engine
from ..trainers.hooks import TrainerHooks
from ..trainers.kinds import calling_trainer, check_added_once, policy_of
from ..trainers.lifecycle import TrainerListener
from ..trainers.logs import log_kind

Mode = Literal["full", "positive"]
MODES: tuple[Mode, ...] = get_args(Mode)
_RANK_TOLERANCE = 1e-6
_SWEEPS = 200
_SETTLED = 1e-7


class FeatureShieldCallback(TrainerCallback):
    """Takes flagged decoder directions out of the residual gradient at the hook point, token by token.

    mode "full": with `V` the orthonormal basis of the flagged directions' span,

        g' = g − strength·V V^T g

    mode "positive": only what a step down the gradient would strengthen is taken out (for a flag of direction
    "down": weaken; "both": either). g' is the nearest gradient to g for which no step does so, the projection onto
    {g : ⟨g, d_f⟩ ≥ 0 for every flag}, and `strength` how far towards it.

    Parameters of the layers at and below the hook point get the gradient of a loss that asks nothing of these directions.
    Layers above can still learn to read them, and what enters the stream along other directions and becomes the feature
    later is not stopped. With an empty flag set nothing is touched, and training is bit-identical.

    Logs `shield/{label}/before` and `/after`: attribution, −⟨Σ g, d_f⟩, per optimizer step, of both gradients.
    A FeatureAttributionCallback before it in `callbacks` records the gradient before, one after it the gradient after. With bfloat16 gradients, g' is orthogonal up to bfloat16's rounding.

    Args:
        dictionary: whose directions.
        flags: of that dictionary; their weights do not matter here.
        strength: 1 takes the part out wholly, 0.5 half of it.
        mode: "full" or "positive".

    Raises:
        AuditError: strength outside 0…1, an unknown mode, flags of another dictionary, a flagged feature without a
            direction; and from `trainer.train()` a dictionary that does not fit the model, or nothing trainable below
            the hook point.

    Example:

    ```python
    trainer = DPOTrainer(model, ..., callbacks=[FeatureShieldCallback(dictionary, flags)])
    ```
    """

    def __init__(
        self,
        dictionary: FeatureDictionary,
        flags: Iterable[Flag],
        *,
        strength: float = 1.0,
        mode: Mode = "full",
    ) -> None:
        if mode not in MODES:
            raise AuditError(f"The shield's mode is {mode!r}; choose one of {', '.join(MODES)}.")
        if not 0 <= strength <= 1:
            raise AuditError(
                f"The shield's strength is {strength}; give a number from 0, which takes nothing, to 1, which takes all."
            )
        if dictionary.reads is not None:
            raise AuditError(
                f"Dictionary {dictionary.name!r} is a transcoder: the shield would take the features out of what one MLP adds, and "
                "leave the residual stream beside it as it is. Use an SAE of the residual stream."
            )
        flags = FlagSet(flags)
        self.dictionary = dictionary
        self.flags = flags.of(dictionary) if len(flags) else []
        if len(self.flags) < len(flags):
            raise AuditError(
                f"Some flags are not of dictionary {dictionary.name!r}; pass one shield for each dictionary."
            )
        for flag in self.flags:
            if not float(dictionary.norms[flag.feature]) > 0:
                raise AuditError(
                    f"Flag {flag.name!r} is feature {flag.feature}, whose direction is zero: there is nothing to take "
                    "out. Flag another feature."
                )
        self.strength = strength
        self.mode = mode
        self._run: _Run | None = None
        directions = dictionary.rows([flag.feature for flag in self.flags])
        signs = torch.tensor(
            [-1.0 if flag.direction == "down" else 1.0 for flag in self.flags], dtype=torch.float32
        )
        self._rows = span_basis(directions) if mode == "full" else directions * signs.to(directions)[:, None]
        self._both = torch.tensor([flag.direction == "both" for flag in self.flags], dtype=torch.bool)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()
        trainer = calling_trainer(self)
        check_added_once(self, trainer)
        if self.flags:
            self._run = _Run(self, trainer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._run is not None:
            self._run.before_optimizer_step()

    def __getstate__(self) -> dict[str, Any]:
        """A copy, or what is pickled, has the options and no run: it shields nothing until a trainer calls it."""
        return {**vars(self), "_run": None}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the shield off model and trainer."""
        if self._run is not None:
            self._run.abort()
            self._run = None

    def shield_gradient(self, gradient: Tensor) -> Tensor:
        """g' of gradients [..., d_model], in their own type."""
        if self._rows.device != gradient.device:
            self._rows, self._both = self._rows.to(gradient.device), self._both.to(gradient.device)
        flat = gradient.reshape(-1, gradient.shape[-1]).float()
        if self.mode == "full":
            out = take_out_span(flat, self._rows, self.strength)
        else:
            out = take_out_positive(flat, self._rows, self._both, self.strength)
        return out.reshape(gradient.shape).to(gradient.dtype)


class _Run(TrainerListener):
    """One training run under the shield."""

    def __init__(self, shield: FeatureShieldCallback, trainer: Trainer) -> None:
        self.shield = shield
        self.trainer = trainer
        check_engine(trainer)
        self.point = check_dictionary(shield.dictionary, policy_of(trainer))
        device = trainer.accelerator.device
        shield.dictionary = shield.dictionary.to(device)
        self._directions = shield.dictionary.rows([flag.feature for flag in shield.flags])
        self._names = distinct_names(shield.flags)
        self._seen = False
        self._step = torch.zeros(2, len(shield.flags), dtype=torch.float32, device=device)
        self._window = torch.zeros_like(self._step)
        self._steps = 0
        self._handle = self.point.module.register_forward_hook(self._on_forward)
        try:
            self._hooks = TrainerHooks(trainer, self)
        except BaseException:
            self._handle.remove()
            raise

    @torch.compiler.disable
    def _on_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        hidden = layer_output(output)
        if torch.is_grad_enabled() and hidden.requires_grad and hidden.grad_fn is not None:
            hidden.register_hook(self._on_gradient)

    def _on_gradient(self, gradient: Tensor) -> Tensor:
        self._seen = True
        shielded = self.shield.shield_gradient(gradient)
        for row, tokens in enumerate((gradient, shielded)):
            total = tokens.reshape(-1, tokens.shape[-1]).sum(0, dtype=torch.float32)
            self._step[row] -= self._directions @ total
        return shielded

    # What the trainer reports

    def before_optimizer_step(self) -> None:
        """Raises:
        AuditError: if no gradient has come through the hook point.
        """
        if not self._seen:
            raise AuditError(
                f"No gradient passes {self.point.path!r}: nothing below it is trained, so there is nothing to shield. "
                "Choose a dictionary of a layer above the lowest trainable parameters, or take the shield out."
            )
        self._window += self._step / self._hooks.take_divisor()
        self._step.zero_()
        self._steps += 1

    def enrich_log(self, logs: dict[str, Any]) -> None:
        """Add the window's means to a training log."""
        if log_kind(logs) != "training" or not self._steps:
            return
        window = self._window / self._steps
        if self.trainer.accelerator.num_processes > 1:
            window = self.trainer.accelerator.reduce(window, "sum")
        for index, name in enumerate(self._names):
            logs[f"shield/{name}/before"] = float(window[0, index])
            logs[f"shield/{name}/after"] = float(window[1, index])
        self._window.zero_()
        self._steps = 0

    def abort(self) -> None:
        """Take everything off model and trainer."""
        self._handle.remove()
        self._hooks.remove()


def span_basis(directions: Tensor) -> Tensor:
    """An orthonormal basis of the span of [k, d_model] rows: [rank, d_model]."""
    if not len(directions):
        return directions
    _, values, right = torch.linalg.svd(directions.double(), full_matrices=False)
    return right[values > _RANK_TOLERANCE * values[0]].to(directions)


def take_out_span(gradient: Tensor, basis: Tensor, strength: float = 1.0) -> Tensor:
    """g − strength·V V^T g.

    Args:
        gradient: [n, d_model], float32.
        basis: V^T [rank, d_model], orthonormal rows.
        strength: how much of the part along the span goes.
    """
    return gradient - strength * (gradient @ basis.T) @ basis


def take_out_positive(gradient: Tensor, directions: Tensor, both: Tensor, strength: float = 1.0) -> Tensor:
    """The nearest gradients g' with ⟨g', d_f⟩ ≥ 0, or = 0 where `both`: no step along −g' strengthens a feature.

    g' = g + Σ_f μ_f d_f with μ ≥ 0 (of either sign where `both`) the least-squares solution, found by cyclic
    coordinate descent on its dual (Hildreth 1957), which for one direction is exact at once.

    Args:
        gradient: [n, d_model], float32.
        directions: [k, d_model], unit rows, turned so that strengthening is along them.
        both: [k], bool.
        strength: how far to go from g to g'.
    """
    directions = directions.double()
    gram = directions @ directions.T
    along = gradient.double() @ directions.T
    multipliers = torch.zeros_like(along)
    least = torch.where(both, -torch.inf, 0.0).to(along)
    for _ in range(1 if len(directions) == 1 else _SWEEPS):
        before = multipliers.clone()
        for feature in range(len(directions)):
            short = along[:, feature] + multipliers @ gram[:, feature]
            multipliers[:, feature] = (multipliers[:, feature] - short / gram[feature, feature]).clamp_min(
                float(least[feature])
            )
        if bool((multipliers - before).abs().max() <= _SETTLED * along.abs().max()):
            break
    return gradient + strength * (multipliers @ directions).to(gradient)
