"""What looks at the tokens of a micro-batch inside its backward pass.

A sample for the dictionary's fit, token scores, and the response tokens that tell what the step selects for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from ..models.attention_sinks import find_attention_sinks, silent_tokens
from ..models.language_head import LanguageHead
from ..saes.dictionary import FeatureDictionary
from ..saes.fit import Health, health
from .contexts import ContextReservoir, Peaks
from .gradient_hook import ForwardRecord, TokenView
from .responses import DrawnTokens, LastHidden, draw_known, draw_unknown
from .scores import TokenScores
from .selection import RESIDUAL_TOLERANCE, ResponseSums, RowSelections, draw_tokens

logger = logging.getLogger(__name__)

_UNKNOWN = (
    "The selection of the features of %r is not known, and recorded as absent: %s. Attribution is not affected; "
    "selection=False leaves selection out."
)
_MIXED = (
    "The loss depends on more than the log-probabilities of the responses' tokens, such as their entropy. Selection is what "
    "it does through the log-probabilities; the rest is not in it."
)


EVERY_TOKEN = 2**31


class TokenSample:
    """Some tokens of the latest micro-batch, to see on them how well the dictionary fits.

    A token counts if a gradient reaches it and its predecessor. So neither padding counts, nor a row's first token,
    whose norm in many models is far from all others'. Attention sinks do not count either.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.hidden: Tensor | None = None
        self.written: Tensor | None = None
        self.weight: Tensor | None = None

    def __call__(self, view: TokenView) -> None:
        rows, length, width = view.hidden.shape
        device, size = view.hidden.device, min(self.size, rows * length)
        index = torch.linspace(0, rows * length - 1, size, dtype=torch.float32, device=device).long()
        before = (index - 1).clamp(min=0)
        flat = view.gradient.reshape(-1, width)
        reached = (flat[index] != 0).any(-1) & (flat[before] != 0).any(-1) & (index % length > 0)
        sampled = view.hidden.reshape(-1, width)[index]
        reached &= ~find_attention_sinks(sampled[None], reached[None])[0]
        self.hidden, self.weight = sampled, reached.float()
        self.written = view.written.reshape(-1, width)[index]

    def health(self, dictionary: FeatureDictionary) -> Health | None:
        """How the dictionary fits the sample; None before there is one."""
        return None if self.hidden is None else health(dictionary, self.hidden, self.weight, self.written)


class _Draws:
    """Random numbers that a seed, a step and a micro-batch determine: a resumed run draws the same."""

    def __init__(self, device: torch.device, seed: Sequence[int]) -> None:
        self._seed = tuple(seed)
        self.generator = torch.Generator(device)

    def begin(self, step: int, microbatch: int) -> None:
        seed = np.random.SeedSequence((*self._seed, step, microbatch)).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(seed >> np.uint64(1)))


class TokenScoreObserver:
    """Token-level scores of one micro-batch, from some of its loss positions, drawn in proportion to their gradients.

    Args:
        dictionary: whose features are scored.
        budget: tokens to draw of a forward; by default all.
        seed: of the draws, any numbers.
        attention_sinks: count features as active at attention sinks too.
    """

    def __init__(
        self,
        dictionary: FeatureDictionary,
        budget: int = EVERY_TOKEN,
        seed: Sequence[int] = (),
        *,
        attention_sinks: bool = False,
    ) -> None:
        self.dictionary = dictionary
        self.attention_sinks = attention_sinks
        self.budget = budget
        self._draws = _Draws(dictionary.device, seed)
        self._scores = TokenScores.zero(dictionary)

    def begin(self, step: int, microbatch: int) -> None:
        """Draw the next tokens by random numbers that these and the seed determine."""
        self._draws.begin(step, microbatch)

    def __call__(self, view: TokenView) -> None:
        counted = view.forward.loss_positions
        if counted is None:
            return
        gradient = torch.where(counted[..., None], view.gradient, 0).float()
        self._scores.gradient_squares += gradient.square().sum()
        sizes = torch.linalg.vector_norm(gradient, dim=-1)
        draw = draw_tokens(sizes, counted, self.budget, self._draws.generator)
        width = gradient.shape[-1]
        g, h = (values.reshape(-1, width)[draw.index] for values in (gradient, view.hidden))
        silent = silent_tokens(view.hidden, counted, attention_sinks=self.attention_sinks)
        self._scores.add(g, h, self.dictionary, draw.scale, silent.flatten()[draw.index])

    def take(self) -> TokenScores:
        """Hand over the micro-batch's scores, and start the next one's at zero."""
        scores, self._scores = self._scores, TokenScores.zero(self.dictionary)
        return scores


class SelectionObserver:
    """Draws response tokens in the backward pass, and finds after it what their rows select for.

    Args:
        dictionary: encodes them.
        budget: tokens to draw of a forward.
        head: of the model, where weights have to be found at the last hidden state; None where that cannot be.
        seed: of the draws, any numbers.
        contexts: also keep where the features are most active.
        attention_sinks: count features as active at attention sinks too.

    Attributes:
        silent: of the response tokens seen so far, those at which no feature counts as active, []; None before there are any tokens.
        mixed: whether a loss so far depends on something besides the responses' log-probabilities; None if none could.
        residual: of the latest weights found at the last hidden state; None before there are any.
        contexts: where the features are most active among the tokens encoded so far; None if that is not kept.
        on_responses: is told of each micro-batch's token ids, and which of them are a response's, [rows, tokens] both.
    """

    def __init__(
        self,
        dictionary: FeatureDictionary,
        budget: int,
        head: LanguageHead | None = None,
        seed: Sequence[int] = (),
        *,
        contexts: bool = False,
        attention_sinks: bool = False,
    ) -> None:
        self.dictionary = dictionary
        self.budget = budget
        self.head = head
        self.attention_sinks = attention_sinks
        self.silent: Tensor | None = None
        self.mixed: Tensor | None = None
        self.residual: Tensor | None = None
        self.contexts = ContextReservoir(dictionary.d_sae, dictionary.device) if contexts else None
        self.on_responses: Callable[[Tensor, Tensor], None] | None = None
        self._draws = _Draws(dictionary.device, seed)
        self._reported_unknown = self._reported_mixed = False
        self._pending: list[tuple[DrawnTokens, LastHidden]] = []

    def begin(self, step: int, microbatch: int) -> None:
        """Draw the next tokens by random numbers that these and the seed determine."""
        self._draws.begin(step, microbatch)
        self._pending = []

    def __call__(self, view: TokenView) -> None:
        forward = view.forward
        how = view.hidden, forward.lengths, self.budget, self._draws.generator
        drawn = None
        if forward.responses is not None:
            drawn = draw_known(forward.responses, *how, attention_sinks=self.attention_sinks)
        elif forward.last is not None and forward.ids is not None and self.head is not None:
            pending = draw_unknown(forward.last, forward.ids, *how, attention_sinks=self.attention_sinks)
            if pending is not None:
                drawn = pending[0]
                self._pending.append(pending)
        forward.drawn.append(drawn)

    def report(self, unknown: np.ndarray) -> None:
        """Say, once, what is missing in some steps: selection itself where it is unknown, or a part of the loss."""
        if unknown.any() and not self._reported_unknown:
            self._reported_unknown = True
            logger.warning(_UNKNOWN, self.dictionary.name, self._why_unknown())
        if self.mixed is not None and not self._reported_mixed and bool(self.mixed):
            self._reported_mixed = True
            logger.warning(_MIXED)

    def report_sinks(self) -> None:
        """Say how many of the response tokens were attention sinks, if any; reads their number from the device."""
        if self.silent is None or not int(self.silent):
            return
        logger.info(
            "%d response tokens were attention sinks (more than ten times the median norm), where no feature of %r counts as active; "
            "attention_sinks=True counts them.",
            int(self.silent),
            self.dictionary.name,
        )

    def _why_unknown(self) -> str:
        residual = 0.0 if self.residual is None else float(self.residual)
        if residual > RESIDUAL_TOLERANCE:
            return (
                "this loss is not a function of the log-probabilities of the responses' tokens, which leave "
                f"{residual:.0%} of its gradient unexplained"
            )
        return "the log-probabilities that this trainer's loss is computed from cannot be found"

    def select(self, forwards: Sequence[ForwardRecord]) -> ResponseSums:
        """Encode what was drawn of the forwards, and tell each what its rows select for: NaN where that cannot be known."""
        pending, self._pending = self._pending, []
        for drawn, last in pending:
            assert self.head is not None
            self.residual = last.weigh(drawn, self.head)
        nothing = torch.zeros(self.dictionary.d_sae, dtype=torch.float32, device=self.dictionary.device)
        responses = ResponseSums(nothing, nothing, nothing[:1])
        for forward in forwards:
            if forward.gradient is None:
                continue
            if forward.responses is not None and forward.responses.mixed is not None:
                mixed = forward.responses.mixed
                self.mixed = mixed if self.mixed is None else self.mixed | mixed
            forward.selected = self._selection(forward, len(forward.gradient))
            responses = responses + forward.selected.responses
            forward.drawn = []
        return responses

    def _selection(self, forward: ForwardRecord, rows: int) -> RowSelections:
        drawn = [drawn for drawn in forward.drawn if drawn is not None]
        parts = [each.encode(self.dictionary, peaks=self.contexts is not None) for each in drawn]
        if parts:
            silent = drawn[0].silent.sum()
            self.silent = silent if self.silent is None else self.silent + silent
            self._keep_contexts(forward, drawn[0], parts[0])
        if not parts or len(parts) < len(forward.drawn):
            unknown = torch.full(
                (self.dictionary.d_sae,), torch.nan, dtype=torch.float32, device=self.dictionary.device
            )
            sums = ResponseSums(unknown, unknown, unknown[:1])
            return RowSelections(unknown.expand(rows, -1), unknown[:1].expand(rows), sums)
        return RowSelections(
            torch.stack([part.products for part in parts]).sum(0),
            torch.stack([part.weights for part in parts]).sum(0),
            parts[0].responses,
        )

    def _keep_contexts(self, forward: ForwardRecord, drawn: DrawnTokens, part: RowSelections) -> None:
        ids = forward.ids
        if (
            self.contexts is not None
            and part.peaks is not None
            and ids is not None
            and ids.shape == drawn.counted.shape
        ):
            self.contexts.add(Peaks(*part.peaks, ids, drawn.counted, forward.lengths))
            if self.on_responses is not None and forward.lengths is None:
                self.on_responses(ids, drawn.counted)
