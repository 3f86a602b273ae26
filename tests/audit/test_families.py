"""Families against correlations over every answer, and average linkage by its definition."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from helpers.audits import audited
from helpers.worlds import make_model, make_sae_dictionary, make_tokenizer, pairs

from trl_sae_audit import Audit, AuditError, FlagSet
from trl_sae_audit.audit.families import CORRELATION, LEAST, CoActivation, find_families, join_correlated
from trl_sae_audit.cli.main import main

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version


@pytest.fixture(scope="module")
def audit(tmp_path_factory):
    tokenizer = make_tokenizer()
    where = tmp_path_factory.mktemp("families") / "audit"
    audited(
        make_model(tokenizer), tokenizer, pairs(60), make_sae_dictionary(), part_size=25, output_dir=where
    )
    return Audit.load(where)


def roots(audit, features) -> np.ndarray:
    """Root of the mean activation, by answer [answers, features]."""
    table = audit.examples(features)
    return np.sqrt(table["activation"].to_numpy(np.float64)).reshape(-1, len(features))


def test_correlations_are_those_over_every_answer(audit):
    features = [7, 3, 50, 21, 90, 4]
    together = CoActivation(features, 96)
    for part in audit._store.parts():
        together.add(part.arrays)
    values = roots(audit, features)
    expected = np.corrcoef(values.T)
    rare = (values > 0).sum(0) < LEAST
    expected[rare], expected[:, rare] = np.nan, np.nan
    assert not rare.all()
    np.testing.assert_allclose(together.correlation(), expected, atol=1e-5)
    assert together.threshold == pytest.approx(max(CORRELATION, 3 / 120**0.5))


def test_features_are_joined_by_average_linkage(rng):
    values = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 12)) + rng.standard_normal((40, 12))
    correlation = np.corrcoef(values.T)
    groups = [{place} for place in range(12)]

    def mean(one, other):
        return np.mean([correlation[a, b] for a in one for b in other])

    while len(groups) > 1:
        one, other = max(combinations(groups, 2), key=lambda pair: mean(*pair))
        if mean(one, other) < 0.3:
            break
        groups = [each for each in groups if each not in (one, other)] + [one | other]
    found = join_correlated(correlation, 0.3)
    assert {frozenset(np.flatnonzero(found == number)) for number in set(found)} == set(
        map(frozenset, groups)
    )
    assert 1 < len(groups) < 12


def test_families_are_numbered_by_their_first_and_of_one_sign(audit):
    features = np.arange(96)
    answers = [part.arrays for part in audit._store.parts()]
    signs = np.where(features % 2, 1, -1)
    signs[:5] = 0
    found = find_families(answers, features, signs, 96)
    assert (found[:5] == 0).all()
    numbers = [number for number in dict.fromkeys(found.tolist()) if number]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 1
    for number in numbers:
        assert (found == number).sum() > 1
        assert len(set(signs[found == number])) == 1


def test_members_fire_together_and_go_the_same_way(audit):
    table = audit.features()
    families = table[table["family"] > 0].groupby("family")
    assert len(families) > 1
    for _, family in families:
        values = roots(audit, family["feature"].tolist())
        correlation = np.corrcoef(values.T)[np.triu_indices(len(family), 1)]
        assert correlation.mean() > 0.27
        assert len(set(np.sign(family["selection"]))) == 1
    assert table["family"].drop_duplicates().loc[lambda number: number > 0].is_monotonic_increasing


def test_an_audit_without_activations_has_none():
    tokenizer = make_tokenizer()
    plain = audited(make_model(tokenizer), tokenizer, pairs(6), make_sae_dictionary(), activations=False)
    assert (plain.features()["family"] == 0).all()


def test_a_family_is_flagged_as_one_entry(audit, tmp_path, capsys):
    path = tmp_path / "flags.yaml"
    command = ["flag", str(audit.directory), "--flags", str(path)]
    assert main([*command, "--family", "1", "--label", "praise", "--reason", "it flatters"]) == 0
    table = audit.features()
    members = table[table["family"] == 1]["feature"].tolist()
    assert [flag.feature for flag in FlagSet.load(path)] == members
    assert {flag.label for flag in FlagSet.load(path)} == {"praise"}
    text = path.read_text()
    assert f"feature: {members}" in text
    assert text.count("- dictionary:") == 1
    words = table.set_index("feature")["words"]
    assert [flag.words for flag in FlagSet.load(path)] == [" ".join(words[each].split()) for each in members]
    assert f"and {len(members) - 1} more that move with it" in " ".join(capsys.readouterr().out.split())
    lone = table[table["family"] == 0]["feature"].iloc[0]
    assert main([*command, "--feature", str(lone)]) == 0
    assert [flag.feature for flag in FlagSet.load(path)] == [*members, lone]
    again = tmp_path / "again.yaml"
    FlagSet.load(path).save(again)
    assert FlagSet.load(again) == FlagSet.load(path)
    assert f"feature: {members}" in again.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--family", "999"], "has no family 999; its families are 1 to"),
        (["--family", "0"], "has no family 0"),
        ([], "Name one feature with --feature, or a family with --family"),
        (["--family", "1", "--feature", "2"], "Name one feature"),
    ],
)
def test_what_is_no_family_is_refused(audit, tmp_path, capsys, options, message):
    audit.features()
    assert main(["flag", str(audit.directory), "--flags", str(tmp_path / "flags.yaml"), *options]) != 0
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_damaged_table_is_refused(audit, tmp_path):
    where = audit.save(tmp_path / "copy")
    content = (where / "families.parquet").read_bytes()
    (where / "families.parquet").write_bytes(content[: len(content) // 2])
    with pytest.raises(AuditError, match=r"families\.parquet"):
        Audit.load(where).features()
