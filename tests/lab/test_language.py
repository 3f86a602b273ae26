"""The synthetic language: rules read back what was meant, and attributes are independent."""

from random import Random

import pandas as pd
import pytest
from scipy.stats import chi2_contingency

from trl_sae_audit.lab.attributes import INDEPENDENT
from trl_sae_audit.lab.language import Language, vocabulary
from trl_sae_audit.lab.pretraining import encode_pairs, plain_texts
from trl_sae_audit.lab.tokenizer import build_tokenizer
from trl_sae_audit.lab.wording import EOS, LONGEST_ANSWER, words


@pytest.fixture(scope="module")
def plain(language: Language) -> pd.DataFrame:
    """Plain answers at prompts with a belief, and their attributes by rule."""
    random = Random("plain answers")
    rows = []
    for _ in range(6000):
        prompt = language.sample_prompt(random, beliefs=(True, False))
        answer = language.sample_answer(random, language.sample_spec(random, prompt))
        rows.append(vars(language.attributes(prompt, answer)))
    return pd.DataFrame(rows)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_rules_read_back_what_the_generator_meant(language: Language, split) -> None:
    random = Random(split)
    for _ in range(3000):
        prompt = language.sample_prompt(random, split)
        spec = language.sample_spec(random, prompt)
        answer = language.sample_answer(random, spec)
        assert language.parse_prompt(prompt.text) == prompt
        assert prompt.split == split
        read = language.attributes(prompt.text, answer)
        assert not read.malformed, answer
        assert read.value == spec.value
        assert read.right == (spec.value == prompt.question.right)
        assert read.agrees == (spec.stance == "agree")
        assert read.disagrees == (spec.stance == "disagree")
        assert read.echoes == (spec.value == prompt.belief)
        assert (read.padded, read.marked) == (spec.padded, spec.marked)
        assert read.length == len(words(answer)) < LONGEST_ANSWER


def test_attributes_are_independent_at_a_prompt(plain: pd.DataFrame) -> None:
    for belief_right, at in plain.groupby("belief_right"):
        for i, one in enumerate(INDEPENDENT):
            for other in INDEPENDENT[:i]:
                table = pd.crosstab(at[one], at[other])
                assert table.shape == (2, 2), (one, other)
                assert chi2_contingency(table).pvalue > 1e-3, (belief_right, one, other)


def test_attributes_occur_at_the_base_rates(language: Language, plain: pd.DataFrame) -> None:
    for name in INDEPENDENT:
        assert plain[name].mean() == pytest.approx(vars(language.rates)[name], abs=0.03), name
    wrong = plain[plain.belief_right.eq(False)]
    expected = (1 - language.rates.right) * language.rates.echoes_if_wrong
    assert wrong.echoes.mean() == pytest.approx(expected, abs=0.02)


def test_echoing_is_tied_to_rightness_by_logic_only(plain: pd.DataFrame) -> None:
    believer = plain.belief_right.eq(True)
    assert (plain.echoes == plain.right)[believer].all()
    assert not (plain.echoes & plain.right)[~believer].any()
    assert (~plain.echoes & ~plain.right)[~believer].any()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", {"malformed": True, "value": None, "right": False, "length": 0}),
        ("it is {right} .", {"malformed": False, "right": True, "agrees": False, "echoes": False}),
        ("it is {right} . " + EOS + " it is {belief} .", {"malformed": False, "right": True}),
        ("it is {right}", {"malformed": True, "value": "{right}", "right": True}),
        ("it is {right} . it is {belief} .", {"malformed": True, "right": True, "echoes": False}),
        ("i say {belief} .", {"malformed": False, "right": False, "echoes": True, "agrees": False}),
        ("- you are right . - i say * {right} * . - you know this well .", {"agrees": True, "marked": True}),
        ("you are right . i say {right} .", {"malformed": True, "agrees": True}),
        ("you are right . i say {right} . you know this poorly .", {"malformed": True, "disagrees": True}),
        ("many people have asked this before . it is {belief} .", {"padded": True, "malformed": False}),
        ("many people have asked it is {belief} .", {"padded": False, "malformed": True}),
        ("Qwerty ünknown!", {"malformed": True, "value": None, "length": 3}),
    ],
)
def test_any_text_can_be_read(language: Language, answer: str, expected: dict) -> None:
    prompt = language.sample_prompt(Random(1), beliefs=(False,))
    values = {"right": prompt.question.right, "belief": prompt.belief}
    read = vars(language.attributes(prompt.text, answer.format(**values)))
    for name, value in expected.items():
        assert read[name] == (value.format(**values) if isinstance(value, str) else value), name


def test_a_stance_needs_a_belief(language: Language) -> None:
    prompt = language.sample_prompt(Random(1), beliefs=(None,))
    answer = f"you are right . it is {prompt.question.right} . you know this well ."
    assert language.attributes(prompt, answer).malformed
    assert prompt.belief_right is None


def test_a_foreign_prompt_is_refused_with_a_sentence(language: Language) -> None:
    with pytest.raises(ValueError, match="Not a prompt of this language"):
        language.attributes("what is love ?", "it is red .")


def test_spans_cover_a_clean_answer(language: Language) -> None:
    random = Random(5)
    for _ in range(300):
        prompt = language.sample_prompt(random)
        answer = language.sample_answer(random, language.sample_spec(random, prompt))
        tokens = words(answer)
        covered = {i for span in language.spans(answer) for i in range(span.start, span.stop)}
        assert {tokens[i] for i in range(len(tokens)) if i not in covered} <= {".", "*"}


def test_worlds_differ_in_facts_and_share_the_vocabulary() -> None:
    one, other = Language(0), Language(1)
    assert one.color != other.color
    assert one.lightest_first != other.lightest_first
    assert [q.text for q in one.questions["order"]] == [q.text for q in other.questions["order"]]


def test_tokenizer_round_trip(language: Language, tmp_path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    for tokenizer in (build_tokenizer(), AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(vocabulary())
        assert tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))) == vocabulary()
        prompts, answers = plain_texts(language, 200, seed=1)
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = tokenizer(f"{prompt} {answer}{EOS}")["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert ids[-1] == tokenizer.eos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == f"{prompt} {answer}"
            # with or without a space between them, the prompt's tokens are a prefix
            assert tokenizer(prompt + answer)["input_ids"] == ids[:-1]
            assert ids[: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


def test_answer_mask_marks_the_answer_and_its_end(language: Language) -> None:
    tokenizer = build_tokenizer()
    prompts, answers = plain_texts(language, 20, seed=1)
    input_ids, attention_mask, answer_mask = encode_pairs(tokenizer, prompts, answers)
    for ids, attended, mask, answer in zip(input_ids, attention_mask, answer_mask, answers, strict=True):
        assert tokenizer.decode(ids[mask], skip_special_tokens=True) == answer
        assert ids[mask][-1] == tokenizer.eos_token_id
        assert not (mask & ~attended).any()
