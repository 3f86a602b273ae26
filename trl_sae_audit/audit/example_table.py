"""An audit's examples as tables: what is stored sparsely, for a few features."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from .gradients import ExampleArrays
from .objectives import side_name
from .store import Part


def example_rows(
    part: Part,
    features: Sequence[int],
    directions: np.ndarray,
    sides: tuple[str, str],
    examples: int,
    activations: bool,
) -> pd.DataFrame:
    """One row an example, side and feature, see `Audit.examples`.

    Args:
        part: some of the audit's examples.
        features: to look at.
        directions: of these features [k, d_model].
        sides: names of the loss's two sides.
        examples: in the whole audit.
        activations: whether the audit has them.
    """
    arrays, k = part.arrays, len(features)
    n, per_example = arrays.side.shape
    attribution = -(arrays.gradient.reshape(n * per_example, -1) @ directions.T) / examples
    names = [side_name(sign, sides) for sign in arrays.side.reshape(-1).tolist()]
    table = {
        "row": np.repeat(part.row, per_example * k),
        "side": np.repeat(names, k),
        "feature": np.tile(np.asarray(features), n * per_example),
        "attribution": attribution.reshape(-1),
    }
    if activations:
        table["activation"] = dense_values(arrays, arrays.mean, features).reshape(-1)
        table["max_activation"] = dense_values(arrays, arrays.max_activation, features).reshape(-1)
        contributions = dense_values(arrays, arrays.activation_attribution, features)
        table["activation_attribution"] = contributions.reshape(-1) / examples
    table["length"] = np.repeat(arrays.length.reshape(-1), k)
    table["log_prob"] = np.repeat(arrays.log_prob.reshape(-1), k)
    return pd.DataFrame(table)


def active_rows(part: Part, features: Sequence[int], sides: Sequence[str]) -> pd.DataFrame:
    """See `Audit.active_answers`."""
    arrays, per_example = part.arrays, part.arrays.side.shape[1]
    owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
    here = np.isin(arrays.feature, features) & (arrays.max_activation != 0)
    signs = arrays.side.reshape(-1)[owner[here]].tolist()
    return pd.DataFrame(
        {
            "feature": arrays.feature[here].astype(np.int64),
            "row": part.row[owner[here] // per_example],
            "source": [side_name(sign, sides) for sign in signs],
        }
    )


def dense_values(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """Stored values of some features, 0 where not active: [answers, features]."""
    owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
    table = np.zeros((arrays.side.size, len(features)), np.float32)
    for column, feature in enumerate(features):
        here = arrays.feature == feature
        table[owner[here], column] = values[here]
    return table


def pool_activations(arrays: ExampleArrays, pooling: str) -> np.ndarray:
    if pooling == "active":
        return (arrays.max_activation != 0).astype(np.float32)
    return arrays.mean if pooling == "mean" else arrays.max_activation


def signed_sum(arrays: ExampleArrays, values: np.ndarray, features: Sequence[int]) -> np.ndarray:
    """First answer less second: [n, features]."""
    dense = dense_values(arrays, values, features).reshape(*arrays.side.shape, len(features))
    sign = arrays.side if arrays.side.shape[1] == 2 else np.ones_like(arrays.side)
    return (dense * sign[:, :, None]).sum(1)
