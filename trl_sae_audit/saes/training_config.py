"""How a dictionary is trained, and what that means to sae-lens' architectures."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import AuditError

if TYPE_CHECKING:
    import torch

    from ..models.residual_stream import TokenRules

Architecture = Literal["topk", "batchtopk", "matryoshka_batchtopk", "jumprelu", "standard", "gated"]
_DEFAULT_SPARSITY = {"jumprelu": 1.0, "standard": 3.0, "gated": 3.0}


@dataclass
class TrainSAEConfig:
    """How a dictionary is trained."""

    output_dir: str = field(
        metadata={
            "help": "Directory for the trained SAE, in sae-lens' format; with --hook_points one in it for each layer. It must not exist yet."
        }
    )
    hook_point: str | None = field(
        default=None,
        metadata={
            "help": "Where to read the residual stream: a layer's number, a module path such as model.layers.9, or TransformerLens' "
            "blocks.9.hook_resid_post; default the middle layer."
        },
    )
    hook_points: list[str] | None = field(
        default=None,
        metadata={"help": "Several of them: one SAE each, all from one forward pass over the texts."},
    )
    start_from: str | None = field(
        default=None,
        metadata={
            "help": "Fine-tune this SAE instead of beginning with random weights: a directory, or a release of sae-lens with --start_id. "
            "It decides architecture, features and k.",
            "aliases": ["--from"],
        },
    )
    start_id: str | None = field(default=None, metadata={"help": "Which SAE of the release to start from."})
    architecture: Architecture = field(
        default="topk",
        metadata={
            "help": "sae-lens architecture. topk and batchtopk learn untuned; jumprelu, standard and gated may need "
            "another sparsity_coefficient. batchtopk and matryoshka_batchtopk are saved as jumprelu."
        },
    )
    d_sae: int | None = field(
        default=None, metadata={"help": "Number of features; default 4 times the model's width."}
    )
    k: int | None = field(
        default=None,
        metadata={
            "help": "Features active a token (topk), on average a token (batchtopk), the target (jumprelu); not used by "
            "standard and gated. Default a sixteenth of the model's width, between 8 and 64."
        },
    )
    sparsity_coefficient: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the sparsity loss of jumprelu (default 1), standard and gated (default 3); not used by "
            "the topk family."
        },
    )
    context_size: int = field(
        default=256, metadata={"help": "Tokens of a window; longer texts are cut into several."}
    )
    batch_size: int = field(default=16, metadata={"help": "Windows in one forward pass of the model."})
    skip_special_tokens: bool = field(
        default=True,
        metadata={
            "help": "Leave BOS, EOS and other special tokens out of the training data.",
            "negative": "Keep BOS, EOS and other special tokens.",
        },
    )
    skip_first_position: bool = field(
        default=True,
        metadata={
            "help": "Leave out the first token of every window, whose activation most models blow up.",
            "negative": "Keep the first token of every window, whose activation most models blow up.",
        },
    )
    training_tokens: int = field(
        default=2_000_000,
        metadata={
            "help": "Activations to train on in all; smaller texts are gone through several times, each time shuffled."
        },
    )
    distinct_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Read no more than that many of the texts' tokens, and train on them several times: reading takes most of the time. "
            "Default training_tokens."
        },
    )
    buffer_tokens: int = field(
        default=500_000,
        metadata={
            "help": "Activations kept in a memory-mapped temporary file next to output_dir: this number × width × 4 "
            "bytes for each layer. If the texts have more, the file is refilled by halves."
        },
    )
    sae_batch_size: int = field(
        default=1024, metadata={"help": "Activations in one training step of the SAE."}
    )
    lr: float | None = field(
        default=None, metadata={"help": "Learning rate of Adam; default 1e-3, 2e-4 with --from."}
    )
    lr_warmup_share: float = field(
        default=0.05, metadata={"help": "Share of the steps over which the learning rate rises."}
    )
    lr_decay_share: float = field(
        default=0.2, metadata={"help": "Share of the steps, at the end, over which it falls to 0."}
    )
    held_out_share: float = field(
        default=0.05,
        metadata={"help": "Share of the texts kept from training, for the final FVU, L0 and dead features."},
    )
    held_out_tokens: int = field(
        default=20_000, metadata={"help": "Use at most about that many tokens of the held-out texts."}
    )
    max_fvu: float = field(
        default=0.9,
        metadata={
            "help": "An SAE that leaves this fraction of the held-out variance, or of the average token, unexplained has failed."
        },
    )
    max_dead: float = field(
        default=0.9,
        metadata={"help": "An SAE with a greater share of features active on no held-out token has failed."},
    )
    seed: int = field(default=0, metadata={"help": "Of the split, the shuffling and the initial weights."})

    def __post_init__(self) -> None:
        self.architecture = _known_architecture(self.architecture)
        if self.hook_point is not None and self.hook_points is not None:
            raise AuditError("Both hook_point and hook_points are given; give one of them.")
        if self.start_from is not None and self.hook_points is not None:
            raise AuditError("One SAE cannot start those of several layers; give one hook_point with --from.")
        for name in ("k", "distinct_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise AuditError(f"{name} is {value}; it must be at least 1.")
        for name in ("context_size", "batch_size", "training_tokens", "buffer_tokens", "sae_batch_size"):
            if getattr(self, name) < 1:
                raise AuditError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.context_size < 2:
            raise AuditError("context_size is 1; a window needs a token after the first.")
        if not 0 < self.held_out_share < 1:
            raise AuditError(f"held_out_share is {self.held_out_share}; it must lie between 0 and 1.")
        if (
            min(self.lr_warmup_share, self.lr_decay_share) < 0
            or self.lr_warmup_share + self.lr_decay_share > 1
        ):
            raise AuditError("lr_warmup_share and lr_decay_share must be positive and together at most 1.")
        if self.training_tokens < self.sae_batch_size:
            raise AuditError(
                f"training_tokens is {self.training_tokens}, less than one step of sae_batch_size {self.sae_batch_size}."
            )

    @property
    def learning_rate(self) -> float:
        return self.lr if self.lr is not None else 1e-3 if self.start_from is None else 2e-4

    def size(self, d_model: int) -> tuple[int, int]:
        """Features and k of an SAE of a residual stream that wide.

        Raises:
            AuditError: more features active than there are.
        """
        d_sae = self.d_sae or 4 * d_model
        k = self.k if self.k is not None else min(max(d_model // 16, 8), 64, d_sae)
        if k > d_sae:
            raise AuditError(f"k is {k}, but the SAE has only {d_sae} features; choose a smaller k.")
        return d_sae, k

    @property
    def token_rules(self) -> TokenRules:
        from ..models.residual_stream import TokenRules

        return TokenRules(self.context_size, self.skip_special_tokens, self.skip_first_position)


def architecture_settings(
    config: TrainSAEConfig,
    architecture: str,
    d_model: int,
    d_sae: int,
    k: int,
    steps: int,
    device: torch.device,
) -> dict[str, Any]:
    """Settings for sae-lens' training class of the architecture."""
    sparsity = config.sparsity_coefficient
    if sparsity is None:
        sparsity = _DEFAULT_SPARSITY.get(architecture, 0.0)
    warm_up = steps // 4
    # the threshold that a batch's top k becomes is a running mean, which must forget its start within the run
    batchtopk = {"k": k, "topk_threshold_lr": min(1.0, max(0.01, 20 / steps))}
    own: dict[str, dict[str, Any]] = {
        "topk": {"k": k},
        "batchtopk": batchtopk,
        "matryoshka_batchtopk": {**batchtopk, "matryoshka_widths": _nested_widths(d_sae, k)},
        "jumprelu": {
            "jumprelu_sparsity_loss_mode": "quadratic",
            "target_l0": float(k),
            "l0_coefficient": sparsity,
            "l0_warm_up_steps": warm_up,
            "jumprelu_bandwidth": 2.0,
            "jumprelu_init_threshold": 0.1,
            "jumprelu_ste_to_input": True,
            "pre_act_loss_coefficient": 3e-6,
        },
        "standard": {"l1_coefficient": sparsity, "l1_warm_up_steps": warm_up},
        "gated": {"l1_coefficient": sparsity, "l1_warm_up_steps": warm_up},
    }
    return {
        "architecture": architecture,
        "d_in": d_model,
        "d_sae": d_sae,
        "device": str(device),
        "normalize_activations": "expected_average_only_in",
        **own[architecture],
    }


def _nested_widths(d_sae: int, k: int) -> list[int]:
    """Doubling widths that end at `d_sae`, none smaller than what k active features need."""
    widths = [d_sae]
    while widths[0] // 2 >= max(4 * k, d_sae // 16):
        widths.insert(0, widths[0] // 2)
    return widths


def _known_architecture(name: str) -> Architecture:
    if name not in get_args(Architecture):
        raise AuditError(f"architecture is {name!r}; choose one of {', '.join(get_args(Architecture))}.")
    return name  # type: ignore[return-value]
