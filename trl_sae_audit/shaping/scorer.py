"""Feature scores of responses, from a frozen model."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn

from ..errors import AuditError
from ..models.attention_sinks import silent_tokens
from ..models.response_states import PrefixCachedReader, Row
from ..models.token_ids import Ids, Text, tokenize_pairs
from ..models.tokenizers import Processing, text_tokenizer
from ..saes.compatibility import check_dictionary, check_whole
from ..saes.dictionary import FeatureDictionary
from ..saes.pooling import POOLINGS, Pooling, pool_activations
from .calibration import read_calibration, write_calibration

_UNVARYING = 1e-5  # of the mean: rounding, not a difference between texts


class FeatureScorer:
    """A score for each flagged feature of a response: its activation, pooled over the response's tokens.

    The forward pass stops at the hook point, runs without gradients and in evaluation mode, and leaves every
    module's mode as it was. Scores are raw activations until `calibrate` is called, z-scores from then on:

        s_f = (pool_t a_f[t] − mean_f) / sd_f

    with mean and standard deviation over the calibration responses. The first token of a row, special tokens and
    padding never count, nor do attention sinks: tokens of more than ten times the median norm of their response's. A response of
    no counted token gets the mean, 0 as a z-score, so that saying nothing is
    neither punished nor rewarded. Scores are kept by content, so no response is read twice.

    Args:
        model: frozen: the reference or SFT model, or a reward model whose backbone the dictionary fits. Never the
            policy being trained, which would learn to hide the feature from it.
        tokenizer: the model's, or a processor that has it.
        dictionary: whose features are scored.
        pooling: "mean", "max" or "last" over the response's tokens.
        batch_size: rows per forward pass.
        max_length: tokens of a row; longer ones lose their beginning, which is the prompt's.
        cache_size: scored responses remembered; the least recently used go first.
        attention_sinks: count attention sinks too, on which a feature is active as on no other token.

    Attributes:
        sinks: how many attention sinks were left out so far.

    Raises:
        AuditError: the dictionary does not fit the model, or the tokenizer does not.

    Example:

    ```python
    scorer = FeatureScorer(reference_model, tokenizer, dictionary)
    scorer.calibrate([(prompt, response), ...])       # some hundred responses of the reference model
    scorer.score(["Is 2+2=5?"], ["You are right."], features=[1423])       # [[2.7]]
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Processing,
        dictionary: FeatureDictionary,
        *,
        pooling: Pooling = "max",
        batch_size: int = 16,
        max_length: int = 2048,
        cache_size: int = 65536,
        attention_sinks: bool = False,
    ) -> None:
        if pooling not in POOLINGS:
            raise AuditError(f"Pooling is {pooling!r}; choose one of {', '.join(POOLINGS)}.")
        for option, value, least in (
            ("batch_size", batch_size, 1),
            ("max_length", max_length, 2),
            ("cache_size", cache_size, 0),
        ):
            if value < least:
                raise AuditError(f"{option} is {value}; it must be at least {least}.")
        self.model = model
        self.dictionary = dictionary
        self.pooling = pooling
        self.cache_size = cache_size
        self.attention_sinks = attention_sinks
        self.sinks = 0
        check_whole(model)
        self.point = check_dictionary(dictionary, model)
        self.tokenizer = text_tokenizer(tokenizer, self.point.decoder)
        self.calibration_size = 0
        self.mean: Tensor | None = None
        self.deviation: Tensor | None = None
        self._special_ids = torch.tensor(sorted(set(self.tokenizer.all_special_ids)))
        self._reader = PrefixCachedReader(self.point, batch_size, max_length)
        self._cache: OrderedDict[bytes, tuple[float, ...]] = OrderedDict()

    @property
    def calibrated(self) -> bool:
        return self.mean is not None

    @property
    def device(self) -> torch.device:
        return next(self.point.decoder.parameters()).device

    def to(self, device: torch.device | str) -> FeatureScorer:
        """Move the model there if it is elsewhere; the dictionary follows."""
        if torch.device(device) != self.device:
            self.model.to(device)
        self.dictionary = self.dictionary.to(self.device)
        return self

    # Scores

    def score(self, prompts: Sequence[Text], responses: Sequence[Text], features: Sequence[int]) -> Tensor:
        """Scores of texts.

        Args:
            prompts: strings or lists of messages; None or "" where there is none.
            responses: as many, strings or lists of messages.
            features: indices of the features.

        Returns:
            [responses, features], float32, on the CPU.

        Raises:
            AuditError: as many prompts as responses are needed; a conversation without a chat template; a feature
                out of range, or one that did not vary in the calibration.
        """
        if len(prompts) != len(responses):
            raise AuditError(
                f"There are {len(prompts)} prompts and {len(responses)} responses; pass one prompt a response."
            )
        rows = self.tokenize(prompts, responses)
        return self.score_ids([row[0] for row in rows], [row[1] for row in rows], features)

    def score_ids(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], features: Sequence[int]
    ) -> Tensor:
        """Scores of token ids of the scorer's own tokenizer, without padding: [responses, features]."""
        self._check_features(features)
        rows = [(tuple(prompt), tuple(response)) for prompt, response in zip(prompts, responses, strict=True)]
        keys = [_key(row, features) for row in rows]
        known = {key: self._recall(key) for key in keys}
        missing = list({key: row for key, row in zip(keys, rows, strict=True) if known[key] is None}.items())
        for part, raw in self._read([row for _, row in missing], torch.tensor(list(features))):
            for index, values in zip(part, raw.tolist(), strict=True):
                key = missing[index][0]
                known[key] = tuple(values)
                self._remember(key, tuple(values))
        scores = torch.tensor([known[key] for key in keys], dtype=torch.float32)
        return self.standardise(scores.reshape(len(rows), len(features)), features)

    def pool(self, hidden: Tensor, counted: Tensor, features: Tensor | None = None) -> Tensor:
        """Raw scores from hidden states that someone else has computed; see `pooling.pool_activations`."""
        self.dictionary = self.dictionary.to(hidden.device)
        silent = silent_tokens(hidden, counted, attention_sinks=self.attention_sinks)
        self.sinks += int(silent.sum())
        return pool_activations(self.dictionary, hidden, counted & ~silent, self.pooling, features)

    def standardise(self, raw: Tensor, features: Sequence[int]) -> Tensor:
        """Raw scores [rows, features] as z-scores if calibrated; 0 in rows of no counted token.

        Raises:
            AuditError: a feature that did not vary in the calibration.
        """
        if self.mean is not None and self.deviation is not None:
            index = torch.tensor(list(features), dtype=torch.long)
            mean, deviation = self.mean[index], self.deviation[index]
            dead = (deviation <= _UNVARYING * mean.abs()).nonzero()
            if len(dead):
                raise AuditError(
                    f"Feature {features[int(dead[0])]} was the same in all {self.calibration_size} calibration "
                    "responses, so it has no z-score; calibrate on more or other responses, or take the flag out."
                )
            raw = (raw - mean) / deviation
        return raw.nan_to_num(nan=0.0)

    # Calibration

    def calibrate(self, texts: Iterable[str | tuple[Text, Text]], *, shared: bool = False) -> FeatureScorer:
        """Make scores z-scores: mean and standard deviation of every feature over reference responses.

        Args:
            texts: (prompt, response) pairs, or responses alone. Take them from the reference model (or the
                data it was trained on): z = 0 is then what that model does, and the target of AdaptivePenalty.
            shared: all processes of the run call this at once, with the same texts; each reads a part of them, and all get the
                calibration of the whole. By default every process reads all of them.

        Raises:
            AuditError: fewer than two responses with tokens to score.
        """
        pairs = [(None, text) if isinstance(text, str) else text for text in texts]
        rows = self.tokenize([prompt for prompt, _ in pairs], [response for _, response in pairs])
        if shared:
            rows = rows[PartialState().process_index :: PartialState().num_processes]
        total = torch.zeros(self.dictionary.d_sae, dtype=torch.float64)
        squares = torch.zeros_like(total)
        n = 0
        shift: Tensor | None = None
        for _, raw in self._read(rows, None):
            scores = raw[~raw.isnan().any(1)].double()
            if not len(scores):
                continue
            if shift is None:
                shift = scores[0]
            n += len(scores)
            total += (scores - shift).sum(0)
            squares += (scores - shift).square().sum(0)
        if shared and PartialState().num_processes > 1:
            n, shift, total, squares = _combine_processes(n, shift, total, squares)
        if n < 2 or shift is None:
            raise AuditError(
                f"{n} calibration response(s) have tokens to score; give at least two, better some hundred."
            )
        variance = (squares - total.square() / n).clamp_min(0) / (n - 1)
        self.mean = (shift + total / n).float()
        self.deviation = variance.sqrt().float()
        self.calibration_size = n
        return self

    def state_dict(self) -> dict[str, Any]:
        """What calibration found, and what it holds for."""
        return {
            "identity": self.dictionary.identity,
            "pooling": self.pooling,
            "attention_sinks": self.attention_sinks,
            "calibration_size": self.calibration_size,
            "mean": self.mean,
            "deviation": self.deviation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a calibration.

        Raises:
            AuditError: of another dictionary or another pooling, or made with attention sinks and this without them.
        """
        if state["identity"] != self.dictionary.identity:
            raise AuditError(
                f"The calibration was made with a dictionary of content {state['identity'][:12]}…, not with "
                f"{self.dictionary.name!r} ({self.dictionary.identity[:12]}…); calibrate again."
            )
        if state["pooling"] != self.pooling:
            raise AuditError(
                f"The calibration was made with pooling {state['pooling']!r}, and this scorer pools by "
                f"{self.pooling!r}; pass pooling={state['pooling']!r} or calibrate again."
            )
        if state["attention_sinks"] != self.attention_sinks:
            raise AuditError(
                f"The calibration was made with attention_sinks={state['attention_sinks']}, and this scorer has "
                f"attention_sinks={self.attention_sinks}; pass the calibration's, or calibrate again."
            )
        for name in ("mean", "deviation"):
            if state[name] is not None and state[name].shape != (self.dictionary.d_sae,):
                raise AuditError(
                    f"The calibration has a {name} of shape {tuple(state[name].shape)}, and {self.dictionary.name!r} has "
                    f"{self.dictionary.d_sae} features; calibrate again."
                )
        self.mean, self.deviation = state["mean"], state["deviation"]
        self.calibration_size = int(state["calibration_size"])

    def save(self, path: str | Path) -> None:
        """Write the calibration as safetensors, the whole file or none of it.

        Raises:
            AuditError: it cannot be written.
        """
        write_calibration(Path(path), self.state_dict())

    def load(self, path: str | Path) -> FeatureScorer:
        """Read what `save` wrote.

        Raises:
            AuditError: missing or damaged, of another dictionary or another pooling.
        """
        self.load_state_dict(read_calibration(Path(path)))
        return self

    def tokenize(self, prompts: Sequence[Text], responses: Sequence[Text]) -> list[tuple[Ids, Ids]]:
        """Token ids of each prompt and of the response after it, each tokenized on its own.

        Raises:
            AuditError: a conversation, and the tokenizer has no chat template.
        """
        return tokenize_pairs(self.tokenizer, prompts, responses)

    def _read(self, rows: Sequence[Row], features: Tensor | None) -> Iterator[tuple[list[int], Tensor]]:
        """Which rows, and their raw scores [rows, features] on the CPU, NaN in a row with nothing to score."""
        for states in self._reader.read(rows):
            counted = states.of_response & ~torch.isin(states.ids, self._special_ids)
            yield states.rows, self.pool(states.hidden, counted.to(states.hidden.device), features).cpu()

    def _check_features(self, features: Sequence[int]) -> None:
        for feature in features:
            if not 0 <= feature < self.dictionary.d_sae:
                raise AuditError(
                    f"Feature {feature} is not in dictionary {self.dictionary.name!r}, which has 0 to "
                    f"{self.dictionary.d_sae - 1}."
                )

    def _recall(self, key: bytes) -> tuple[float, ...] | None:
        if key in self._cache:
            self._cache.move_to_end(key)
        return self._cache.get(key)

    def _remember(self, key: bytes, values: tuple[float, ...]) -> None:
        self._cache[key] = values
        while len(self._cache) > self.cache_size:
            self._cache.popitem(last=False)


def _combine_processes(
    n: int, shift: Tensor | None, total: Tensor, squares: Tensor
) -> tuple[int, Tensor, Tensor, Tensor]:
    """The same over all processes: number, mean, sum about it (0), and squares about it, by `packed_steps.pack`'s formula."""
    own = total if shift is None else shift * n + total
    moments = squares - total.square() / max(n, 1) + own.square() / max(n, 1)
    packed = torch.cat([torch.tensor([n], dtype=own.dtype), own, moments])
    packed = reduce(packed.to(PartialState().device), "sum").cpu()
    n, (own, moments) = int(packed[0]), packed[1:].chunk(2)
    return n, own / max(n, 1), torch.zeros_like(own), moments - own.square() / max(n, 1)


def _key(row: tuple[Ids, Ids], features: Sequence[int]) -> bytes:
    return hashlib.sha256(repr((*row, tuple(features))).encode()).digest()
