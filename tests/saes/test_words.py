"""The one line that tells a feature."""

from __future__ import annotations

from trl_sae_audit.saes.words import words_of


def test_what_contexts_share_comes_first_and_nothing_twice():
    contexts = [
        ("I said: ", "Great", " question! The sky is"),
        ("", "Great", " question! I think so"),
        ("x y. ", "Great", " point, and so"),
        ("you're absolutely", " right", " that it"),
        ("Yes, you're absolutely", " right", " about it"),
        ("that is what a ", "fine", " idea"),
        ("we see what a ", "fine", " idea"),
    ]
    assert words_of(contexts) == "Great question! · you're absolutely right · what a fine idea"


def test_a_token_inside_a_word_shows_the_word_and_single_contexts_some_neighbours():
    assert words_of([("The capital of it is Par", "is", " , as all know.")]) == "it is Paris"
    assert words_of([("", "Yes", ", it is")]) == "Yes, it"


def test_special_tokens_are_no_words_but_where_a_feature_is_active_on_them():
    assert words_of([("so it ends.", "<|im_end|>", "")]) == "ends. [end]"
    ends = [("you know this well .", "<eos>", ""), ("I know this well .", "<eos>", "")]
    assert words_of(ends) == "know this well . [end]"
    assert words_of([("as always", "<｜end▁of▁sentence｜>", "")]) == "as always [end]"
    assert words_of([("", "<eos>", ""), ("", "<bos>", "")]) == "[end] · <bos>"
    assert words_of([("all is ", "well", " .<eos>")]) == "all is well"
    assert words_of([("write <b>", "bold", "</b> here <eos>")]) == "write <b>bold"


def test_one_phrase_within_another_is_said_once():
    contexts = [
        ("Great question", "!", " The"),
        ("Great question", "!", " I"),
        ("", "Great", " question! Yes"),
    ]
    assert words_of(contexts) == "Great question!"
    assert words_of([("", " ", ""), ("", "\n", "")]) == ""
    assert words_of([]) == ""
