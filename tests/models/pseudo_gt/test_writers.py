"""Stage 1: the language model that writes the answers."""

from __future__ import annotations

import torch

from models.pseudo_gt.wording import describe, worked_examples
from models.pseudo_gt.writers import BackboneWriter
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
