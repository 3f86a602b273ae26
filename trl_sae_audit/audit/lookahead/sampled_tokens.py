"""Sampled answers as the model reads them: how a step changes their tokens' log-probabilities, and their hidden states."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...models.batches import pad
from ...models.prompt_cache import PromptCache, can_continue_prompts
from ...models.token_ids import Ids
from ...saes.dictionary import FeatureDictionary
from .jvp import Function, Line
from .lookahead import AnswerStates, Lookahead
from .processes import join_lists

logger = logging.getLogger(__name__)

_COPIES = 8  # of activations, that those who read them make in float64 and of indices


def places_of(predicted: Tensor) -> Tensor:
    """Of each predicted token in its answer, from 0: [m]."""
    return (predicted.cumsum(1) - 1)[predicted]


@dataclass(frozen=True)
class SharedPrompts:
    """The rows of a batch in two pieces: every distinct prompt without its last token, and what each row goes on with.

    A model that remembers a prompt as keys and values reads it once for all of its answers, exact to rounding, derivatives included.

    Attributes:
        begun: the distinct prompts, without their last token.
        which: of each row.
        ids: the last token of the prompt and the answer, right-padded [rows, tokens].
        attended: which of them are real [rows, tokens].
    """

    begun: Sequence[Ids]
    which: Sequence[int]
    ids: Tensor
    attended: Tensor

    @classmethod
    def of(cls, batch: dict[str, Tensor]) -> SharedPrompts | None:
        """None where no prompt has two answers, or one is of a single token."""
        real, answer = batch["attention_mask"].bool(), batch["completion_mask"].bool()
        begun: list[Ids] = []
        continued = []
        for ids, attended, own in zip(batch["input_ids"], real, answer, strict=True):
            prompt = ids[attended & ~own].tolist()
            begun.append(tuple(prompt[:-1]))
            continued.append([*prompt[-1:], *ids[own].tolist()])
        distinct = list(dict.fromkeys(begun))
        if len(distinct) == len(begun) or not all(distinct):
            return None
        number = {prompt: place for place, prompt in enumerate(distinct)}
        device = batch["input_ids"].device
        tokens, attended = (value.to(device) for value in pad(continued))
        return cls(distinct, [number[prompt] for prompt in begun], tokens, attended)

    @property
    def predicted(self) -> Tensor:
        """The answers' tokens, one to the left: [rows, tokens − 1]."""
        return self.attended[:, 1:]

    def last_hidden_state(self, prompts: PromptCache) -> Tensor:
        """[rows, tokens, d_model] of what the rows go on with."""
        prefix = prompts.prefill(self.begun).select(self.which)
        positions = prefix.attended.sum(1, keepdim=True) + torch.arange(self.ids.shape[1])
        attended = torch.cat([prefix.attended, self.attended.cpu()], 1)
        return prompts.extend(prefix.cache, self.ids, attended, positions).last_hidden_state


@dataclass
class SampledTokens:
    """All answers to some prompts; m tokens.

    Attributes:
        prompts: number of each row's prompt [rows].
        batch: the answers padded.
        predicted: their tokens, one to the left [rows, T − 1].
        places: of each token in its answer [m].
        owners: the row of each token [m].
        shared: the batch with its prompts apart, if they are read once.
        changes: for each part of the step, how it changes the tokens' log-probabilities [m].
        states: hidden states of the tokens, once a pass has gone by.
    """

    prompts: Tensor
    batch: dict[str, Tensor]
    predicted: Tensor
    places: Tensor
    owners: Tensor
    shared: SharedPrompts | None = None
    changes: list[Tensor] = field(default_factory=list)
    states: AnswerStates | None = None

    @classmethod
    def of(cls, prompts: Tensor, batch: dict[str, Tensor]) -> SampledTokens:
        predicted = batch["completion_mask"][:, 1:].bool()
        return cls(prompts, batch, predicted, places_of(predicted), predicted.nonzero()[:, 0])

    @property
    def tokens(self) -> int:
        return len(self.places)

    def log_probs(self, ahead: Lookahead) -> Function:
        """Of the tokens [m], of the parameters."""
        targets = self.batch["input_ids"][:, 1:][self.predicted]
        if self.shared is None:
            return ahead.gradients.log_probs(self.batch, self.predicted, targets)
        shared, prompts = self.shared, PromptCache(ahead.point.decoder, lambda forward: forward())
        return ahead.gradients.log_probs_of(
            lambda: shared.last_hidden_state(prompts)[:, :-1][shared.predicted], targets
        )

    def change_along(self, ahead: Lookahead, line: Line) -> None:
        with ahead.unmoved_states() as seen:
            change = ahead.jvp.derivative(self.log_probs(ahead), line, "log-probabilities")
        self.changes.append(change.double())
        if self.states is not None:
            return
        if ahead.jvp.method == "finite_difference" or not seen:
            self.states = ahead.states(self.batch)
        elif self.shared is None:
            self.states = ahead.states_of(seen[-1], self.batch["completion_mask"].bool())
        else:
            self.states = ahead.states_of(seen[-1][:, 1:], self.shared.predicted)

    def encoded(self, dictionary: FeatureDictionary) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Some tokens at a time: which, their activations, and the roots of these [n, d_sae]."""
        assert self.states is not None
        size = max(1, dictionary.tokens_at_once // _COPIES)
        for number, part in enumerate(self.states.parts(size)):
            here = slice(number * size, (number + 1) * size)
            values = part.activations(dictionary.encode).double()
            yield here, values, values.abs().sqrt_().copysign_(values)


@torch.no_grad()
def share_prompts(ahead: Lookahead, answers: Sequence[SampledTokens]) -> None:
    """Let the model read every prompt once for its answers in a batch, if it reads the first such batch as it does whole rows."""
    if not can_continue_prompts(ahead.point.decoder):
        return
    checked = False
    for some in answers:
        whole = None if checked else some.log_probs(ahead)(ahead.parameters)
        some.shared = SharedPrompts.of(some.batch)
        if some.shared is None or checked:
            continue
        assert whole is not None
        gap = some.log_probs(ahead)(ahead.parameters) - whole
        if not gap.norm() <= torch.finfo(next(ahead.model.parameters()).dtype).eps ** 0.5 * whole.norm():
            some.shared = None
            logger.info(
                "%s reads an answer differently after its prompt's keys and values; prompts are read once an answer.",
                type(ahead.point.decoder).__name__,
            )
            return
        checked = True


def longest_answer(answers: Sequence[SampledTokens]) -> int:
    """Tokens of the longest answer, over all processes."""
    own = max([int(some.places.max()) + 1 for some in answers if some.tokens], default=0)
    return max(join_lists([own]))
