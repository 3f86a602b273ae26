"""Contexts of an audit's features: made of its parts and of sampled answers, kept beside them, read back.

The pass notes, for every answer and feature, at which token the feature is most active (`ExampleArrays.peak`). So the strongest
places of all answers are found in the parts, without the model, and however many processes made them.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..io.manifest import reading
from ..io.tables import read_frame
from ..saes.contexts import PlaceKeeper, Places, Window, decode, decode_windows
from ..saes.words import lines_of
from .content import WORDS
from .objectives import side_name
from .store import AuditStore, Part

DATA, GENERATIONS = "contexts.parquet", "generation_contexts.parquet"
ACTIVITY = "activity.safetensors"
GENERATION = "generation"
BINS = 16
"""Of the histogram of a feature's largest activation in each answer, from 0 to the largest of all."""

_TEXTS = ("kind", "source", "prompt", "before", "at", "after")
COLUMNS = ("feature", "kind", "source", "row", "token", "activation", "prompt", "before", "at", "after")

Text = tuple[str, int, np.ndarray, np.ndarray]
"""Of an answer: its side, the number of its row in the data, its token ids, and the last ones of its prompt."""


def gather_contexts(store: AuditStore, tokenizer: PreTrainedTokenizerBase) -> None:
    """Find the contexts of every feature in a finished audit's parts, decode them, and keep them with the audit."""
    d_sae, sides = store.manifest["dictionary"]["d_sae"], store.manifest["loss"]["sides"]
    keeper = PlaceKeeper(d_sae)
    first, largest = 0, np.zeros(d_sae, np.float32)
    active, tokens = np.zeros(d_sae, np.int64), 0
    for part in store.parts():
        arrays = part.arrays
        keeper.add(places_of(part, first))
        first += arrays.side.size
        np.maximum.at(largest, arrays.feature, np.abs(arrays.max_activation))
        np.add.at(active, arrays.feature, arrays.active_tokens)
        tokens += len(arrays.token)
    wanted = Places.join([keeper.strongest, keeper.drawn])
    histogram = np.zeros((2, d_sae, BINS), np.int32)
    windows: dict[tuple[int, int], tuple[Text, Window]] = {}
    first = 0
    for part in store.parts():
        windows |= find_windows(part, wanted, first, sides)
        first += part.arrays.side.size
        _count(part, largest, histogram)
    density = active / max(tokens, 1)
    store.write_arrays(
        ACTIVITY, {"density": density, "largest": largest, "histogram": histogram}, {"bins": BINS}
    )
    kinds = np.repeat(["strongest", "drawn"], [len(keeper.strongest), len(keeper.drawn)])
    write_frame(store, DATA, context_frame(tokenizer, wanted, kinds, windows.__getitem__))
    store.remove(WORDS)


def keep_generations(
    store: AuditStore,
    tokenizer: PreTrainedTokenizerBase,
    places: Places,
    answers: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> None:
    """Keep the contexts of sampled answers with an audit.

    Args:
        store: of the audit.
        tokenizer: of the model.
        places: the strongest in the answers; `text` is the number of an answer.
        answers: token ids of each one's prompt and of itself.
    """

    def window_of(key: tuple[int, int]) -> tuple[Text, Window]:
        prompt, answer = answers[key[0]]
        text = (GENERATION, -1, np.asarray(answer), np.asarray(prompt))
        return text, Window.around(answer, key[1])

    kinds = np.repeat(["strongest"], len(places))
    write_frame(store, GENERATIONS, context_frame(tokenizer, places, kinds, window_of))
    store.remove(WORDS)


def places_of(part: Part, first: int) -> Places:
    """The strongest place of every active feature in every answer; answers are numbered from `first` on."""
    arrays = part.arrays
    owner = np.repeat(np.arange(arrays.side.size), np.diff(arrays.indptr))
    active = arrays.max_activation != 0
    found = Places(arrays.feature, arrays.max_activation, first + owner, arrays.peak)
    return found.take(active)


def find_windows(
    part: Part, wanted: Places, first: int, sides: Sequence[str]
) -> Iterator[tuple[tuple[int, int], tuple[Text, Window]]]:
    """Text and window of those of some places that are in a part, whose answers are numbered from `first` on."""
    arrays, per_example = part.arrays, part.arrays.side.shape[1]
    here = (wanted.text >= first) & (wanted.text < first + arrays.side.size)
    for text, token in np.unique(np.stack([wanted.text[here], wanted.token[here]], 1), axis=0).tolist():
        example, answer = divmod(text - first, per_example)
        ids = arrays.token[arrays.token_indptr[text - first] : arrays.token_indptr[text - first + 1]]
        side = side_name(int(arrays.side[example, answer]), sides)
        tail = arrays.prompt_tail[example, answer]
        known = (side, int(part.row[example]), ids, tail[tail >= 0])
        yield (text, token), (known, Window.around(ids, token))


def _count(part: Part, largest: np.ndarray, histogram: np.ndarray) -> None:
    arrays = part.arrays
    owner = np.repeat(arrays.side.reshape(-1), np.diff(arrays.indptr))
    share = np.abs(arrays.max_activation) / np.where(largest > 0, largest, 1)[arrays.feature]
    place = np.minimum((share * BINS).astype(np.int64), BINS - 1)
    for number, sign in enumerate((1, -1)):
        which = (owner == sign) & (arrays.max_activation != 0)
        np.add.at(histogram[number], (arrays.feature[which], place[which]), 1)


def context_frame(
    tokenizer: PreTrainedTokenizerBase,
    places: Places,
    kinds: np.ndarray,
    window_of: Callable[[tuple[int, int]], tuple[Text, Window]],
) -> pd.DataFrame:
    """One row a place, with its text: the columns of `COLUMNS`."""
    keys = list(zip(places.text.tolist(), places.token.tolist(), strict=True))
    distinct = {key: window_of(key) for key in dict.fromkeys(keys)}
    windows = [window for _, window in distinct.values()]
    tails = [tuple(tail.tolist()) for (*_, tail), _ in distinct.values()]
    prompts = dict(zip(tails, decode(tokenizer, tails), strict=True))
    shown = {
        key: (side, row, prompts[tail], *texts)
        for (key, ((side, row, *_), _)), tail, texts in zip(
            distinct.items(), tails, decode_windows(tokenizer, windows), strict=True
        )
    }
    rows = [shown[key] for key in keys]
    columns: list[Sequence] = list(zip(*rows, strict=True)) if rows else [()] * 6
    source, row, prompt, before, at, after = columns
    return pd.DataFrame(
        {
            "feature": places.feature.astype(np.int64),
            "kind": kinds.astype(object),
            "source": np.array(source, object),
            "row": np.array(row, np.int64),
            "token": places.token.astype(np.int64),
            "activation": places.activation.astype(np.float64),
            **{
                name: np.array(values, object)
                for name, values in (("prompt", prompt), ("before", before), ("at", at), ("after", after))
            },
        }
    )


def write_frame(store: AuditStore, name: str, frame: pd.DataFrame) -> None:
    """A table beside the parts."""
    content = io.BytesIO()
    frame.to_parquet(content, index=False, write_page_checksum=True, compression="zstd")
    store.write(name, content.getvalue())


def read_contexts(store: AuditStore) -> pd.DataFrame:
    """Every context that is kept, of data and generations, by feature, the strongest first; empty where none are."""
    names = [name for name in (DATA, GENERATIONS) if store.has(name)]
    frames = [check_contexts(store.directory / name, store.manifest["dictionary"]["d_sae"]) for name in names]
    if not frames:
        return pd.DataFrame({name: [] for name in COLUMNS}).astype({"feature": np.int64})
    found = pd.concat(frames, ignore_index=True)
    order = np.lexsort((-found["activation"].abs(), found["kind"] != "strongest", found["feature"]))
    return found.iloc[order].reset_index(drop=True)


def check_contexts(path: Path, d_sae: int, more: Sequence[str] = ()) -> pd.DataFrame:
    """A table of contexts, with some more columns; an AuditError if it is none."""
    with reading(path):
        frame = read_frame(path, columns=(*more, *COLUMNS))
        number = frame["feature"]
        if number.dtype != np.int64 or (len(number) and not (number.min() >= 0 and number.max() < d_sae)):
            raise ValueError(f"its features are not those of a dictionary of {d_sae}")
        for name in _TEXTS:
            if not frame[name].map(lambda value: isinstance(value, str)).all():
                raise ValueError(f"its column {name!r} is not of texts")
        for name in ("row", "token", "activation"):
            if frame[name].dtype.kind not in "if":
                raise ValueError(f"its column {name!r} is not of numbers")
    return frame


def activity_frame(
    arrays: dict[str, np.ndarray], features: Sequence[int], sides: Sequence[str], d_sae: int
) -> pd.DataFrame:
    """See `Audit.activity`; a ValueError for arrays of other shapes."""
    shapes = {"density": (d_sae,), "largest": (d_sae,), "histogram": (2, d_sae, BINS)}
    for name, shape in shapes.items():
        if name not in arrays or arrays[name].shape != shape:
            raise ValueError(f"{name!r} is not {shape}")
    chosen, bins = np.repeat(np.asarray(features, np.int64), BINS), np.tile(np.arange(BINS), len(features))
    width = arrays["largest"][chosen] / BINS
    return pd.DataFrame(
        {
            "feature": chosen,
            "density": arrays["density"][chosen],
            "low": bins * width,
            "high": (bins + 1) * width,
            **{side: arrays["histogram"][place, chosen, bins] for place, side in enumerate(sides)},
        }
    )


def read_words(store: AuditStore) -> np.ndarray:
    """The line of words of every feature [d_sae], empty where the feature is nowhere active; made once and kept."""
    d_sae = store.manifest["dictionary"]["d_sae"]
    words = np.full(d_sae, "", object)
    if not store.has(WORDS):
        frame = read_contexts(store)
        lines = lines_of(frame[frame["kind"] == "strongest"])
        table = pd.DataFrame(
            {"feature": np.array(list(lines), np.int64), "words": np.array(list(lines.values()), object)}
        )
        write_frame(store, WORDS, table)
    path = store.directory / WORDS
    with reading(path):
        table = read_frame(path, columns=("feature", "words"))
        numbers = table["feature"].to_numpy()
        if numbers.dtype != np.int64 or (len(numbers) and not (numbers.min() >= 0 and numbers.max() < d_sae)):
            raise ValueError(f"its features are not those of a dictionary of {d_sae}")
        if not table["words"].map(lambda value: isinstance(value, str)).all():
            raise ValueError("its words are no texts")
        words[numbers] = table["words"].to_numpy()
    return words
