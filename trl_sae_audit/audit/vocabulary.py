"""The vocabulary that features' directions raise and lower: through the model's own final norm and unembedding.

What is known without a single text. Kept with an audit for the features in front, for a table of a million features by a vocabulary of a
quarter of a million would take longer than the audit.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..io.manifest import reading
from ..io.tables import read_frame
from ..models.language_head import LanguageHead
from ..saes.compatibility import check_dictionary
from ..saes.dictionary import FeatureDictionary
from .contexts import write_frame
from .store import AuditStore

VOCABULARY = "vocabulary.parquet"
COLUMNS = ("feature", "kind", "token")
PROMOTED, SUPPRESSED = "promoted", "suppressed"
TOKENS = 10
"""Tokens of either kind that are kept."""
FRONT = 150
"""Features in front, by each score that orders a table, whose vocabulary is kept."""
_AT_ONCE = 64
_FINAL_NORMS = ("norm", "ln_f", "final_layer_norm")


def keep_vocabulary(
    store: AuditStore,
    table: pd.DataFrame,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dictionary: FeatureDictionary,
) -> None:
    """Keep with a finished audit the vocabulary of the features in front of its table, unless it is kept."""
    features = leading(table, FRONT)
    if store.has(VOCABULARY) and set(features) <= set(read_vocabulary(store)["feature"]):
        return
    point = check_dictionary(dictionary, model)
    directions = dictionary.to(next(point.decoder.parameters()).device).rows(features)
    both = vocabulary_of(model, tokenizer, point.decoder, directions, TOKENS)
    rows = [
        (feature, kind, token)
        for kind, lists in zip((PROMOTED, SUPPRESSED), both, strict=True)
        for feature, tokens in zip(features, lists, strict=True)
        for token in tokens
    ]
    columns = zip(COLUMNS, zip(*rows, strict=True), (np.int64, object, object), strict=True)
    write_frame(
        store, VOCABULARY, pd.DataFrame({name: np.array(values, kind) for name, values, kind in columns})
    )


def read_vocabulary(store: AuditStore) -> pd.DataFrame:
    """What `keep_vocabulary` kept: one row a token, the strongest first; empty where nothing was."""
    if not store.has(VOCABULARY):
        return pd.DataFrame({name: [] for name in COLUMNS}).astype({"feature": np.int64})
    path = store.directory / VOCABULARY
    with reading(path):
        frame = read_frame(path, columns=COLUMNS)
        if frame["feature"].dtype != np.int64 or not frame["kind"].isin([PROMOTED, SUPPRESSED]).all():
            raise ValueError("it is no table of tokens")
        if not frame["token"].map(lambda value: isinstance(value, str)).all():
            raise ValueError("its tokens are no texts")
    return frame


def leading(table: pd.DataFrame, n: int) -> list[int]:
    """The first n features by each score that orders a table of features."""
    found: list[int] = []
    for score in ("effect_size", "selection", "attribution"):
        if score in table:
            order = np.argsort(-table[score].abs().fillna(-1).to_numpy(), kind="stable")[:n]
            found += [int(feature) for feature in table["feature"].to_numpy()[order]]
    return list(dict.fromkeys(found))


@torch.no_grad()
def vocabulary_of(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, decoder: nn.Module, directions: Tensor, k: int
) -> tuple[list[list[str]], list[list[str]]]:
    """The k tokens whose logits each direction raises, and lowers, most, beside the average token."""
    head = LanguageHead(model, decoder)
    up: list[list[str]] = []
    down: list[list[str]] = []
    for some in directions.split(_AT_ONCE):
        logits = head.logits(_through_final_norm(decoder, some))
        logits = logits - logits.mean(1, keepdim=True)
        most = min(k, logits.shape[1])
        up += _texts(tokenizer, logits.topk(most).indices)
        down += _texts(tokenizer, (-logits).topk(most).indices)
    return up, down


def _through_final_norm(decoder: nn.Module, directions: Tensor) -> Tensor:
    """What the final norm's gain makes of unit directions, each taken as a whole hidden state of unit variance."""
    directions = directions.to(next(decoder.parameters())) * directions.shape[1] ** 0.5
    for name, module in decoder.named_children():
        if name in _FINAL_NORMS:
            return module(directions)
    return directions


def _texts(tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> list[list[str]]:
    return [[tokenizer.decode([token]) for token in row] for row in ids.tolist()]
