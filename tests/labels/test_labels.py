"""Labels made and scored through an endpoint that speaks the protocol: one that knows the truth, and ones that guess."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers.servers import Endpoint, serve_endpoint

from trl_sae_audit import Audit, AuditError, EndpointChat, LocalChat, make_labels, score_labels
from trl_sae_audit.labels.exercises import make_exercises
from trl_sae_audit.labels.prompts import ask_for_label, read_label, read_verdict
from trl_sae_audit.labels.replies import KeptReplies
from trl_sae_audit.labels.score import phrase_occurs, score_verdicts


def one_line(text: str) -> str:
    return " ".join(text.replace("<<", "").replace(">>", "").split())


class Truth:
    """Names each feature by its number, and knows of every context and place which features are active there."""

    def __init__(self, audit: Audit) -> None:
        frame = audit.contexts()
        self.features: dict[str, set[int]] = {}
        self.places: dict[str, set[int]] = {}
        for row in frame.to_dict("records"):
            text = one_line(row["before"] + row["at"] + row["after"])
            marked = " ".join(f"{row['before']} <<{row['at'].strip()}>>{row['after']}".split())
            self.features.setdefault(text, set()).add(row["feature"])
            self.places.setdefault(marked, set()).add(row["feature"])

    def __call__(self, messages: list[dict[str, str]]) -> str:
        question = messages[-1]["content"]
        if question.startswith("Active:"):
            lines = re.findall(r"^\d+\. (.*)$", question.partition("Silent:")[0], re.MULTILINE)
            (feature, *others) = set.intersection(*(self.places[line] for line in lines))
            return f'Name: "feature {feature}"\nbecause of it' if not others else "unclear"
        feature = int(re.findall(r"Description: feature (\d+)", question)[0])
        text = re.findall(r"^Text: (.*)$", question, re.MULTILINE)[0]
        known = self.places.get(" ".join(text.split()), set()) if "<<" in text else self.features[text]
        return "Yes." if feature in known else " no"


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    return "Bearer secret"


def test_an_endpoint_that_knows_the_truth_scores_one(
    audit: Audit, features: list[int], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(features) == 4
    with serve_endpoint(Endpoint(Truth(audit), busy=2)) as endpoint:
        chat = EndpointChat("wise", endpoint.url, concurrency=3)
        labels = make_labels(audit, chat, features)
        assert {each.feature: each.text for each in labels} == {each: f"feature {each}" for each in features}
        assert {(each.source, each.explainer) for each in labels} == {("endpoint", "wise")}
        asked = len(endpoint.requests)
        assert asked == 4
        scored = score_labels(audit, labels, chat, features)
        assert 1 < endpoint.most <= 3
        assert endpoint.keys == {key}
        assert {body["max_completion_tokens"] for body in endpoint.requests[asked:]} == {4}
        for label in scored:
            assert label.detection is not None
            assert (label.detection.accuracy, label.judge) == (1.0, "wise")
            assert not label.is_chance
            assert label.detection.silent == 10
            assert label.fuzzing is not None
            assert label.fuzzing.accuracy > 0.9  # a word drawn may be the very place
        before = len(endpoint.requests)
        again = score_labels(audit, make_labels(audit, chat, features), chat, features)
        assert again == scored
        assert len(endpoint.requests) == before  # every reply was kept


@pytest.mark.parametrize("reply", ["Yes", "No"])
def test_a_judge_that_always_says_the_same_is_at_chance(
    audit: Audit, features: list[int], key: str, reply: str
) -> None:
    features = features[:2]
    with serve_endpoint(
        Endpoint(lambda messages: reply if "Text:" in messages[-1]["content"] else "words")
    ) as endpoint:
        chat = EndpointChat("stubborn", endpoint.url)
        for label in score_labels(audit, make_labels(audit, chat, features), chat, features):
            assert label.detection is not None
            assert label.detection.accuracy == 0.5
            assert label.is_chance


def test_replies_that_are_neither_are_not_counted_as_no(audit: Audit, features: list[int], key: str) -> None:
    features = features[:2]
    with serve_endpoint(Endpoint(lambda messages: "I cannot tell")) as endpoint:
        chat = EndpointChat("mute", endpoint.url)
        labels = score_labels(audit, make_labels(audit, chat, features), chat, features)
        assert [(each.text, each.detection, each.fuzzing) for each in labels] == [
            ("I cannot tell", None, None)
        ] * 2


def test_an_endpoint_that_fails_ends_in_a_sentence_and_what_it_said_is_kept(
    audit: Audit, features: list[int], key: str
) -> None:
    endpoint = Endpoint(Truth(audit))
    with serve_endpoint(endpoint):
        chat = EndpointChat("wise", endpoint.url, retries=0)
        make_labels(audit, chat, features[:2])
        endpoint.refused = 401
        with pytest.raises(
            AuditError, match=r"refused a request to 'wise' \(401: .*not now.*what was answered is kept"
        ):
            make_labels(audit, chat, features)
        assert len(make_labels(audit, chat, features[:2])) == 2
    with pytest.raises(AuditError, match="cannot be reached"):
        make_labels(audit, EndpointChat("wise", endpoint.url, retries=0), features)


def test_a_key_is_needed_where_no_address_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(AuditError, match="There is no key in OPENAI_API_KEY"):
        EndpointChat("x")


def test_a_local_model_answers_as_generate_does(audit: Audit, features: list[int], model, tokenizer) -> None:
    asked = [ask_for_label(each) for each in make_exercises(audit, features)]
    chat = LocalChat(model, tokenizer, "tiny", batch_size=4)
    replies = list(chat.reply(asked, 5))
    for messages, reply in zip(asked, replies, strict=True):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        expected = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
        assert reply == tokenizer.decode(expected, skip_special_tokens=True)
    assert KeptReplies(chat).cost(asked, 5).known == 0
    assert KeptReplies(chat).reply(asked, 5) == replies
    cost = KeptReplies(chat).cost([*asked, [{"role": "user", "content": "x" * 400}]], 5)
    assert (cost.conversations, cost.known, cost.prompt_tokens, cost.reply_tokens) == (
        len(asked) + 1,
        len(asked),
        104,
        5,
    )
    with_other_weights = LocalChat(model, tokenizer, "tiny")
    with_other_weights.version = "other"
    assert KeptReplies(with_other_weights).cost(asked, 5).known == 0


def test_words_are_scored_without_a_judge(audit: Audit, features: list[int]) -> None:
    from trl_sae_audit.io.feature_labels import LabelSet
    from trl_sae_audit.saes.words import words_of

    found = score_labels(audit, LabelSet(audit.dictionary.name, audit.dictionary.identity), None, features)
    for exercise in make_exercises(audit, features):
        words = words_of(exercise.shown).split(" · ")
        said = [
            [
                any(f" {phrase} ".casefold() in f" {one_line(''.join(each))} ".casefold() for phrase in words)
                for each in part
            ]
            for part in (exercise.held_out, exercise.silent)
        ]
        expected = (sum(said[0]) / len(said[0]) + 1 - sum(said[1]) / len(said[1])) / 2
        score = found.labels[exercise.feature].words_detection
        assert score is not None
        assert score.accuracy == pytest.approx(expected)


def test_a_phrase_occurs_as_whole_words_and_at_its_place() -> None:
    words = "Great question! · you're right"
    context = ("Oh, GREAT  question", "!", " Let me see")
    assert phrase_occurs(words, context)
    assert phrase_occurs(words, context, at_place=True)
    assert not phrase_occurs(words, ("Great question! So ", "what", "?"), at_place=True)
    assert phrase_occurs(words, ("Great question! So ", "what", "?"))
    assert not phrase_occurs(words, ("a great questioning", "!", ""))
    assert not phrase_occurs("", context)


def test_scores_need_five_answers_of_either_kind() -> None:
    few = [(True, True)] * 4 + [(True, None)] * 9 + [(False, False)] * 10
    assert score_verdicts(few) is None
    found = score_verdicts([*few, (True, False)])
    assert found is not None
    assert (found.accuracy, found.active, found.silent) == (pytest.approx(0.9), 5, 10)


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ("praise for the question", "praise for the question"),
        ('\nLabel: "dates and years."\nThese …', "dates and years"),
        ("**Name:** flattery", "flattery"),
        ("1. 1. 3x + 10 = 5(x - 2)\n2. more", "3x + 10 = 5(x - 2)"),
        ("", ""),
        ("x" * 500, "x" * 120),
    ],
)
def test_names_in_replies(reply: str, label: str) -> None:
    assert read_label(reply) == label


def test_verdicts_in_replies() -> None:
    assert [read_verdict(reply) for reply in ("Yes", " **no**, because", "YES.", "Nobody", "maybe yes", "")] == [
        True, False, True, None, None, None,
    ]  # fmt: skip


def test_thoughts_are_no_part_of_a_reply() -> None:
    assert read_label("<think>\nName: no\n</think>\n\nName: praise") == "praise"
    assert read_verdict("<think>No, or</think> Yes") is True
    assert read_label("<think>\nthe texts are") == ""
    assert read_verdict("<think> yes") is None


def test_a_model_that_reasons_needs_room(audit: Audit, features: list[int], key: str) -> None:
    with serve_endpoint(Endpoint(lambda messages: "Yes", thinks=100)) as endpoint:
        with pytest.raises(AuditError, match=r"replied nothing within 32 tokens.*--thinking_tokens 4000"):
            make_labels(audit, EndpointChat("reasoning", endpoint.url), features[:1])
        chat = EndpointChat("reasoning", endpoint.url, thinking_tokens=100)
        (label,) = make_labels(audit, chat, features[:1])
        assert label.text == "Yes"
        assert endpoint.requests[-1]["max_completion_tokens"] == 132
        question = [{"role": "user", "content": "new"}]
        assert KeptReplies(chat).cost([question], 4).reply_tokens == 104


def test_everything_kept_survives_another_process(audit: Audit, tmp_path: Path, key: str) -> None:
    with serve_endpoint(Endpoint(lambda messages: "words")) as endpoint:
        replies = KeptReplies(EndpointChat("one", endpoint.url), tmp_path / "kept.sqlite")
        messages = [[{"role": "user", "content": str(number % 3)}] for number in range(9)]
        assert replies.reply(messages, 3) == ["words"] * 9
        assert len(endpoint.requests) == 3  # the same is asked once
    (tmp_path / "kept.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(AuditError, match=r"kept in .* cannot be used"):
        replies.reply(messages, 4)
