"""Labels that Neuronpedia has of a published dictionary: its exports, fetched once, checked, and kept.

The bucket has, for an SAE, one or more folders `v1/MODEL/SOURCE/explanations[-EXPLAINER]/` of files `batch-N.jsonl.gz`; a line is an
explanation, with `index` and `description`, and mostly `typeName` and `explanationModelName` (docs.neuronpedia.org/api-and-data/exports).
"""

from __future__ import annotations

import gzip
import os
import time
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from ..errors import AuditError
from ..io.cache import cache_root
from ..io.feature_labels import Label, LabelSet
from ..io.manifest import reading
from ..io.untrusted import parse_json
from ..saes.info import DictionaryInfo

EXPORTS = "https://neuronpedia-datasets.s3.us-east-1.amazonaws.com"
BASE_URL = "NEURONPEDIA_EXPORTS"
"""Environment variable with another place of the exports."""
_AT_ONCE, _ATTEMPTS, _TIMEOUT = 6, 4, 60
_LARGEST_LISTING, _LARGEST_BATCH = 2**24, 2**28
_LONGEST = 500
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")


@dataclass(frozen=True)
class _Export:
    """A file in the bucket."""

    key: str
    size: int

    @property
    def folder(self) -> str:
        return self.key.split("/")[-2]


def fetch_labels(
    dictionary: DictionaryInfo | Any,
    *,
    explainer: str | None = None,
    base_url: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LabelSet:
    """The labels that Neuronpedia has of a dictionary's features, by one explainer.

    Files that are there already with the right size are not fetched again, and one that was cut off goes on from where it was.

    Args:
        dictionary: with a `neuronpedia_id`.
        explainer: a folder's ending or a model's name, such as "gpt-4o-mini"; by default the folder `explanations`, else the first by
            name, and in it the explainer that has most features.
        base_url: of the exports; by default `$NEURONPEDIA_EXPORTS`, else Neuronpedia's bucket.
        cache_dir: where the files are kept; by default in the cache of this package.

    Raises:
        AuditError: no id; Neuronpedia has nothing of it, or not by that explainer; out of reach; a damaged file.
    """
    place = _path_of(dictionary)
    base = (base_url or os.environ.get(BASE_URL) or EXPORTS).rstrip("/")
    cache = Path(cache_dir) if cache_dir is not None else cache_root() / "neuronpedia"
    exports = _list_exports(base, f"v1/{place}/explanations")
    folders = sorted({each.folder for each in exports})
    if not folders:
        raise AuditError(
            f"Neuronpedia's exports have no labels of {place}; make them from contexts, with --labels_from endpoint or model."
        )
    chosen = _choose_folder(folders, explainer)
    wanted = [each for each in exports if each.folder == chosen]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        files = list(pool.map(lambda each: _fetch(base, each, cache), wanted))
    rows = [row for path in files for row in _read_or_remove(path, dictionary.d_sae)]
    return _labels_by_one(rows, dictionary, explainer, chosen, folders)


def _path_of(dictionary: DictionaryInfo | Any) -> str:
    parts = (dictionary.neuronpedia_id or "").split("/")
    if parts == [""]:
        raise AuditError(
            f"Dictionary {dictionary.name!r} has no id on Neuronpedia; make labels from contexts, with --labels_from endpoint or model."
        )
    if len(parts) != 2 or not all(part.strip(".") and set(part) <= _PLAIN for part in parts):
        raise AuditError(
            f"Dictionary {dictionary.name!r} has {dictionary.neuronpedia_id!r} as its id on Neuronpedia, which is not MODEL/SOURCE."
        )
    return "/".join(parts)


def _choose_folder(folders: list[str], explainer: str | None) -> str:
    named = f"explanations-{explainer}"
    if explainer is not None and named in folders:
        return named
    if "explanations" in folders:
        return "explanations"
    if explainer is None:
        return folders[0]
    endings = ", ".join(folder.removeprefix("explanations-") for folder in folders)
    raise AuditError(
        f"Neuronpedia has no labels by {explainer!r} of this dictionary; it has those by {endings}."
    )


def _list_exports(base: str, prefix: str) -> list[_Export]:
    """The batches whose names begin with a prefix: the bucket's listing (S3's ListObjectsV2), page by page."""
    found: list[_Export] = []
    token: str | None = None
    while True:
        query = {"list-type": "2", "prefix": prefix} | ({"continuation-token": token} if token else {})
        with _opened(f"{base}/?{urlencode(query)}", base) as answer:
            content = answer.read(_LARGEST_LISTING)
        try:
            root = ElementTree.fromstring(content)
        except ElementTree.ParseError as error:
            raise AuditError(
                f"{base} did not answer with a listing of a bucket ({error}); check the address."
            ) from error
        for entry in root.iterfind("{*}Contents"):
            key, size = entry.findtext("{*}Key", ""), entry.findtext("{*}Size", "")
            parts = key.split("/")
            if (
                key.endswith(".jsonl.gz")
                and len(parts) == 5
                and size.isdecimal()
                and set("".join(parts)) <= _PLAIN
            ):
                found.append(_Export(key, int(size)))
        token = root.findtext("{*}NextContinuationToken")
        if not token:
            return found


def _fetch(base: str, export: _Export, cache: Path) -> Path:
    """The file in the cache, whole; what is missing of it is fetched."""
    path = cache / export.key
    if path.is_file() and path.stat().st_size == export.size:
        return path
    if export.size > _LARGEST_BATCH:
        raise AuditError(
            f"{export.key} in Neuronpedia's exports has {export.size:,} bytes, which is no batch of labels."
        )
    begun = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        have = begun.stat().st_size if begun.is_file() else 0
        if have > export.size:
            have = 0
        if have < export.size:
            request = Request(
                f"{base}/{quote(export.key)}", headers={"Range": f"bytes={have}-"} if have else {}
            )
            with _opened(request, base) as answer:
                goes_on = have and answer.status == 206
                with begun.open("ab" if goes_on else "wb") as file:
                    while block := answer.read(2**20):
                        file.write(block)
        if begun.stat().st_size != export.size:
            raise AuditError(
                f"{export.key} of Neuronpedia's exports arrived with {begun.stat().st_size:,} of its {export.size:,} bytes; run the "
                "command again, and it goes on."
            )
        begun.replace(path)
    except (URLError, TimeoutError, ConnectionError) as error:
        raise _unreachable(base, error) from error
    except OSError as error:
        raise AuditError(
            f"{path} could not be written ({error.strerror}); make room, and run it again."
        ) from error
    return path


def _opened(request: str | Request, base: str) -> Any:
    """The answer; asked again a few times where the server is busy or the connection breaks."""
    for attempt in range(_ATTEMPTS):
        try:
            return urlopen(request, timeout=_TIMEOUT)
        except HTTPError as error:
            if (error.code < 500 and error.code != 429) or attempt == _ATTEMPTS - 1:
                raise AuditError(
                    f"Neuronpedia's exports at {base} answered {error.code} {error.reason}; check the address, or try again later."
                ) from error
        except (URLError, TimeoutError, ConnectionError, ValueError) as error:
            refused = isinstance(error, ValueError) or (
                isinstance(error, URLError) and isinstance(error.reason, ConnectionRefusedError)
            )
            if refused or attempt == _ATTEMPTS - 1:
                raise _unreachable(base, error) from error
        time.sleep(0.5 * 2**attempt)
    raise AssertionError


def _unreachable(base: str, error: Exception) -> AuditError:
    reason = error.reason if isinstance(error, URLError) else error
    return AuditError(
        f"Neuronpedia's exports at {base} cannot be reached ({reason}); fetch the labels once on a machine with access and pass "
        "them with --labels_from file --labels, or make labels with --labels_from endpoint or model."
    )


@dataclass(frozen=True)
class _Row:
    feature: int
    text: str
    explainer: str


def _read_or_remove(path: Path, d_sae: int) -> list[_Row]:
    """The rows of a file in the cache, which is removed where it is damaged, so that the next command fetches it again."""
    try:
        return list(_rows_in(path, d_sae))
    except AuditError as error:
        if isinstance(error.__cause__, OSError):
            raise
        path.unlink(missing_ok=True)
        raise AuditError(
            f"{path} is damaged ({error.__cause__}) and was removed; run the command again, and it is fetched again. If it comes damaged "
            "again, make labels with --labels_from endpoint or model."
        ) from error


def _rows_in(path: Path, d_sae: int) -> Iterator[_Row]:
    with reading(path):
        try:
            with gzip.open(path, "rb") as file:
                content = file.read(_LARGEST_BATCH)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(str(error)) from error
        for line in content.decode("utf-8").split("\n"):
            if line.strip():
                entry = parse_json(line)
                feature, text = int(entry["index"]), entry.get("description")
                if not isinstance(text, str) or not text.strip() or not 0 <= feature < d_sae:
                    continue
                model, method = (str(entry.get(name) or "") for name in ("explanationModelName", "typeName"))
                named = f"{model} ({method})" if model and method else model or method
                yield _Row(feature, " ".join(text.split())[:_LONGEST], named)


def _labels_by_one(
    rows: Iterable[_Row], dictionary: Any, explainer: str | None, folder: str, folders: list[str]
) -> LabelSet:
    """The labels of one explainer: the one asked for, else the one that has most features."""
    by: dict[str, dict[int, str]] = {}
    for row in rows:
        by.setdefault(row.explainer, {}).setdefault(row.feature, row.text)
    fitting: Mapping[str, dict[int, str]] = by
    if explainer is not None and folder != f"explanations-{explainer}":
        fitting = {name: texts for name, texts in by.items() if explainer in name}
    if not fitting:
        known = ", ".join(
            [*filter(None, by), *(each.removeprefix("explanations-") for each in folders if each != folder)]
        )
        raise AuditError(
            f"Neuronpedia has no labels by {explainer!r} of this dictionary; it has those by {known or 'nobody'}."
        )
    name = Counter({each: len(texts) for each, texts in sorted(fitting.items())}).most_common(1)[0][0]
    shown = name or folder.removeprefix("explanations-")
    labels = {
        feature: Label(feature, text, "neuronpedia", shown) for feature, text in sorted(fitting[name].items())
    }
    return LabelSet(dictionary.name, dictionary.identity, labels)
