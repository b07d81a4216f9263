import pytest
import torch
from tiny_speech import make_examples, make_tokenizer

from models.data.manifest import Example
from models.speech_lm.collation import Collator, find_placeholder_id


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def example(**changes) -> Example:
    settings = dict(
        id="a",
        audio="a.wav",
        transcription="Where are you going?",
        task="gender",
        question="Is the speaker a man or a woman?",
        choices=("man", "woman"),
        target="The speaker is a man.",
    )
    return Example(**(settings | changes))


def choice_text(tokenizer, batch) -> str:
    return tokenizer.decode(batch.target[batch.choice_mask])


def test_row_is_prompt_audio_rest_and_target(tokenizer):
    batch = Collator(tokenizer, 3)([example()])
    placeholder = find_placeholder_id(tokenizer)
    ids = batch.input_ids[0].tolist()
    assert tokenizer.convert_ids_to_tokens(placeholder) == "<empty_output>"
    first = ids.index(placeholder)
    assert ids[first : first + 3] == [placeholder] * 3 and ids.count(placeholder) == 3
    assert (
        tokenizer.decode(ids[:first])
        == "Transcript: Where are you going?\nQuestion: Is the speaker a man or a woman?\n"
    )
    assert tokenizer.decode(ids[first + 3 : -1]) == "\nAnswer: The speaker is a man."
    assert ids[-1] == tokenizer.eos_token_id
    assert batch.attention_mask.all()


def test_target_index_points_at_the_position_before_each_target_token(tokenizer):
    batch = Collator(tokenizer, 3)(make_examples(5))
    length = batch.input_ids.shape[1]
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.target_index + 1], batch.target)
    assert torch.equal(batch.target_index // length, batch.target_row)
    for row in range(5):
        tokens = batch.target[batch.target_row == row]
        assert tokenizer.decode(tokens[:-1]) == " " + make_examples(5)[row].target
        assert tokens[-1] == tokenizer.eos_token_id
        end = batch.attention_mask[row].sum()
        assert (batch.target_index[batch.target_row == row][-1] + 1) % length == end - 1


def test_without_eos_and_without_target(tokenizer):
    batch = Collator(tokenizer, 3, append_eos=False)([example()])
    assert tokenizer.decode(batch.target) == " The speaker is a man."
    prompt = Collator(tokenizer, 3)([example(target=None)], with_target=False)
    assert len(prompt.target) == len(prompt.target_index) == len(prompt.choice_mask) == 0
    assert prompt.choice_mask.dtype == torch.bool and prompt.target.dtype == torch.int64
    assert tokenizer.decode(prompt.input_ids[0]).endswith("Answer:")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "man"),
        ({"target": "The speaker is a woman."}, "woman"),
        ({"target": "A man speaks."}, "man"),
        ({"choices": ("slowly", "quickly"), "target": "The speaker talks quickly."}, "quickly"),
        ({"choices": (), "answer": "woman", "target": "The speaker is a woman."}, "woman"),
    ],
)
def test_choice_mask_covers_the_choice_and_nothing_else(tokenizer, changes, expected):
    batch = Collator(tokenizer, 3)([example(**changes)])
    marked = choice_text(tokenizer, batch).strip()
    # Renderings may share letters ("man" and "woman"): what differs is marked, and it is in the choice.
    assert marked and marked in expected
    assert not batch.choice_mask[-1]


def test_choice_mask_marks_everything_where_the_target_names_no_choice(tokenizer):
    batch = Collator(tokenizer, 3)([example(target="I cannot tell.")])
    assert batch.choice_mask[:-1].all() and not batch.choice_mask[-1]


def test_choice_inside_another_word_is_no_mention(tokenizer):
    batch = Collator(tokenizer, 3)([example(choices=("man", "child"), target="The woman is a child.")])
    assert choice_text(tokenizer, batch).strip() in "child"


def test_special_tokens_in_data_stay_text(tokenizer):
    text = "He said <empty_output> and <|im_end|> twice"
    batch = Collator(tokenizer, 3)([example(transcription=text)])
    ids = batch.input_ids[0].tolist()
    assert ids.count(find_placeholder_id(tokenizer)) == 3
    assert ids.count(tokenizer.eos_token_id) == 1
    assert text in tokenizer.decode(ids)


def test_text_only_example_is_marked_absent(tokenizer):
    features = torch.zeros(2, 2, 5, 16)
    batch = Collator(tokenizer, 3)([example(), example(audio=None)], features)
    assert batch.audio_present.tolist() == [True, False]
    assert Collator(tokenizer, 3)([example()]).audio_present.tolist() == [False]


def test_a_row_with_several_clips_is_refused(tokenizer):
    with pytest.raises(ValueError, match="example 'two': clips: expected one with a SpeechLM, got 2"):
        Collator(tokenizer, 3)([example(id="two", audio="a.flac", more_audio=("b.flac",))])


def test_padding_to_a_multiple(tokenizer):
    batch = Collator(tokenizer, 3, pad_to_multiple_of=16)(make_examples(3))
    assert batch.input_ids.shape[1] % 16 == 0
    assert torch.equal(batch.input_ids.flatten()[batch.target_index + 1], batch.target)


def test_to_moves_every_tensor(tokenizer):
    batch = Collator(tokenizer, 3)([example()]).to("meta")
    assert batch.ids == ["a"] and batch.audio_features is None
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}


def test_bad_example_is_named(tokenizer):
    with pytest.raises(ValueError, match="example 'a': expected a target"):
        Collator(tokenizer, 3)([example(target=None)])


def test_bad_arguments_are_named(tokenizer):
    with pytest.raises(ValueError, match="num_queries: expected >= 1, got 0"):
        Collator(tokenizer, 0)
    with pytest.raises(ValueError, match="examples: expected at least one"):
        Collator(tokenizer, 3)([])
    with pytest.raises(ValueError, match="features: expected 1 rows"):
        Collator(tokenizer, 3)([example()], torch.zeros(2, 2, 5, 16))
    with pytest.raises(ValueError, match=r"example 'a': .* tokens, expected at most 5"):
        Collator(tokenizer, 3, max_tokens=5)([example()])


def test_tokenizer_without_a_spare_token_is_refused(tokenizer):
    class Plain:
        bos_token = eos_token = pad_token = unk_token = "<s>"
        all_special_tokens = ("<s>", "<|im_start|>")

        def get_vocab(self):
            return {"<s>": 0, "<|im_start|>": 1}

    with pytest.raises(ValueError, match="placeholder_token"):
        find_placeholder_id(Plain())
