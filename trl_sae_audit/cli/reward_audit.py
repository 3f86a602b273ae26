"""Audits of rewards on the command line: their options, and how they are made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AuditError
from .options import ModelArguments
from .parser import option

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl import GRPOConfig

Objective = Literal["dpo", "policy_gradient", "reward_model"]


@dataclass
class RewardArguments:
    """A reward."""

    reward: list[str] | None = option(
        "For --objective policy_gradient: a function as module:function, of a module that is installed or in the current directory, "
        "called as TRL's GRPOTrainer calls it; or several.",
        None,
        main=True,
        metavar="MODULE:FUNCTION",
    )
    reward_model: str | None = option(
        "Directory or Hub name of a sequence classification model of one label: a reward of --objective policy_gradient, or what "
        "--objective reward_model asks.",
        None,
        main=True,
        aliases=["--reward_model_name_or_path"],
    )
    reward_weights: list[float] | None = option(
        "Of several rewards, those of --reward first; default 1 each.", None
    )
    num_generations: int = option("Answers to sample at each prompt of a dataset without 'completion'.", 4)
    max_completion_length: int = option("Longest of these answers, in tokens.", 128)
    temperature: float = option("Of sampling them.", 1.0)
    scale_rewards: Literal["group", "batch", "none"] = option("As in TRL's GRPOConfig.", "group")

    def names(self) -> list[str]:
        """The rewards, as TRL's `reward_funcs` takes them."""
        return [*(self.reward or []), *([self.reward_model] if self.reward_model else [])]


def check_objective(
    objective: Objective, model: ModelArguments, reward: RewardArguments, others: Any
) -> None:
    """Refuse options of one objective that were given for another.

    Args:
        objective: what is audited.
        model: the policy.
        reward: the options of rewards.
        others: the options of DPO, by their names.

    Raises:
        AuditError: naming the option.
    """
    unused: dict[str, Any] = {}
    if objective != "reward_model" and not model.model:
        raise AuditError("--model must be given; see trl-sae-audit audit --help.")
    if objective == "dpo":
        unused = {each.name: (getattr(reward, each.name), each.default) for each in fields(reward)}
    elif objective == "policy_gradient":
        if not reward.names():
            raise AuditError(
                "--objective policy_gradient needs a reward; give --reward module:function or --reward_model."
            )
    else:
        if not reward.reward_model:
            raise AuditError("--objective reward_model needs --reward_model, the model that is asked.")
        unused = {"reward": (reward.reward, None), "model": (model.model, "")}
    for name, (given, default) in (unused | dict(others)).items():
        if given != default:
            raise AuditError(
                f"--{name} is not used with --objective {objective}; omit it, or choose another objective."
            )


def grpo_config(
    reward: RewardArguments, output_dir: str, learning_rate: float, batch_size: int
) -> GRPOConfig:
    """The GRPOConfig that the options describe.

    Raises:
        AuditError: TRL refuses it.
    """
    from accelerate import PartialState
    from trl import GRPOConfig

    together = reward.num_generations * batch_size * PartialState().num_processes
    try:
        return GRPOConfig(
            output_dir,
            num_generations=reward.num_generations,
            max_completion_length=reward.max_completion_length,
            temperature=reward.temperature,
            scale_rewards=reward.scale_rewards,
            reward_weights=reward.reward_weights,
            learning_rate=learning_rate,
            per_device_train_batch_size=batch_size,
            generation_batch_size=together,
            bf16=False,
            report_to="none",
        )
    except ValueError as error:
        raise AuditError(f"TRL refuses these options: {' '.join(str(error).split())}") from error


def load_rewards(reward: RewardArguments, model: ModelArguments) -> list[Any]:
    """The rewards: functions by name, the model loaded as the policy is."""
    loaded: list[Any] = list(reward.reward or [])
    if reward.reward_model:
        loaded.append(load_judge(reward.reward_model, model)[0])
    return loaded


def load_judge(name: str, model: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A reward model and its tokenizer, on the device and in the type that the options of the policy say."""
    import torch

    from ..models.reward_models import load_reward_model, load_reward_tokenizer

    device = model.device or ("cuda" if torch.cuda.is_available() else "cpu")
    judge = load_reward_model(
        name, dtype=getattr(torch, model.dtype), trust_remote_code=model.trust_remote_code
    ).to(device)
    tokenizer = load_reward_tokenizer(judge)
    if tokenizer is None:
        raise AuditError(
            f"The reward model {name!r} does not say where its tokenizer is; save both in one directory."
        )
    return judge, tokenizer
