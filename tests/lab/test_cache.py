"""A world is built once, appears whole, and is built again when it is damaged."""

import warnings

import pytest

from trl_sae_audit.io.manifest import MANIFEST
from trl_sae_audit.lab import cache


def test_cache_root_follows_the_environment(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRL_SAE_AUDIT_CACHE", str(tmp_path / "mine"))
    assert cache.cache_root() == tmp_path / "mine"
    monkeypatch.delenv("TRL_SAE_AUDIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "xdg" / "trl-sae-audit"


def test_cache_key_follows_the_configuration() -> None:
    assert cache.cache_key({"seed": 1}) == cache.cache_key({"seed": 1})
    assert cache.cache_key({"seed": 1}) != cache.cache_key({"seed": 2})


def test_cache_builds_once_and_appears_whole(tmp_path) -> None:
    target, built = tmp_path / "deep" / "world", []

    def build(scratch) -> None:
        assert not target.exists()
        (scratch / "part").mkdir()
        (scratch / "part" / "a.txt").write_text("a")
        built.append(scratch)

    assert cache.build_once(target, build) == target
    assert cache.build_once(target, build) == target
    assert len(built) == 1
    assert (target / "part" / "a.txt").read_text() == "a"


def test_cache_leaves_nothing_behind_a_failed_build(tmp_path) -> None:
    def fail(scratch) -> None:
        (scratch / "half.txt").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        cache.build_once(tmp_path / "world", fail)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("harm", ["change", "remove", "checksums", "garbage"])
def test_a_damaged_cache_is_named_and_built_anew(tmp_path, harm: str) -> None:
    def build(scratch) -> None:
        (scratch / "a.txt").write_text("good")

    target = cache.build_once(tmp_path / "world", build)
    if harm == "change":
        (target / "a.txt").write_text("bad")
    elif harm == "remove":
        (target / "a.txt").unlink()
    elif harm == "checksums":
        (target / MANIFEST).unlink()
    else:
        (target / MANIFEST).write_text("{")
    with pytest.warns(UserWarning, match="is built again"):
        cache.build_once(target, build)
    assert (target / "a.txt").read_text() == "good"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.build_once(target, build)
