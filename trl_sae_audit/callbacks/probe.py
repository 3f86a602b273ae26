"""Drift: what a feature's activation on a fixed batch of texts does while the model trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..attribution.feature_tracker import FeatureTracker
from ..attribution.step_tables import Columns
from ..errors import AuditError
from ..models.attention_sinks import silent_tokens
from ..models.batches import pad
from ..models.hook_points import HookPoint
from ..models.residual_stream import Forward, hidden_states
from ..models.tokenizers import Processing, text_tokenizer
from ..saes.dictionary import FeatureDictionary


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
        cls,
        texts: Sequence[str],
        tokenizer: Processing,
        max_length: int = 512,
        decoder: nn.Module | None = None,
    ) -> Probe:
        """Tokenize `texts` as they are, padded on the right and cut at `max_length` tokens.

        Raises:
            AuditError: no texts, or a tokenizer that gives tokens which `decoder` does not embed.
        """
        if not texts:
            raise AuditError("The probe has no texts; give at least one.")
        reader = text_tokenizer(tokenizer, decoder)
        ids, attended = pad(reader(list(texts), truncation=True, max_length=max_length)["input_ids"])
        return cls({"input_ids": ids, "attention_mask": attended.long()})

    @torch.no_grad()
    def mean_activations(
        self,
        point: HookPoint,
        dictionary: FeatureDictionary,
        features: Tensor,
        forward: Forward | None = None,
        *,
        attention_sinks: bool = False,
    ) -> Tensor:
        """Mean activation of `features` over the probe's tokens but the first of each row: [len(features)].

        Attention sinks are left out too, unless `attention_sinks` counts them.

        Runs the decoder in evaluation mode up to the hook point, or `forward`, and leaves every module's mode as it was.
        """
        hidden = hidden_states(point, self.batch, forward)
        mask = self.batch["attention_mask"].to(hidden.device).bool()
        counted = mask & (mask.cumsum(1) > 1)
        tokens = hidden[counted & ~silent_tokens(hidden, counted, attention_sinks=attention_sinks)]
        parts = tokens.split(dictionary.tokens_at_once)
        sums = [dictionary.encode(part)[:, features].sum(0) for part in parts]
        return torch.stack(sums).sum(0) / len(tokens)


class ProbeDrift:
    """The drift of watched features on a probe since the first measurement.

    Args:
        probe: the probe.
        attention_sinks: count attention sinks too.

    Attributes:
        baselines: dictionary → activations at the first measurement.
        latest: "dictionary/label" → drift at the last one.
    """

    def __init__(self, probe: Probe, *, attention_sinks: bool = False) -> None:
        self.baselines: dict[str, Tensor] = {}
        self.latest: dict[str, float] = {}
        self._probe = probe
        self._attention_sinks = attention_sinks

    def measure(
        self, trackers: Sequence[FeatureTracker], step: int, forward: Forward | None
    ) -> list[Columns]:
        """Measure every dictionary's watched features, and give the rows of the table `drift`."""
        tables = []
        for tracker in trackers:
            if not tracker.watch:
                continue
            name, labels = tracker.dictionary.name, list(tracker.watch)
            activation = self._probe.mean_activations(
                tracker.point,
                tracker.dictionary,
                tracker.watched,
                forward,
                attention_sinks=self._attention_sinks,
            ).cpu()
            drift = activation - self.baselines.setdefault(name, activation)
            self.latest |= {
                f"{name}/{label}": float(value) for label, value in zip(labels, drift, strict=True)
            }
            tables.append(
                {
                    "step": [step] * len(labels),
                    "dictionary": [name] * len(labels),
                    "feature": list(tracker.watch.values()),
                    "label": labels,
                    "activation": activation.tolist(),
                    "drift": drift.tolist(),
                }
            )
        return tables
