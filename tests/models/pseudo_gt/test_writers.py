"""Stage 1: the language model that writes the answers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from models.pseudo_gt.wording import describe, worked_examples
from models.pseudo_gt.writers import Answer, BackboneWriter, has_ended
from tests.models.lm_families import make_family
from tests.models.pseudo_gt.test_stage1 import gender


class _Characters:
    """A tokenizer of single characters, with a token of its own for the end of a line."""

    eos_token_id, pad_token_id = 1, 0

    def encode(self, text, *, add_special_tokens=True):
        return [2 + ord(c) % 94 if c != "\n" else 97 for c in text]

    def batch_decode(self, rows, *, skip_special_tokens):
        return [
            "".join("\n" if t == 97 else chr(94 + (int(t) - 2 - 94 % 94) % 94) for t in row if t > 1) for row in rows
        ]


_SIZES = {
    "vocab_size": 98, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
}  # fmt: skip
EXAMPLES = [
    gender(1),
    gender(2, "woman", transcription="A much longer line than the first one was."),
    *(gender(number, transcription="Go. " * (number % 4)) for number in range(4, 14)),
    gender(3, task="content", question="Which word is spoken, cat or dog?", choices=("cat", "dog"), answer=None),
]


def _tiny(family, **config):
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**_SIZES, **config})).eval()
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.3)  # wide enough for what is attended to to decide the answer
    return model


def _greedily(model, tokenizer, example, tokens):
    """Text of one answer and whether it ended; everything is computed again for each token."""
    end = describe(example)
    if example.task == "content":
        end = f"Question: {example.question}\n{end}"
    ids = torch.tensor([tokenizer.encode(worked_examples(example) + end + " ->")])
    answer = []
    with torch.no_grad():
        for _ in range(tokens):
            token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
            if token in (1, 97):
                break
            answer.append(token)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    text = tokenizer.batch_decode([answer], skip_special_tokens=True)[0].strip().split("\n")[0].strip()
    return text, len(answer) < tokens


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 16}),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 1}),
        ("mistral", {"sliding_window": 4000}),
        ("gpt_neo", {"num_layers": 6, "num_heads": 4, "window_size": 16, "attention_types": [[["global", "local"], 3]]}),
    ],
)
def test_answers_in_a_batch_are_those_of_each_row_alone_without_a_cache(family, config):
    model, tokenizer = _tiny(family, **config), _Characters()
    writer = BackboneWriter(model, tokenizer, max_new_tokens=8)
    expected = [_greedily(model, tokenizer, example, 8) for example in EXAMPLES]
    answers = writer(EXAMPLES)
    assert [(str(answer), answer.ended) for answer in answers] == expected
    assert list(map(str, writer(EXAMPLES))) == [text for text, _ in expected]  # the shared states stay as they were
    writer._window = float("inf")
    padded = [str(answer) for answer in writer(EXAMPLES)]
    assert (padded != [text for text, _ in expected]) == (16 in config.values()), "padding that the test must notice"
    assert len({text for text, _ in expected}) > 1


@pytest.mark.parametrize("name", ["FalconH1", "Qwen3Next", "Mamba", "Lfm2"])
def test_a_model_with_other_states_than_keys_and_values(name):
    model, tokenizer = make_family(name, 98), _Characters()
    expected = [_greedily(model, tokenizer, example, 3) for example in EXAMPLES[:4]]
    writer = BackboneWriter(model, tokenizer, max_new_tokens=3)
    assert [(str(answer), answer.ended) for answer in writer(EXAMPLES[:4])] == expected


@pytest.mark.parametrize(
    ("family", "length", "rope"),
    [
        ("phi3", 4096, {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}),
        ("llama", 520, {"rope_type": "dynamic", "factor": 4.0}),
    ],
)
def test_positions_that_follow_the_longest_text_of_a_batch(family, length, rope):
    """No answer depends on who else is in the batch."""
    original = {"original_max_position_embeddings": 520}
    model = _tiny(family, max_position_embeddings=length, rope_parameters={"rope_theta": 1e4, **rope, **original}, **original)
    tokenizer = _Characters()
    writer = BackboneWriter(model, tokenizer, max_new_tokens=8)
    short = [gender(number) for number in range(4)]
    assert [(str(answer), answer.ended) for answer in writer(short)] == [_greedily(model, tokenizer, e, 8) for e in short]
    with pytest.raises(ValueError, match=f"expected texts of at most 520 tokens.*{rope['rope_type']}"):
        writer([*short, gender(4, transcription="Go. " * 40)])


class _Writes:
    """A model that writes the given tokens, and then the padding."""

    def __init__(self, rows, **named):
        from transformers import LlamaConfig

        self.rows = rows
        self.config = LlamaConfig(**_SIZES)
        self.generation_config = type("Generation", (), named)()
        self.stop = None

    def forward(self, past_key_values=None):
        raise NotImplementedError

    def generate(self, *, input_ids, eos_token_id, **_):
        self.stop = eos_token_id
        width = max(map(len, self.rows))
        rows = [row + [0] * (width - len(row)) for row in self.rows]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_an_answer_says_whether_it_ended():
    a, line_end, text_end, other_end = 2 + ord("a") % 94, 97, 1, 50
    model = _Writes([[a, a, a, a], [a, line_end], [a, a, text_end], [a, a, other_end]], eos_token_id=[1, other_end])
    writer = BackboneWriter(model, _Characters(), max_new_tokens=4)
    ids = torch.zeros(1, 1, dtype=torch.int64)
    writer._prefixes = SimpleNamespace(expanded=lambda prefix, rows: (ids, None), length=lambda prefix: 1)
    answers = writer([gender(number) for number in range(4)])
    assert [answer.ended for answer in answers] == [False, True, True, True]
    assert model.stop == [1, 50, 97]  # the model names a second end of text


@pytest.mark.parametrize(
    ("text", "ended"), [(" a man", False), (" a man.\n\nQuestion", True), ("\n a man", False), (" a man.\n", True)]
)
def test_a_line_end_within_a_token_ends_an_answer_too(text, ended):
    writer = BackboneWriter(_Writes([]), _Characters())
    assert has_ended(writer._answer(text, [2, 3])) == ended
    assert writer._answer(text, [2, 3]) == text.strip().split("\n")[0].strip()


def test_half_a_character_has_not_ended():
    assert not has_ended("It is the caf\ufffd") and not has_ended(Answer("It is the caf\ufffd ")) and has_ended("caf\u00e9")
    with pytest.raises(ValueError, match="max_new_tokens: expected at least 1, got 0"):
        BackboneWriter(_Writes([]), _Characters(), max_new_tokens=0)


def test_backbone_writer_in_batches_equals_one_by_one_without_any_cache():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=98, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=1.0)
    tokenizer = _Characters()
    writer = BackboneWriter(model, tokenizer, max_new_tokens=8)
    examples = [
        gender(1),
        gender(2, "woman", transcription="A much longer line than the first one was."),
        gender(3, task="content", question="Which word is spoken, cat or dog?", choices=("cat", "dog"), answer=None),
    ]
    expected = []
    for example in examples:
        end = describe(example)
        if example.task == "content":
            end = f"Question: {example.question}\n{end}"
        ids = torch.tensor([tokenizer.encode(worked_examples(example) + end + " ->")])
        answer = []
        with torch.no_grad():
            for _ in range(8):  # greedy, everything computed again for each token
                token = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
                if token in (1, 97):
                    break
                answer.append(token)
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
        expected.append(tokenizer.batch_decode([answer], skip_special_tokens=True)[0].strip().split("\n")[0].strip())
    assert writer(examples) == expected
    assert writer(examples) == expected  # the shared keys and values are as they were
