"""An audit is saved as it goes, taken up where it stopped, and refused when it is damaged or another's."""

from __future__ import annotations

import json

import pytest
from helpers.audits import audited, by_feature
from helpers.worlds import make_dictionary, make_model, pairs

from trl_sae_audit import AuditError
from trl_sae_audit.audit.result import Audit


def test_every_kind_of_source_gives_the_same_audit(tmp_path, model, tokenizer, dictionary):
    data = pairs(7)
    data.save_to_disk(tmp_path / "disk")
    data.to_parquet(tmp_path / "data.parquet")
    data.to_json(tmp_path / "data.jsonl")
    expected = by_feature(audited(model, tokenizer, data, dictionary))
    hashes = set()
    for source in (
        data.to_iterable_dataset(),
        list(data),
        tmp_path / "disk",
        str(tmp_path / "data.parquet"),
        tmp_path / "data.jsonl",
    ):
        audit = audited(model, tokenizer, source, dictionary)
        hashes.add(audit.manifest["dataset_sha256"])
        assert by_feature(audit).equals(expected)
    assert len(hashes) == 1


def test_an_audit_is_saved_and_read_back(tmp_path, model, tokenizer, dictionary):
    audit = audited(model, tokenizer, pairs(6), dictionary)
    audit.save(tmp_path / "audit")
    again = Audit.load(tmp_path / "audit")
    assert again.features().equals(audit.features())
    assert again.examples([5]).equals(audit.examples([5]))
    assert again.dictionary.identity == dictionary.identity
    temporary = audit.directory
    with pytest.raises(AuditError, match="exists already"):
        audit.save(tmp_path / "audit")
    del audit
    assert not temporary.exists()


def test_an_interrupted_audit_goes_on_where_it_stopped(tmp_path, monkeypatch, model, tokenizer, dictionary):
    data = pairs(12)
    options = {"part_size": 3, "output_dir": tmp_path / "audit"}
    whole = audited(model, tokenizer, data, dictionary, part_size=3)
    from trl_sae_audit.audit.gradients import AuditPass

    run, calls = AuditPass.run, []

    def interrupted(self, examples, *args):
        calls.append(len(examples))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(self, examples, *args)

    monkeypatch.setattr(AuditPass, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        audited(model, tokenizer, data, dictionary, **options)
    with pytest.raises(AuditError, match="interrupted"):
        Audit.load(tmp_path / "audit")
    resumed = audited(model, tokenizer, data, dictionary, **options)
    assert len(calls) == 5
    assert resumed.features().equals(whole.features())
    calls.clear()
    audited(model, tokenizer, data, dictionary, **options)
    assert calls == []
    with pytest.raises(AuditError, match="another dataset: it differs from row 0"):
        audited(model, tokenizer, pairs(12, seed=1), dictionary, **options)
    with pytest.raises(AuditError, match="another dataset: it differs from row 12"):
        audited(model, tokenizer, pairs(13), dictionary, **options)
    with pytest.raises(AuditError, match="another dictionary"):
        audited(model, tokenizer, data, make_dictionary(seed=9), **options)
    with pytest.raises(AuditError, match="another model fingerprint"):
        audited(make_model(tokenizer, seed=4), tokenizer, data, dictionary, **options)


def test_an_audit_of_another_time_or_a_damaged_one_is_refused(tmp_path, model, tokenizer, dictionary):
    audited(model, tokenizer, pairs(4), dictionary, output_dir=tmp_path / "audit")
    part = tmp_path / "audit" / "parts" / "000000.safetensors"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(AuditError, match="cannot be read"):
        Audit.load(tmp_path / "audit").features()
    manifest = tmp_path / "audit" / "manifest.json"
    manifest.write_text(json.dumps({"kind": "audit", "format": 99}))
    with pytest.raises(AuditError, match="an audit of format 99"):
        Audit.load(tmp_path / "audit")
    manifest.write_text("{")
    with pytest.raises(AuditError, match="damaged"):
        Audit.load(tmp_path / "audit")
    with pytest.raises(AuditError, match="is not an audit"):
        Audit.load(tmp_path / "nothing")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("do not lose me")
    with pytest.raises(AuditError, match="not empty"):
        audited(model, tokenizer, pairs(4), dictionary, output_dir=tmp_path / "full")


def test_a_full_disk_stops_the_audit_with_a_sentence_and_it_goes_on_later(
    tmp_path, monkeypatch, model, tokenizer, dictionary
):
    from trl_sae_audit.audit import store as audit_store

    write, calls = audit_store.write_durably, []

    def full(path, content):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(audit_store, "write_durably", full)
    options = {"part_size": 2, "output_dir": tmp_path / "audit"}
    with pytest.raises(AuditError, match="No space left"):
        audited(model, tokenizer, pairs(8), dictionary, **options)
    resumed = audited(model, tokenizer, pairs(8), dictionary, **options)
    assert resumed.features().equals(audited(model, tokenizer, pairs(8), dictionary, part_size=2).features())
