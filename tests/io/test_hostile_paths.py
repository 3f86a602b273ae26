"""No path in a file leads out of its directory."""

from __future__ import annotations

import pytest
from datasets import Dataset, Features, Image, Value, load_from_disk
from helpers.hostile import READERS, edit
from helpers.hostile.inputs import make_evidence

from trl_sae_audit import AuditError
from trl_sae_audit.audit.evidence_files import write_evidence
from trl_sae_audit.cli.main import main
from trl_sae_audit.data.opener import iterate_rows
from trl_sae_audit.outcomes import Outcome, write_outcomes


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link/secret", "a\0b", "x" * 300, "."])
def test_files_outside_are_not_read(tmp_path, name):
    (tmp_path / "secret").write_text("{}")

    def made(kind):
        directory = tmp_path / kind.replace(" ", "-")
        directory.mkdir()
        READERS[kind].write(directory)
        (directory / "link").symlink_to(tmp_path)
        return directory

    def lead_out(entry, key="file"):
        entry[key] = name

    record = made("run record")
    edit(record / "manifest.json", lambda manifest: lead_out(manifest["files"][0]))
    filtered = made("filtered")
    edit(filtered / "manifest.json", lambda content: lead_out(content["files"][1]))
    world = made("cached world")
    edit(world / "world" / "manifest.json", lambda content: lead_out(content["files"][0]))
    for kind, directory in (("run record", record), ("filtered", filtered), ("cached world", world)):
        with pytest.raises(AuditError):
            READERS[kind].read(directory)
    data = made("saved dataset")
    edit(data / "pairs" / "state.json", lambda content: lead_out(content["_data_files"][0], "filename"))
    if name != "link/secret":  # the Hub's cache is made of links, so that they are followed
        with pytest.raises(
            AuditError,
            match=r"does not lie in it|does not contain|not a regular|null byte|too long|No such file|\[Errno",
        ):
            READERS["saved dataset"].read(data)


def test_a_part_of_an_audit_that_is_a_link_to_elsewhere_is_refused(tmp_path):
    audit = tmp_path / "audit"
    audit.mkdir()
    READERS["audit"].write(audit)
    part = audit / "parts" / "000001.safetensors"
    part.rename(tmp_path / "elsewhere")
    part.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AuditError, match="leads out of its directory"):
        READERS["audit"].read(audit)


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path):
    (tmp_path / "record").mkdir()
    READERS["run record"].write(tmp_path / "record")
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (
        "evidence.json.tmp",
        "evidence.json",
        "outcomes.json.tmp",
        "report.html.tmp",
        "evidence.md.tmp",
    ):
        (tmp_path / "record" / name).unlink(missing_ok=True)
        (tmp_path / "record" / name).symlink_to(precious)
    write_evidence(tmp_path / "record", make_evidence())
    write_outcomes(tmp_path / "record", [Outcome("x", 1.0)])
    assert main(["report", str(tmp_path / "record")]) == 0
    assert precious.read_text() == "mine"


def test_a_picture_in_a_dataset_does_not_make_us_open_a_file(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"not for you")
    row = {
        "prompt": "a",
        "chosen": "b",
        "rejected": "c",
        "shot": {"path": str(tmp_path / "secret.png"), "bytes": None},
    }
    storage = {"shot": {"bytes": Value("binary"), "path": Value("string")}}
    texts = {name: Value("string") for name in ("prompt", "chosen", "rejected")}
    Dataset.from_list([row], features=Features(texts | storage)).save_to_disk(tmp_path / "data")
    edit(
        tmp_path / "data" / "dataset_info.json", lambda info: info["features"].update(shot={"_type": "Image"})
    )
    assert isinstance(load_from_disk(tmp_path / "data").features["shot"], Image)
    (found,) = iterate_rows(tmp_path / "data")
    assert found.columns["shot"] == {"bytes": None, "path": str(tmp_path / "secret.png")}
