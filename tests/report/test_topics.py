"""The report's sections on topics and families say what the audit says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from helpers.audits import audited
from helpers.worlds import WORDS, make_model, make_sae_dictionary, make_tokenizer

from trl_sae_audit.io.feature_labels import Label, LabelSet
from trl_sae_audit.report import write_report
from trl_sae_audit.report.topics import Topic

ABOUT = (WORDS[:3], WORDS[3:6])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tokenizer = make_tokenizer()
    rows = [
        {
            "prompt": " ".join(ABOUT[n % 2] * 2),
            "chosen": f" w59 w59 w{20 + n % 9}" if n % 2 else f" w{20 + n % 7} w{30 + n % 8}",
            "rejected": f" w{20 + n % 7} w{30 + n % 8}" if n % 2 else f" w59 w59 w{20 + n % 9}",
            "about": "<b>odd</b>" if n % 2 else "even",
        }
        for n in range(60)
    ]
    audit = audited(make_model(tokenizer), tokenizer, rows, make_sae_dictionary(), topic_column="about")
    first, dictionary = int(audit.topic_features()["feature"].iloc[0]), audit.dictionary
    LabelSet(dictionary.name, dictionary.identity).updated([Label(first, "says the sign")]).save(
        audit.directory
    )
    return audit, write_report(audit.directory).read_text(encoding="utf-8")


def test_every_cell_beyond_chance_is_shown_under_its_topic(made):
    audit, page = made
    cells = audit.topic_features()
    beyond = cells[cells["q_value"] < 0.05]
    assert len(beyond) >= 2
    assert f"{beyond['feature'].nunique()} feature" in page
    for number, of_topic in beyond.groupby("topic"):
        section = page.split(f'id="topic-{number}"')[1].split("</details>")[0]
        shown = re.findall(r'<th scope="row" data-value="(\d+)">', section)
        assert [int(feature) for feature in shown] == of_topic["feature"].head(20).tolist()
        first = of_topic.iloc[0]
        assert f"{100 * first['preference']:.0f}% of {first['examples']}" in section
        assert "<mark>" in section
        assert ("says the sign: " in section) == (first["label"] != "")
    assert "<b>odd</b>" not in page
    assert "&lt;b&gt;odd&lt;/b&gt;" in page
    assert 'href="#topics"' in page
    assert '<th scope="col">words</th>' in page.split('id="topics"')[1].split("</table>")[0]


def test_words_that_are_the_topics_names_are_not_shown_twice():
    named = [Topic(n, f"w{n} · w{n + 1}", f"w{n} · w{n + 1}" if n else "", 8, 0, []) for n in range(2)]
    assert all(topic.is_named_by_words for topic in named)
    assert not replace(named[0], words="w9").is_named_by_words


def test_every_family_opens(made):
    audit, page = made
    table = audit.features()
    section = page.split('id="families"')[1].split("</section>")[0]
    shown = [
        re.findall(r'<th scope="row" data-value="(\d+)">', part) for part in section.split("<details>")[1:]
    ]
    families = table[table["family"] > 0].groupby("family")["feature"].apply(set)
    assert [set(map(int, family)) for family in shown] == families.head(20).tolist()


def test_an_audit_without_topics_has_no_such_section(tmp_path):
    tokenizer = make_tokenizer()
    rows = [
        {"prompt": "w1", "chosen": " w2", "rejected": " w3"},
        {"prompt": "w4", "chosen": " w5", "rejected": " w6"},
    ]
    audit = audited(make_model(tokenizer), tokenizer, rows, make_sae_dictionary())
    page = write_report(audit.directory).read_text(encoding="utf-8")
    assert 'id="topics"' not in page
    assert 'id="families"' not in page
