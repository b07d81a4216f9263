"""Whether a text names an answer: by words, per script, and by symbols where words do not tell the choices apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.answers import (
    check_choices,
    lenient_match,
    named_choices,
    normalize,
    plain_words,
    same_choice,
    strict_match,
)


@given(st.text(alphabet=st.characters(max_codepoint=0x24F, exclude_categories=["Mn", "Cc", "Cs"]), max_size=40))
def test_latin_text_is_normalised_as_whispers_basic_normaliser_does(text):
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    assert normalize(text) == BasicTextNormalizer()(text).strip()


@pytest.mark.parametrize(
    ("text", "choices", "named"),
    [
        ("这是一个男性的声音。", ("男性", "女性"), ["男性"]),
        ("说话的人是女性", ("男性", "女性"), ["女性"]),
        ("话者は女性です。", ("男性", "女性"), ["女性"]),
        ("とてもうれしいです", ("うれしい", "かなしい"), ["うれしい"]),
        ("ผู้พูดเป็นผู้หญิง", ("ผู้ชาย", "ผู้หญิง"), ["ผู้หญิง"]),
        ("वक्ता एक लड़की है।", ("लड़का", "लड़की"), ["लड़की"]),
        ("말하는 사람은 남자입니다.", ("남자", "여자"), ["남자"]),
        ("他说得不快", ("快", "不快"), ["不快"]),
        ("The speaker is 男性.", ("男性", "女性"), ["男性"]),
        ("这是狗", ("猫", "狗", "鸟"), ["狗"]),
        ("Говорит женщина.", ("мужчина", "женщина"), ["женщина"]),
        ("C'est une voiture.", ("voiture", "train"), ["voiture"]),
    ],
)
def test_answers_are_found_in_every_script(text, choices, named):
    assert named_choices(text, choices) == named
    for choice in choices:
        assert lenient_match(text, choice, choices) == (choice in named or choice == "快" == text[-1])
        assert strict_match(text, choice, choices) == ([choice] == named)


def test_vowel_marks_are_letters():
    assert normalize("लड़का") != normalize("लड़की")
    assert not lenient_match("वक्ता एक लड़का है", "लड़की")
    assert plain_words("กี่") == ["กี่"]  # a consonant and its two marks are one character


@pytest.mark.parametrize(
    ("choices", "said", "chosen"),
    [
        (("C major", "C# major"), "The chord is C# major.", "C# major"),
        (("C major", "C# major"), "It is C major", "C major"),
        (("(laughter)", "(cough)"), "I hear (cough).", "(cough)"),
        (("[music]", "[noise]"), "[music]", "[music]"),
        (("C", "C++"), "It is written in C++.", "C++"),
        (("+", "-"), "the sign is -", "-"),
        (("Polish", "polish"), "It is Polish.", "Polish"),
        (("3", "-3"), "The answer: -3.", "-3"),
    ],
)
def test_choices_that_words_do_not_tell_apart_are_compared_with_their_symbols(choices, said, chosen):
    assert named_choices(said, choices) == [chosen]
    for choice in choices:
        assert lenient_match(said, choice, choices) == strict_match(said, choice, choices) == (choice == chosen)
        assert same_choice(choice, chosen, choices) == (choice == chosen)


@pytest.mark.parametrize(
    ("choices", "message"),
    [(("yes", "yes."), "'yes' and 'yes.' cannot be told apart"), (("a", "  "), "'  ' has no word that an answer could name")],
)
def test_choices_that_nothing_tells_apart_are_refused(choices, message):
    with pytest.raises(ValueError, match=message):
        check_choices(choices)


def test_a_label_in_another_case_than_its_choice_is_that_choice():
    assert lenient_match("a woman", "Woman", ("man", "woman")) and strict_match("a woman", "Woman", ("man", "woman"))
    assert not lenient_match("a man", "Woman", ("man", "woman"))


@pytest.mark.parametrize("label", ["", " \n"])
@pytest.mark.parametrize("choices", [(), ("man", "woman")])
def test_an_empty_label_is_named_by_no_text(label, choices):
    for text in ("", "man", "It is nothing."):
        assert not lenient_match(text, label, choices) and not strict_match(text, label, choices)


def test_words_taken_out_for_a_longer_choice_do_not_join_their_neighbours():
    assert named_choices("very very fast fast", ("very fast", "fast")) == ["very fast", "fast"]
    assert named_choices("the quite slow one", ("the one", "quite slow")) == ["quite slow"]
