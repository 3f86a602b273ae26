"""Neuronpedia's exports, from a bucket on this machine with files of the real layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.servers import Bucket, export_lines, serve_bucket

from trl_sae_audit import AuditError, fetch_labels
from trl_sae_audit.saes.info import DictionaryInfo

PLACE = "v1/gemma-3-270m/12-gemmascope-2-res-16k"
DICTIONARY = DictionaryInfo(
    "mine", "sha256:1", "model.layers.12", 64, 8, None, "gemma-3-270m/12-gemmascope-2-res-16k"
)


def row(
    index: int, text: str, model: str = "gemini-2.0-flash", method: str = "np_acts-logits-general"
) -> dict[str, Any]:
    """An explanation as the exports have it, with the keys that they have besides."""
    return {
        "modelId": "gemma-3-270m", "layer": "12-gemmascope-2-res-16k", "index": str(index), "description": text, "authorId": "x",
        "typeName": method, "explanationModelName": model, "createdAt": "2026-01-01T00:00:00.000Z", "embedding": None,
    }  # fmt: skip


def exports() -> Bucket:
    """Three batches of the usual folder, one of another explainer, and files that are no labels."""
    other = [row(2, "praise, shorter", "gpt-4o-mini")]
    return Bucket(
        {
            f"{PLACE}/explanations/batch-0.jsonl.gz": export_lines(
                [row(0, "dates"), row(2, " words of\npraise "), *other]
            ),
            f"{PLACE}/explanations/batch-1.jsonl.gz": export_lines([row(7, "numbers"), row(9, "")]),
            f"{PLACE}/explanations/batch-2.jsonl.gz": export_lines(
                [row(63, "x" * 900), row(64, "beyond the dictionary")]
            ),
            f"{PLACE}/explanations-gpt-5/batch-0.jsonl.gz": export_lines(
                [row(2, "flattery of the user", "gpt-5")]
            ),
            f"{PLACE}/explanations/readme.txt": b"no labels",
            f"{PLACE}/features/batch-0.jsonl.gz": export_lines([{"index": "2"}]),
        }
    )


def test_the_labels_of_one_explainer_named(tmp_path: Path) -> None:
    with serve_bucket(exports()) as bucket:
        found = fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
        assert {label.feature: label.text for label in found} == {
            0: "dates",
            2: "words of praise",
            7: "numbers",
            63: "x" * 500,
        }
        assert {label.explainer for label in found} == {"gemini-2.0-flash (np_acts-logits-general)"}
        assert {label.source for label in found} == {"neuronpedia"}
        assert (found.dictionary, found.identity) == ("mine", "sha256:1")
        for explainer, text in (("gpt-5", "flattery of the user"), ("gpt-4o-mini", "praise, shorter")):
            one = fetch_labels(DICTIONARY, explainer=explainer, base_url=bucket.url, cache_dir=tmp_path)
            assert {label.feature: label.text for label in one} == {2: text}
        with pytest.raises(AuditError, match=r"no labels by 'claude'.*gemini-2.0-flash.*gpt-4o-mini.*gpt-5"):
            fetch_labels(DICTIONARY, explainer="claude", base_url=bucket.url, cache_dir=tmp_path)


def test_what_is_there_is_not_fetched_again_and_half_a_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = f"{PLACE}/explanations/batch-1.jsonl.gz"
    bucket = exports()
    bucket.cut[second] = 20
    with serve_bucket(bucket):
        monkeypatch.setenv("NEURONPEDIA_EXPORTS", bucket.url)
        with pytest.raises(
            AuditError, match=r"batch-1.jsonl.gz .*arrived with 20 of its .* run the command again"
        ):
            fetch_labels(DICTIONARY, cache_dir=tmp_path)
        assert (tmp_path / f"{second}.part").stat().st_size == 20
        assert len(fetch_labels(DICTIONARY, cache_dir=tmp_path)) == 4
        assert bucket.asked.count((second, "bytes=20-")) == 1
        before = list(bucket.asked)
        assert len(fetch_labels(DICTIONARY, cache_dir=tmp_path)) == 4
        assert bucket.asked == before
        bucket.files[second] = export_lines([row(7, "numbers, revised and longer")])  # of another size
        assert fetch_labels(DICTIONARY, cache_dir=tmp_path).text(7) == "numbers, revised and longer"


def test_a_busy_server_is_asked_again(tmp_path: Path) -> None:
    bucket = exports()
    bucket.busy = 1
    with serve_bucket(bucket):
        assert len(fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)) == 4


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    unknown = DictionaryInfo("mine", "sha256:1", "model.layers.12", 64, 8)
    with pytest.raises(AuditError, match="'mine' has no id on Neuronpedia; make labels from contexts"):
        fetch_labels(unknown)
    for strange in ("../x", "a/../..", "a/b/c", "a/b c"):
        with pytest.raises(AuditError, match="not MODEL/SOURCE"):
            fetch_labels(DictionaryInfo("mine", "1", "x", 64, 8, None, strange))
    nothing = pytest.raises(AuditError, match="have no labels of gemma-3-270m/12-gemmascope-2-res-16k")
    with serve_bucket(Bucket({})) as bucket, nothing:
        fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
    with pytest.raises(AuditError, match=r"cannot be reached \(.*refused\); fetch the labels once"):
        fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
    with pytest.raises(AuditError, match="cannot be reached"):
        fetch_labels(DICTIONARY, base_url="nowhere", cache_dir=tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"no gzip", export_lines([{"description": "x"}]), export_lines([row(0, "x")])[:-20]],
    ids=["not gzip", "a row without a feature", "cut off"],
)
def test_a_damaged_batch_is_named_and_fetched_again(content: bytes, tmp_path: Path) -> None:
    name = f"{PLACE}/explanations/batch-0.jsonl.gz"
    with serve_bucket(Bucket({name: content})) as bucket:
        with pytest.raises(AuditError, match=r"batch-0.jsonl.gz is damaged .* and was removed; run"):
            fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
        assert not (tmp_path / name).exists()
        with pytest.raises(AuditError, match="is damaged"):
            fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
        assert bucket.asked == [(name, None)] * 2


def test_a_file_that_was_damaged_in_the_cache_is_fetched_again(tmp_path: Path) -> None:
    with serve_bucket(exports()) as bucket:
        before = fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
        batch = tmp_path / PLACE / "explanations" / "batch-1.jsonl.gz"
        batch.write_bytes(bytes(batch.stat().st_size))
        with pytest.raises(AuditError, match=r"batch-1.jsonl.gz is damaged"):
            fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path)
        assert fetch_labels(DICTIONARY, base_url=bucket.url, cache_dir=tmp_path) == before
