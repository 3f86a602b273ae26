"""Drift: what a feature's activation on a fixed batch of texts does while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .dictionary import FeatureDictionary
from .errors import AuditError
from .hook_points import HookPoint
from .residual_stream import Forward, hidden_states


class Probe:
    """A fixed, tokenized batch.

    Args:
        batch: `input_ids` and `attention_mask`, [rows, tokens]; other keys go to the model as they are.
    """

    def __init__(self, batch: Mapping[str, Tensor]) -> None:
        missing = {"input_ids", "attention_mask"} - set(batch)
        if missing:
            raise AuditError(
                f"The probe batch has no {' and no '.join(sorted(missing))}; tokenize it with padding."
            )
        if batch["input_ids"].numel() == 0:
            raise AuditError("The probe batch is empty; give at least one text.")
        self.batch = dict(batch)

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int = 512
    ) -> Probe:
        """Tokenize `texts` as they are, padded on the right and cut at `max_length` tokens."""
        if not texts:
            raise AuditError("The probe has no texts; give at least one.")
        return cls(
            tokenizer(
                list(texts),
                return_tensors="pt",
                padding=True,
                padding_side="right",
                truncation=True,
                max_length=max_length,
            )
        )

    @torch.no_grad()
    def mean_activations(
        self,
        point: HookPoint,
        dictionary: FeatureDictionary,
        features: Tensor,
        forward: Forward | None = None,
    ) -> Tensor:
        """Mean activation of `features` over the probe's tokens but the first of each row: [len(features)].

        Runs the decoder in evaluation mode up to the hook point, or `forward`, and leaves every module's mode as it was.
        """
        hidden = hidden_states(point, self.batch, forward)
        mask = self.batch["attention_mask"].to(hidden.device).bool()
        tokens = hidden[mask & (mask.cumsum(1) > 1)]
        parts = tokens.split(dictionary.tokens_at_once)
        sums = [dictionary.encode(part)[:, features].sum(0) for part in parts]
        return torch.stack(sums).sum(0) / len(tokens)
