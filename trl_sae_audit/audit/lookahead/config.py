"""How an audit looks ahead."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from ...errors import AuditError
from ...models.sampling import Sampling

if TYPE_CHECKING:
    import torch

    from ...data.opener import DatasetLike
    from .jvp import Method
    from .optimizer_step import UpdateRule


@dataclass(frozen=True)
class LookaheadConfig:
    """What a lookahead looks at, and how far.

    Raises:
        AuditError: a number below what it must be, or a combination that looks at nothing.
    """

    probe: DatasetLike | None = None
    """Held-out pairs, on whose answers the change on given text is predicted too, or rows of `prompt`. None to hold prompts out
    of the dataset."""
    prompts: int = 64
    """Prompts held out of the dataset where there is no probe, at most a quarter of those drawn."""
    pairs: int | None = 4096
    """Rows of the dataset, drawn at random, whose gradient is taken; None for all of them."""
    sampling: Sampling | None = Sampling(answers=4, max_new_tokens=64)  # noqa: RUF009, it is frozen
    """How to sample answers at the probe's prompts, at temperature 1; None to leave generations out."""
    optimizer: UpdateRule | torch.optim.Optimizer | None = None
    """Whose step: a rule, or a running `torch.optim.AdamW` or `SGD`; None for the usual step of a trainer with `args`."""
    groups: int = 4
    """Random parts of the pairs whose effects are compared, to tell the noise of having only so many; each costs a pass with
    derivatives over the answers."""
    unroll_steps: float | None = None
    """Also predict what a run of that many steps at the full learning rate does (half the steps of a linear schedule)."""
    unroll_segments: int | None = None
    """Long steps that the unrolled run takes; None for one in ten of the run's steps, and at least four."""
    method: Method = "auto"
    """How to differentiate along the step: "forward", "finite_difference", or forward where the model can ("auto")."""

    def __post_init__(self) -> None:
        for name in ("prompts", "pairs", "groups"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AuditError(f"{name} is {value}; it must be at least 1.")
        if self.unroll_steps is None and self.unroll_segments is not None:
            raise AuditError(
                "unroll_segments= is for an unrolled run; set unroll_steps= as well, or omit it."
            )
        if self.sampling is None and self.probe is None:
            raise AuditError(
                "A lookahead without sampling looks at given text; pass probe= with held-out pairs, or leave sampling= as it is."
            )
        if self.sampling is not None and self.sampling.temperature != 1:
            raise AuditError(
                f"The temperature is {self.sampling.temperature}; a lookahead to generations needs answers sampled at temperature 1."
            )

    @property
    def is_default(self) -> bool:
        """Whether nothing was asked for in particular."""
        return all(getattr(self, field.name) == field.default for field in fields(self))
