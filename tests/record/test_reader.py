"""What was written is what is read, and a record that cannot be vouched for is refused."""

import json
import os
import zlib

import numpy as np
import pytest
from helpers.records import HEADER, OTHER, F, assert_consistent, parts_in, take_step, values_of, write_steps

from trl_sae_audit.attribution.totals import FeatureTotals
from trl_sae_audit.errors import AuditError
from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.record import reader as record_reader
from trl_sae_audit.record import writer as record_writer
from trl_sae_audit.record.manifest import read_manifest
from trl_sae_audit.record.reader import RunRecord
from trl_sae_audit.record.writer import RecordWriter


def edit_manifest(directory, change):
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_record_reads_back(written):
    record = RunRecord.load(written)
    assert (record.status, record.last_step) == ("finished", 7)
    assert record.manifest["config"]["arguments"] == {
        "learning_rate": 5e-6,
        "optim": "adamw",
        "max_grad_norm": "inf",
        "seed": 3,
    }
    assert (record.manifest["kind"], record.manifest["format"]) == ("run", 1)
    assert "torch" in record.manifest["packages"]
    assert record.dictionaries == HEADER["dictionaries"]
    assert_consistent(record)


def test_features_are_ranked_and_labelled(written):
    record = RunRecord.load(str(written))
    features = record.features()
    assert features["attribution"].abs().is_monotonic_decreasing
    assert sorted(features["feature"]) == list(range(F))
    assert features.loc[features["feature"] == 2, "label"].item() == "sycophancy"
    assert (features.loc[features["feature"] != 2, "label"] == "").all()
    assert (features["dictionary"] == "mine").all()
    np.testing.assert_allclose(features["lift"], 8 * features["share"])
    expected = record.totals().frame(8).set_index("feature")
    np.testing.assert_array_equal(features["q_value"], expected.loc[features["feature"], "q_value"])


@pytest.mark.parametrize(
    ("names", "sides"),
    [
        (["chosen", "rejected"], {"chosen": "chosen", "rejected": "rejected"}),
        (["reinforced", "suppressed"], {"positive": "reinforced", "negative": "suppressed"}),
        (None, {}),
    ],
)
def test_columns_of_the_sides(tmp_path, names, sides):
    """Pairs have chosen and rejected; any other run positive and negative, stored under these names in both."""
    writer = RecordWriter.create(tmp_path, HEADER | {"sides": names})
    totals = FeatureTotals(F)
    totals.update(*(number * np.ones((1, F)) for number in (3, 2, 1, 1, 0.1)))
    row = {"step": [1], "dictionary": ["mine"], "feature": [0], "positive": [2.0], "negative": [1.0]}
    writer.append("steps", row)
    writer.close("finished", 1, {"mine": totals})
    record = RunRecord.load(tmp_path)
    assert record.sides == sides
    first, second = sides or ("positive", "negative")
    for frame in (record.steps(), record.features()):
        assert (frame[first] == 2).all()
        assert (frame[second] == 1).all()
        assert len({"chosen", "rejected", "positive", "negative"} & set(frame)) == 2
    assert record.table("steps")["positive"].tolist() == [2.0]


def test_curriculum_has_a_row_a_bin(written):
    curriculum = RunRecord.load(written).curriculum()
    assert curriculum.index.tolist() == [(step, step) for step in range(1, 8)]
    np.testing.assert_array_equal(curriculum.loc[(3, 3)], values_of(3)[0])


def test_several_dictionaries_are_told_apart(tmp_path):
    header = HEADER | {"dictionaries": [*HEADER["dictionaries"], OTHER]}
    writer = RecordWriter.create(tmp_path, header)
    mine, other = FeatureTotals(F), FeatureTotals(F)
    take_step(writer, mine, 1)
    writer.append("steps", {"step": [1], "dictionary": ["other"], "feature": [0], "attribution": [1.0]})
    other.update(*[np.ones((1, F), np.float32)] * 5)
    writer.flush(1, {"mine": mine, "other": other})
    record = RunRecord.load(tmp_path)
    assert len(record.steps()) == F + 1
    assert record.steps("other")["attribution"].tolist() == [1.0]
    assert len(record.features()) == 2 * F
    assert set(record.features("other")["dictionary"]) == {"other"}
    assert record.totals("other").attribution.sums["score"].tolist() == [1.0] * F
    with pytest.raises(AuditError, match=r"several dictionaries: name one of \['mine', 'other'\]"):
        record.curriculum()
    with pytest.raises(AuditError, match="no dictionary 'nobody'"):
        record.features("nobody")
    with pytest.raises(AuditError, match="every dictionary"):
        writer.flush(2, {"mine": mine})


def test_a_record_without_a_flush_says_so(tmp_path):
    RecordWriter.create(tmp_path, HEADER).close("failed")
    record = RunRecord.load(tmp_path)
    assert (record.status, record.last_step) == ("failed", 0)
    with pytest.raises(AuditError, match="first flush"):
        record.features()
    with pytest.raises(AuditError, match="no table 'steps'"):
        record.steps()


def test_files_deleted_between_manifest_and_reading_are_looked_up_anew(written, monkeypatch):
    stale = read_manifest(written)
    totals = RunRecord.load(written).totals()
    write_steps(RecordWriter.resume(written, HEADER, 7), totals, [8])
    answers = [stale]
    monkeypatch.setattr(
        record_reader, "read_manifest", lambda path: answers.pop() if answers else read_manifest(path)
    )
    assert RunRecord.load(written).last_step == 8


def test_what_is_no_record_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(AuditError, match="is not a run record"):
            RunRecord.load(path)
    (tmp_path / MANIFEST).write_text("[]")
    with pytest.raises(AuditError, match="holds something else, not a run record"):
        RunRecord.load(tmp_path)


@pytest.mark.parametrize("version", [0, 2, "1", True, None])
def test_an_unknown_format_is_refused(written, version):
    edit_manifest(written, lambda manifest: manifest.update(format=version))
    with pytest.raises(AuditError, match="of format"):
        RunRecord.load(written)


@pytest.mark.parametrize("kind", ["steps", "totals"])
def test_damaged_files_are_named(written, kind):
    path = next((written / kind).iterdir())
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(AuditError, match=rf"{path.name} is damaged .*truncated or changed"):
        RunRecord.load(written)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(AuditError, match=rf"{path.name} is damaged .*truncated or changed"):
        RunRecord.load(written)
    path.unlink()
    with pytest.raises(AuditError, match=rf"{path.name} is damaged or cannot be read .No such file"):
        RunRecord.load(written)
    os.mkfifo(path)
    with pytest.raises(
        AuditError, match=f"{path.name} is damaged or cannot be read .it is not a regular file"
    ):
        RunRecord.load(written)


def test_a_truncated_manifest_is_refused(written):
    text = (written / MANIFEST).read_text()
    for length in (0, 1, len(text) // 2, len(text) - 3):
        (written / MANIFEST).write_text(text[:length])
        with pytest.raises(AuditError, match="is damaged"):
            RunRecord.load(written)


@pytest.mark.parametrize(
    "file", ["../secret", "/etc/passwd", "steps/../../secret", "link/secret", "steps/\0"]
)
def test_no_path_leaves_the_directory(written, file):
    (written.parent / "secret").write_text("secret")
    (written / "link").symlink_to(written.parent)
    edit_manifest(written, lambda manifest: parts_in(manifest, "steps")[0].update(file=file))
    with pytest.raises(AuditError, match="outside of it"):
        RunRecord.load(written)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: parts_in(m, "steps")[0].update(size=3), "truncated or changed"),
        (lambda m: parts_in(m, "steps")[0].update(rows=3), "rows where the manifest says 3"),
        (lambda m: parts_in(m, "steps")[0].update(rows="3"), "is damaged"),
        (lambda m: m.update(files=3), "is damaged"),
        (lambda m: parts_in(m, "totals")[0].update(rows=6), "is damaged"),
        (lambda m: m["files"].append(None), "is damaged"),
        (lambda m: m["files"].append(parts_in(m, "totals")[0]), "is damaged"),
        (lambda m: m["dictionaries"][0].update(d_sae=6) or parts_in(m, "totals")[0].update(rows=6), "says 6"),
        (lambda m: m.update(status="resting"), "is damaged"),
        (lambda m: m.update(last_step=True), "is damaged"),
        (lambda m: m.update(dictionaries=[]), "is damaged"),
        (lambda m: m.pop("created"), "is damaged"),
    ],
)
def test_a_manifest_that_does_not_fit_its_files_is_refused(written, change, message):
    edit_manifest(written, change)

    def read_everything():
        record = RunRecord.load(written)
        record.steps()
        record.totals()

    with pytest.raises(AuditError, match=message):
        read_everything()


def test_a_part_of_another_format_is_refused(written):
    path = written / parts_in(json.loads((written / MANIFEST).read_text()), "steps")[0]["file"]
    path.write_bytes(b"not parquet")
    edit_manifest(
        written,
        lambda m: parts_in(m, "steps")[0].update(
            file=f"steps/{path.name}", size=11, crc32=zlib.crc32(b"not parquet")
        ),
    )
    with pytest.raises(AuditError, match="magic bytes"):
        RunRecord.load(written).steps()


def test_versions_are_found_without_importing_the_packages():
    versions = record_writer.package_versions()
    assert versions["numpy"] == np.__version__
    assert "python" in versions
