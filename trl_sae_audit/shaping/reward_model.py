"""A reward model less a penalty on flagged features, for trainers that want an `nn.Module`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import AuditError
from ..flags import Flag, FlagSet
from ..models.event_loop import wait_for
from ..models.hook_points import layer_output
from ..models.reward_models import check_reward_model, model_as_function, strip_adapters
from ..models.reward_values import check_rewards
from ..models.rewards import reward_name
from ..models.tokenizers import Processing, text_tokenizer
from ..trainers.logs import DeferredMetrics
from ..trainers.response_tokens import response_tokens, split_rows, until_padding
from ..trainers.rollout import text_rollout, token_rollout
from .files import load_shaped, save_shaped
from .penalties import Penalty
from .scorer import FeatureScorer
from .shaper import Shaper


@dataclass(frozen=True)
class RewardAtEveryToken:
    """What PPO takes for a backbone's output: it reads the last of `hidden_states` and passes it to `score`."""

    hidden_states: tuple[Tensor]


@dataclass(frozen=True)
class RewardOfRows:
    """What GRPO, RLOO and OnlineDPO read: [rows, 1]."""

    logits: Tensor


class ShapedRewardModel(nn.Module):
    """`r' = r − penalty`, for PPOTrainer's `reward_model`, and for `reward_funcs` that are modules.

    PPO never calls `forward`: it calls the backbone, takes the last hidden state, has `score` make [rows, tokens, 1] of
    it and reads that at the last token of the response. Here the backbone does all of it and subtracts the penalty at
    every token, and `score` hands it through, so whichever token is read, the reward is the inner one minus the penalty.
    Where the response begins, which PPO does not say, is read from its call (see rollout.py).

    Any Python function can be the reward: it is called with decoded `prompts` and `completions` and their
    `completion_ids`. Where the dictionary fits the reward model's own backbone (a scorer of that very model),
    features are read from the reward's own forward pass, and cost no other.

    It is always in evaluation mode, and moves to the device of what it is given.

    Args:
        reward: a sequence classification model with one label and a head called `score`, with PEFT adapters or without;
            or a function
            `f(prompts, completions, completion_ids)` → numbers, async or not.
        scorer: frozen model and dictionary; not needed without flags.
        flags: of the scorer's dictionary.
        penalty: FixedPenalty, AdaptivePenalty, or a coefficient.
        tokenizer: the policy's; the scorer's by default.
        reward_tokenizer: the reward model's, where it is another than the policy's: in PPO texts are then decoded and
            tokenized again. GRPO, RLOO and OnlineDPO take it as `reward_processing_classes`.

    Raises:
        AuditError: a model without backbone or `score`, or of several labels; a tokenizer that does not fit;
            flags that do not fit the scorer. And when called, a reward that is NaN or no single number.

    Example:

    ```python
    shaped = ShapedRewardModel(reward_model, scorer, flags, penalty=AdaptivePenalty())
    trainer = PPOTrainer(args, tokenizer, policy, reference, reward_model=shaped, value_model=value_model, ...)
    GRPOTrainer(policy, reward_funcs=shaped, reward_processing_classes=reward_tokenizer, ...)
    ShapedRewardModel(lambda prompts, completions, **_: [len(c) for c in completions], tokenizer=tokenizer)
    ```
    """

    base_model_prefix = "backbone"

    def __init__(
        self,
        reward: nn.Module | Callable[..., Any],
        scorer: FeatureScorer | None = None,
        flags: Iterable[Flag] = (),
        penalty: Penalty | float | None = None,
        *,
        tokenizer: Processing | None = None,
        reward_tokenizer: Processing | None = None,
    ) -> None:
        super().__init__()
        flags = FlagSet(flags)
        if penalty is None and len(flags):
            raise AuditError(
                "There are flags but no penalty; pass penalty=AdaptivePenalty() or a coefficient."
            )
        if not callable(reward):
            raise AuditError(f"The reward is a {type(reward).__name__}; pass a reward model or a function.")
        classifier = strip_adapters(reward)
        self.name = reward_name(classifier)
        self.shaper = Shaper(scorer, flags, 0.0 if penalty is None else penalty)
        own = None if scorer is None else scorer.tokenizer
        self.tokenizer = own if tokenizer is None else text_tokenizer(tokenizer)
        self.reward_tokenizer = None if reward_tokenizer is None else text_tokenizer(reward_tokenizer)
        self.inner: nn.Module | None = None
        self.config = PretrainedConfig(name_or_path=self.name)
        if isinstance(reward, nn.Module):
            check_reward_model(classifier, self.reward_tokenizer or self.tokenizer)
            self.inner = reward
            if isinstance(classifier, PreTrainedModel):
                self.config = classifier.config
        elif self.tokenizer is None:
            raise AuditError(
                f"The reward is the function {self.name!r}, which reads text; pass the policy's tokenizer as tokenizer=."
            )
        self._function = None if isinstance(reward, nn.Module) else reward
        self._same_tokens = scorer is None or _same_vocabulary(self.tokenizer, scorer.tokenizer)
        self._deferred = DeferredMetrics()
        self.eval()

    def train(self, mode: bool = True) -> ShapedRewardModel:
        """Stays in evaluation mode: a reward with dropout is another reward every time."""
        super().train(False)
        return self

    # PPO

    def backbone(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        **ignored: Any,
    ) -> RewardAtEveryToken:
        """What TRL's get_reward calls: the shaped reward as a hidden state [rows, tokens, 1]."""
        rollout = token_rollout()
        self._move_to(input_ids.device)
        self.shaper.begin(rollout.trainer, learning=rollout.learning)
        attended = until_padding(attention_mask.bool(), rollout.context_length)
        prompts, responses = split_rows(input_ids, attended, rollout.context_length)
        with self._capture() as captured:
            logits = self._inner_logits(input_ids, attention_mask, position_ids, prompts, responses)
        rows = torch.arange(len(logits), device=logits.device)
        last = attended[:, rollout.context_length :].sum(1) - 1 + rollout.context_length
        rewards = check_rewards(logits[rows, last, 0].detach().float().cpu(), len(logits), self.name)
        if captured and self._same_tokens:
            counted = response_tokens(input_ids, attended, rollout.context_length, self._special_ids())
            scores = self._captured_scores(captured[0], counted)
        elif self._same_tokens:
            scores = self.shaper.score_ids(prompts, responses)
        else:
            scores = self.shaper.score(self._decode(prompts), self._decode(responses))
        penalties = self.shaper.penalties(scores, rewards, learning=rollout.learning)
        if rollout.trainer is not None and rollout.learning:
            self._deferred.add(rollout.trainer, self.shaper.metrics)
        return RewardAtEveryToken((_subtract(logits, penalties[:, None, None]),))

    def score(self, hidden_state: Tensor) -> Tensor:
        """Hands the reward that `backbone` put in place of a hidden state through: [rows, tokens, 1]."""
        return hidden_state

    # GRPO, RLOO, OnlineDPO

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **inputs: Tensor) -> RewardOfRows:
        """The shaped rewards of the texts the calling trainer wants judged.

        Raises:
            AuditError: called by no trainer.
        """
        rollout = text_rollout()
        self._move_to(input_ids.device)
        self.shaper.begin(rollout.trainer, learning=rollout.learning)
        with self._capture() as captured:
            if self.inner is not None:
                logits = self.inner(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits
            else:
                values = self._inner_rewards(rollout.prompts, rollout.completions, rollout.keywords)
                logits = torch.tensor(values, dtype=torch.float32, device=input_ids.device)[:, None]
        rewards = check_rewards(logits.detach().float().cpu(), len(input_ids), self.name)
        counted = None
        if captured:
            counted = self._response_mask(input_ids, attention_mask, rollout.prompts, rollout.completions)
        if counted is not None:
            scores = self._captured_scores(captured[0], counted)
        else:
            scores = self.shaper.score(rollout.prompts, rollout.completions)
        penalties = self.shaper.penalties(scores, rewards, learning=rollout.learning)
        if rollout.learning:
            self._deferred.add(rollout.trainer, self.shaper.metrics)
        return RewardOfRows(_subtract(logits, penalties[:, None]))

    # By hand

    def rewards(self, prompts: Sequence[Any], responses: Sequence[Any]) -> list[float]:
        """Shaped rewards of texts as the coefficients are now; nothing moves by it.

        Raises:
            AuditError: a reward model of which no tokenizer is known.
        """
        return self._shape_texts(prompts, responses, learning=False)

    def learn_from(self, prompts: Sequence[Any], responses: Sequence[Any]) -> None:
        """Let the penalty see what the reward pays for these responses, before training: it counts as a batch.

        Args:
            prompts: texts.
            responses: of the reference model, those the scorer was calibrated on say.
        """
        self.shaper.begin(None, learning=True)
        self._shape_texts(prompts, responses, learning=True)

    def _shape_texts(
        self, prompts: Sequence[Any], responses: Sequence[Any], *, learning: bool
    ) -> list[float]:
        inner = self._inner_rewards(
            prompts, responses, {"completion_ids": None}, self.reward_tokenizer or self.tokenizer
        )
        penalties = self.shaper.penalties(self.shaper.score(prompts, responses), inner, learning=learning)
        return [reward - penalty for reward, penalty in zip(inner, penalties.tolist(), strict=True)]

    # To and from disk

    def save_pretrained(self, directory: str | Path) -> None:
        """Write reward model, flags, calibration and the penalty with its coefficients. A function is not written.

        Raises:
            AuditError: a reward model with PEFT adapters.
        """
        save_shaped(Path(directory), self.name, self.inner, self.shaper)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        scorer: FeatureScorer | None = None,
        *,
        reward: nn.Module | Callable[..., Any] | None = None,
        tokenizer: Processing | None = None,
        reward_tokenizer: Processing | None = None,
        **model_arguments: Any,
    ) -> ShapedRewardModel:
        """Read what `save_pretrained` wrote.

        Args:
            directory: where.
            scorer: of the same dictionary; it takes over the calibration that was saved.
            reward: in place of the saved reward model; needed where it was a function.
            tokenizer: as above.
            reward_tokenizer: as above.
            model_arguments: for the reward model's own `from_pretrained`, `dtype=` say.

        Raises:
            AuditError: incomplete, damaged, or of another version or dictionary.
        """
        saved, flags, penalty = load_shaped(Path(directory), scorer, reward, model_arguments)
        return cls(saved, scorer, flags, penalty, tokenizer=tokenizer, reward_tokenizer=reward_tokenizer)

    # Behind it

    def _inner_logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None,
        prompts: list[list[int]],
        responses: list[list[int]],
    ) -> Tensor:
        """The inner reward [rows, tokens, 1] as get_reward would have computed it."""
        if self.inner is not None and self.reward_tokenizer is None:
            model: Any = strip_adapters(self.inner)
            output = getattr(model, model.base_model_prefix)(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                return_dict=True,
                output_hidden_states=True,
                use_cache=False,
            )
            logits = model.score(output.hidden_states[-1])
            if logits.shape[-1] != 1:
                raise AuditError(
                    f"Reward model {self.name!r} gives {logits.shape[-1]} numbers a token; load it with num_labels=1."
                )
            return logits
        values = self._inner_rewards(
            self._decode(prompts),
            self._decode(responses),
            {"completion_ids": responses},
            self.reward_tokenizer,
        )
        return torch.tensor(values, dtype=torch.float32, device=input_ids.device)[:, None, None].expand(
            *input_ids.shape, 1
        )

    def _inner_rewards(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        keywords: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[float]:
        """The inner rewards of texts; `tokenizer` for a reward that is a model."""
        of_texts = self._function if self.inner is None else model_as_function(self.inner, tokenizer)
        assert of_texts is not None
        returned = wait_for(of_texts(prompts=prompts, completions=completions, **keywords))
        return [
            _require_number(reward, self.name) for reward in check_rewards(returned, len(prompts), self.name)
        ]

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        if self.tokenizer is None:
            raise AuditError(
                "Texts must be decoded, but there is no tokenizer; pass the policy's as tokenizer=."
            )
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _special_ids(self) -> Tensor:
        scorer = self.shaper.scorer
        return torch.tensor(sorted(set() if scorer is None else set(scorer.tokenizer.all_special_ids)))

    def _captured_scores(self, hidden: Tensor, counted: Tensor) -> Tensor:
        """Signed scores from the hidden states of the reward's own forward pass."""
        scorer, features = self.shaper.scorer, self.shaper.features
        assert scorer is not None
        raw = scorer.pool(hidden, counted.to(hidden.device), torch.tensor(features))
        return self.shaper.apply_directions(scorer.standardise(raw.cpu(), features))

    def _response_mask(
        self, input_ids: Tensor, attention_mask: Tensor, prompts: Sequence[Any], completions: Sequence[Any]
    ) -> Tensor | None:
        """Which tokens are the responses', if the rows are to the token what the scorer would read; else None."""
        scorer = self.shaper.scorer
        assert scorer is not None
        attended = attention_mask.bool()
        counted = torch.zeros_like(attended)
        for row, (before, after) in enumerate(scorer.tokenize(prompts, completions)):
            if input_ids[row][attended[row]].tolist() != [*before, *after] or len(before) == 0:
                return None
            counted[row] = attended[row] & (attended[row].cumsum(0) > len(before))
        return counted & ~torch.isin(input_ids, self._special_ids().to(input_ids.device))

    @contextlib.contextmanager
    def _capture(self) -> Iterator[list[Tensor]]:
        """The hidden states at the scorer's hook point, if the reward's own forward pass goes through it."""
        captured: list[Tensor] = []
        scorer = self.shaper.scorer
        if scorer is None or not self.shaper.features or self.inner is None:
            yield captured
            return
        if self.reward_tokenizer is not None or all(
            module is not scorer.point.module for module in self.inner.modules()
        ):
            yield captured
            return

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            captured.append(layer_output(output).detach())

        handle = scorer.point.module.register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()

    def _move_to(self, device: torch.device) -> None:
        if self.inner is not None and next(self.inner.parameters()).device != device:
            self.inner.to(device)
        if self.shaper.scorer is not None:
            self.shaper.scorer.to(device)


def _subtract(logits: Tensor, penalties: Tensor) -> Tensor:
    """In float32 or better, returned in the logits' own type."""
    return (logits.float() - penalties.to(logits.device, torch.float32)).to(logits.dtype)


def _require_number(reward: float | None, name: str) -> float:
    if reward is None:
        raise AuditError(
            f"Reward {name!r} returned None, but a reward model must judge every response; return a number."
        )
    return reward


def _same_vocabulary(one: PreTrainedTokenizerBase | None, other: PreTrainedTokenizerBase) -> bool:
    return one is not None and (one is other or one.get_vocab() == other.get_vocab())
