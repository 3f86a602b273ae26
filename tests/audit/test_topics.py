"""Topics against prompts whose topics are known, and what is said of them against plain loops over the examples."""

from __future__ import annotations

import random
from math import comb

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.audits import audited, by_feature
from helpers.worlds import WORDS, make_model, make_reward_model, make_sae_dictionary, make_tokenizer

from trl_sae_audit import Audit, AuditError, audit_preferences, audit_reward_model
from trl_sae_audit.audit.objectives import PreferenceLoss
from trl_sae_audit.audit.prompt_states import MOST_NUMBERS, PromptStates
from trl_sae_audit.audit.topic_clusters import Clusters, draw_sample, mean_silhouette
from trl_sae_audit.audit.topic_features import LEAST, interaction_p
from trl_sae_audit.audit.topic_words import TopicWords, prompt_text
from trl_sae_audit.cli.audit_topics import topic_parts
from trl_sae_audit.cli.options import OutputArguments
from trl_sae_audit.io.feature_labels import Label, LabelSet
from trl_sae_audit.models.hook_points import resolve_hook_point
from trl_sae_audit.models.residual_stream import hidden_states
from trl_sae_audit.statistics import benjamini_hochberg

pytestmark = pytest.mark.newest  # nothing here depends on TRL's version

KINDS = {"plants": WORDS[:3], "stars": WORDS[3:6], "boats": WORDS[6:9], "bread": WORDS[9:12]}
SIGN = "w59"


def pairs_about(n: int, seed: int = 0, planted: str = "stars") -> Dataset:
    """Prompts of four topics, each with words of its own; answers of like words, and in one topic the chosen ones have a sign."""
    draw = random.Random(seed)
    rows = []
    for number in range(n):
        topic = list(KINDS)[number % 4]
        words = lambda k, of=None: draw.choices(of or WORDS[32:58], k=k)  # noqa: E731
        answers = [words(draw.randint(3, 6)) for _ in range(2)]
        signed = 0 if topic == planted else draw.choice((0, 1))
        answers[signed] = [SIGN] * 3 + answers[signed][:1]
        prompt = " ".join(words(12, KINDS[topic]))
        rows.append(
            {
                "prompt": prompt,
                "chosen": " ".join(["", *answers[0]]),
                "rejected": " ".join(["", *answers[1]]),
                "about": topic,
            }
        )
    return Dataset.from_list(rows)


DATA = pairs_about(200)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tokenizer = make_tokenizer()
    where = tmp_path_factory.mktemp("topics") / "audit"
    options = {"part_size": 64, "output_dir": where, "topic_column": "about"}
    audited(make_model(tokenizer), tokenizer, DATA, make_sae_dictionary(), **options)
    return Audit.load(where)


def test_cells_are_counted_example_by_example(made):
    """Preference, its opposite, and Fisher's test from its definition."""
    table, numbers = made.topic_features(), made.topic_numbers()
    features = sorted(table["feature"].unique())
    examples = made.examples(features)
    one, other = (
        examples[examples["side"] == side]["activation"].to_numpy(np.float64) for side in made.sides
    )
    gaps = np.where(np.abs(one - other) > 1e-4 * (one + other), one - other, 0).reshape(-1, len(features))
    assert len(table) > 30
    p_values = []
    for row in table.to_dict("records"):
        gap = gaps[:, features.index(row["feature"])]
        here = numbers == row["topic"]
        won, lost, won_there, lost_there = (
            int((each[where]).sum()) for where in (here, ~here) for each in (gap > 0, gap < 0)
        )
        assert row["examples"] == won + lost
        assert row["examples_elsewhere"] == won_there + lost_there
        assert row["preference"] == won / (won + lost)
        assert row["preference_elsewhere"] == won_there / (won_there + lost_there)
        assert row["interaction"] == row["preference"] - row["preference_elsewhere"]
        p_values.append(fisher(won, lost, won_there, lost_there))
    np.testing.assert_allclose(table["p_value"], p_values, rtol=1e-9)
    np.testing.assert_allclose(table["q_value"], benjamini_hochberg(np.array(p_values)), rtol=1e-9)
    assert (table["p_value"].diff().dropna() >= 0).all()


def fisher(won: int, lost: int, won_there: int, lost_there: int) -> float:
    drawn, wins, losses = won + lost, won + won_there, lost + lost_there
    ways = [comb(wins, k) * comb(losses, drawn - k) for k in range(drawn + 1)]
    fewer, more = sum(ways[: won + 1]) / sum(ways), sum(ways[won:]) / sum(ways)
    return min(1.0, 2 * min(fewer, more))


def test_every_cell_with_enough_examples_is_there(made):
    gaps, numbers = made.activation_gaps(range(96)), made.topic_numbers()
    differs = np.abs(gaps) > 0
    expected = {
        (topic, feature)
        for topic in range(1, 5)
        for feature in range(96)
        if differs[numbers == topic, feature].sum() >= LEAST
        and differs[numbers != topic, feature].sum() >= LEAST
    }
    assert (
        set(zip(*made.topic_features()[["topic", "feature"]].to_numpy().T.tolist(), strict=True)) == expected
    )


def test_a_topics_selection_is_that_of_an_audit_of_its_rows_alone(made):
    tokenizer = make_tokenizer()
    table, names = made.topic_features(), made.topics().set_index("name")["topic"]
    for rows, suffix in (("stars", ""), ("others", "_elsewhere")):
        alone = DATA.filter(lambda row, rows=rows: (row["about"] == "stars") == (rows == "stars"))
        expected = by_feature(audited(make_model(tokenizer), tokenizer, alone, make_sae_dictionary()))
        found = table[table["topic"] == names["stars"]].set_index("feature").sort_index()
        expected = expected.loc[found.index]
        for name in ("selection", "selection_standard_error"):
            column = name.replace("selection", f"selection{suffix}")
            scale = expected[name].abs().max()
            np.testing.assert_allclose(found[column] / scale, expected[name] / scale, atol=2e-5)


def test_what_is_planted_in_one_topic_is_found_there(made):
    first = made.topic_features().iloc[0]
    assert first["name"] == "stars"
    assert SIGN in first["words"]
    assert first["q_value"] < 0.05
    assert first["interaction"] > 0.5
    inside = made.contexts([first["feature"]], topic=first["topic"])
    assert 0 < len(inside) <= 4
    assert {DATA[int(row)]["about"] for row in inside["row"]} == {"stars"}
    best = made.examples([first["feature"]])
    best = best[best["row"].isin(np.flatnonzero(made.topic_numbers() == first["topic"]))]
    np.testing.assert_allclose(inside["activation"], best["max_activation"].nlargest(len(inside)), rtol=1e-6)


def test_a_label_stands_before_the_words(made, tmp_path, capsys):
    audit = Audit.load(made.save(tmp_path / "audit"))
    first = int(audit.topic_features()["feature"].iloc[0])
    dictionary = audit.dictionary
    LabelSet(dictionary.name, dictionary.identity).updated([Label(first, "says the sign")]).save(
        audit.directory
    )
    table = audit.topic_features()
    assert ((table["label"] == "says the sign") == (table["feature"] == first)).all()
    OutputArguments().show({}, *topic_parts(audit))
    assert "says the sign: " in capsys.readouterr().out


def test_the_columns_values_are_the_topics(made):
    table = made.topics()
    assert sorted(table["name"]) == sorted(KINDS)
    assert (table["examples"] == 50).all()
    for row in table.to_dict("records"):
        assert set(row["words"].split(" · ")) <= set(KINDS[row["name"]])


def test_clusters_are_of_prompts_alike(made, tmp_path):
    audit = Audit.load(made.save(tmp_path / "copy"))
    audit.find_topics(DATA, None)
    about, numbers, table = np.array(DATA["about"]), audit.topic_numbers(), audit.topics()
    assert table["examples"].sum() == 200
    own = sum(pd.Series(about[numbers == number]).value_counts().iloc[0] for number in table["topic"])
    assert own > 180
    assert (table["name"] == table["words"]).all()
    assert audit.topic_features()["topic"].max() <= len(table)
    assert audit.contexts([1], topic=1).empty  # found without a tokenizer
    again = Audit.load(made.save(tmp_path / "again"))
    again.find_topics(DATA, None)
    np.testing.assert_array_equal(again.topic_numbers(), numbers)


def test_the_state_of_a_prompt_is_the_mean_over_its_tokens(made):
    tokenizer = make_tokenizer()
    dictionary, loss = make_sae_dictionary(), PreferenceLoss(tokenizer)
    point = resolve_hook_point(make_model(tokenizer), dictionary.hook_point)
    found = np.concatenate([states for _, states in made._store.prompt_states()])
    for number in (0, 70, 199):
        batch = loss.collate(loss.tokenize([(number, DATA[number])]))
        with torch.no_grad():
            hidden = hidden_states(point, {name: batch[name] for name in ("input_ids", "attention_mask")})
        prompt = len(tokenizer(DATA[number]["prompt"])["input_ids"])
        np.testing.assert_allclose(found[number], hidden[0, :prompt].mean(0), rtol=1e-4, atol=1e-5)


def test_wide_states_keep_their_distances():
    torch.manual_seed(0)
    hidden = torch.randn(20, 1, 2048)
    states = PromptStates(2048).of(hidden, torch.ones(20, 1), torch.zeros(20, 1))
    assert states.shape == (20, MOST_NUMBERS)
    ratio = torch.pdist(states) / torch.pdist(hidden[:, 0])
    assert float(ratio.min()) > 0.75
    assert float(ratio.max()) < 1.25
    torch.testing.assert_close(
        PromptStates(2048).of(hidden[:3], torch.ones(3, 1), torch.zeros(3, 1)), states[:3]
    )


def test_padding_answers_and_sinks_are_no_part_of_a_prompt():
    hidden = torch.arange(12.0).reshape(1, 6, 2) + 1
    hidden[0, 1] = 1e6
    real, answer = torch.tensor([[0, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 0, 0, 1, 0]])
    torch.testing.assert_close(PromptStates(2).of(hidden, real, answer), hidden[:, 2:4].mean(1))
    assert (PromptStates(2).of(hidden, real, real) == 0).all()


def test_the_silhouette_is_that_of_its_definition(rng):
    points, cluster = rng.standard_normal((30, 3)), np.array([0] * 12 + [2] * 17 + [5])
    scores = []
    for number, own in enumerate(cluster):
        distance = np.linalg.norm(points - points[number], axis=1)
        others = [each for each in np.flatnonzero(cluster == own) if each != number]
        if not others:
            scores.append(0.0)
            continue
        a = distance[others].mean()
        b = min(distance[cluster == each].mean() for each in (0, 2, 5) if each != own)
        scores.append((b - a) / max(a, b))
    assert mean_silhouette(points, cluster) == pytest.approx(np.mean(scores))


def test_clusters_are_as_many_as_there_are(rng):
    centres = rng.standard_normal((6, 20)) * 4
    truth = rng.integers(0, 6, 600)
    states = centres[truth] + rng.standard_normal((600, 20))
    states[:, 3] = 1e4 + 1e3 * rng.standard_normal(600)  # a dimension of massive activations
    clusters = Clusters(states)
    found = clusters.assign(states)
    assert len(clusters.centres) == 6
    assert all(len(set(truth[found == number])) == 1 for number in range(6))


def test_a_sample_is_drawn_evenly_from_parts(rng):
    states = np.arange(10000.0)[:, None]
    sample = draw_sample(np.array_split(states, 7), 10000)
    assert len(sample) == 4096
    assert np.diff(sample[:, 0]).max() <= 3
    np.testing.assert_array_equal(draw_sample([states[:5], states[5:9]], 9), states[:9])


def test_words_are_those_that_tell_a_topic_from_the_others():
    words = TopicWords(2)
    for number in range(30):
        words.add(0, f"user: What is the velocity of a proton {number}?")
        words.add(1, f"user: What is the colour of a rose {number}?")
    assert [set(line.split(" · ")) for line in words.lines()] == [{"velocity", "proton"}, {"colour", "rose"}]
    assert TopicWords(1).lines() == [""]


def test_a_prompt_that_its_answers_begin_with():
    assert prompt_text({"chosen": "Is it? Yes.", "rejected": "Is it? No."}) == "Is it? "
    assert prompt_text({"prompt": [{"role": "user", "content": "Hi"}]}) == "user: Hi"


def test_rare_cells_are_not_tested():
    won, lost = np.array([[9, 10]]), np.zeros((1, 2), int)
    p = interaction_p(won, lost, np.array([[50, 10]]), np.array([[50, 90]]))
    assert np.isnan(p[0, 0])
    assert p[0, 1] < 1e-6


def test_too_few_prompts_have_no_topics(made):
    tokenizer = make_tokenizer()
    few = audited(make_model(tokenizer), tokenizer, DATA.select(range(12)), make_sae_dictionary())
    assert few.topics().empty
    assert few.topic_features().empty
    assert (few.topic_numbers() == 0).all()
    with pytest.raises(AuditError, match="Topic 1 is not one of this audit's 0 topics"):
        few.contexts([1], topic=1)


def test_columns_that_are_no_topics_are_refused(made):
    tokenizer = make_tokenizer()
    model, dictionary = make_model(tokenizer), make_sae_dictionary()
    with pytest.raises(
        AuditError, match="no column 'subject' for topics, but about, chosen, prompt, rejected"
    ):
        audited(model, tokenizer, DATA, dictionary, topic_column="subject")
    numbered = Dataset.from_list(
        [{**row, "number": place} for place, row in enumerate(DATA.select(range(80)))]
    )
    with pytest.raises(AuditError, match="'number' of the dataset has more than 64 values"):
        audited(model, tokenizer, numbered, dictionary, topic_column="number")


def test_rows_without_a_value_are_a_topic_of_their_own():
    tokenizer = make_tokenizer()
    rows = [
        {**row, "about": row["about"] if place % 3 else None}
        for place, row in enumerate(DATA.select(range(24)))
    ]
    audit = audited(make_model(tokenizer), tokenizer, rows, make_sae_dictionary(), topic_column="about")
    assert "(none)" in audit.topics()["name"].tolist()
    assert (audit.topic_numbers() > 0).all()


def test_answers_to_one_prompt_are_one_example():
    """With a reward: the mean over the answers above the prompt's mean against that over those below."""
    tokenizer, dictionary = make_tokenizer(), make_sae_dictionary()
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "about": row["about"]}
        for row in DATA.select(range(80))
        for side in ("chosen", "rejected", "chosen")
    ]
    audit = audit_preferences(
        make_model(tokenizer),
        tokenizer,
        rows,
        dictionary,
        "policy_gradient",
        reward=lambda completions, **_: [float(SIGN in text) for text in completions],
        lookahead=None,
        topic_column="about",
        progress=False,
    )
    answers = audit.answers()
    assert audit.topics()["examples"].tolist() == [60] * 4
    table = audit.topic_features()
    examples = audit.examples(sorted(table["feature"].unique()))
    examples["group"] = answers["group"].to_numpy()[examples["row"]]
    examples["topic"] = audit.topic_numbers()[examples["row"]]
    for row in table.head(20).to_dict("records"):
        own = examples[examples["feature"] == row["feature"]]
        won = lost = 0
        for _, group in own[own["topic"] == row["topic"]].groupby("group"):
            sides = group.groupby("side")["activation"].mean()
            if {"reinforced", "suppressed"} <= set(sides.index):
                gap = sides["reinforced"] - sides["suppressed"]
                won, lost = won + (gap > 1e-6), lost + (gap < -1e-6)
        assert (row["examples"], round(row["preference"] * row["examples"])) == (won + lost, won)


def test_a_reward_models_preference_is_by_its_reward():
    tokenizer = make_tokenizer()
    judge = make_reward_model(tokenizer)
    audit = audit_reward_model(
        judge, tokenizer, DATA.select(range(120)), make_sae_dictionary(), topic_column="about", progress=False
    )
    table, numbers = audit.topic_features(), audit.topic_numbers()
    row = table.iloc[0]
    examples = audit.examples([row["feature"]]).pivot(
        index="row", columns="side", values=["activation", "log_prob"]
    )
    gap = examples["activation"]["chosen"] - examples["activation"]["rejected"]
    paid = np.sign(examples["log_prob"]["chosen"] - examples["log_prob"]["rejected"]) * gap
    here = numbers[:120] == row["topic"]
    assert row["examples"] == int((paid[here].abs() > 0).sum())
    assert row["preference"] == pytest.approx((paid[here] > 0).sum() / row["examples"])


@pytest.mark.parametrize("name", ["topics.parquet", "topic_features.parquet", "topic_contexts.parquet"])
def test_damaged_files_are_refused(made, tmp_path, name):
    where = made.save(tmp_path / "copy")
    content = (where / name).read_bytes()
    (where / name).write_bytes(content[: len(content) // 2])
    audit = Audit.load(where)
    read = {"topics": audit.topics, "topic_features": audit.topic_features}
    with pytest.raises(AuditError, match=name.replace(".", r"\.")):
        read.get(name.removesuffix(".parquet"), lambda: audit.contexts([1], topic=1))()


def test_topics_of_other_rows_are_refused(made, tmp_path):
    where = made.save(tmp_path / "copy")
    audit = Audit.load(where)
    audit._store.write_arrays("topics.safetensors", {"topic": np.zeros(200, np.int16)}, {})
    with pytest.raises(AuditError, match="not those of the rows"):
        audit.topics()
