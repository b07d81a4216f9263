"""What the three examples share: a task of tones, a tiny audio LM, one function that makes a batch, and the common options.

The task: a second of sound is a high tone or a low one, in noise, and the model is asked which. For data of your own, replace
`tones` with a function that returns a list of `Sample`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

SAMPLE_RATE = 16_000
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]


def parser(description: str, *, learning_rate: float, batch: int) -> argparse.ArgumentParser:
    """A parser with the options of every example. `learning_rate` and `batch` are the defaults of two of them."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--teacher", default="tiny", help="id or folder of an audio LM of transformers (default: tiny, random)")
    made.add_argument("--student", default="tiny", help="as --teacher; a smaller model with the same tokenizer")
    made.add_argument("--alpha", type=float, default=1.0, help="strength of the contrast (default: 1)")
    made.add_argument("--kd-weight", type=float, default=0.5, help="share of the distillation term (default: 0.5)")
    rate = f"learning rate of AdamW (default: {learning_rate:g})"
    made.add_argument("--learning-rate", type=float, default=learning_rate, help=rate)
    made.add_argument("--batch", type=int, default=batch, help=f"samples in one backward pass (default: {batch})")
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    made.add_argument("--seed", type=int, default=0, help="seed of weights, clips and their order (default: 0)")
    return made


@dataclass(frozen=True)
class Sample:
    """One question about one clip; `answer` is the pseudo ground truth Y."""

    id: str
    wave: np.ndarray  # float32, 16 kHz
    question: str
    answer: str


def tones(count: int, seed: int) -> list[Sample]:
    """Clips of one second, high and low in turn."""
    draw = np.random.default_rng(seed)
    seconds = np.arange(SAMPLE_RATE, dtype=np.float32) / SAMPLE_RATE
    samples = []
    for number in range(count):
        word, hertz = (("high", 1200.0), ("low", 300.0))[number % 2]
        tone = np.sin(2 * np.pi * hertz * draw.uniform(0.9, 1.1) * seconds)
        wave = (0.3 * tone + 0.1 * draw.standard_normal(SAMPLE_RATE)).astype(np.float32)
        samples.append(Sample(f"clip-{number}", wave, "Is the tone high or low?", f"The tone is {word}."))
    return samples


def batches(samples: list[Sample], size: int, seed: int) -> list[list[Sample]]:
    """The samples of one epoch in a random order, `size` in a batch; the last batch may be smaller."""
    order = np.random.default_rng(seed).permutation(len(samples))
    return [[samples[i] for i in order[start : start + size]] for start in range(0, len(samples), size)]


def encode(processor: Any, samples: list[Sample], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """A batch of the model's inputs with Y forced, and `labels`: -100 everywhere but at the tokens of Y.

    Prompts are padded on the left and answers on the right, so that the two can be laid side by side.
    """
    prompts = []
    for sample in samples:
        content = [{"type": "audio", "audio": sample.id}, {"type": "text", "text": sample.question}]
        chat = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        text=prompts, audio=[sample.wave for sample in samples], sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt"
    )
    processor.tokenizer.padding_side = "right"
    end = processor.tokenizer.eos_token
    answers = processor.tokenizer(
        [sample.answer + end for sample in samples], add_special_tokens=False, padding=True, return_tensors="pt"
    )
    labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
    batch = dict(inputs)
    batch["labels"] = torch.cat([torch.full_like(inputs["input_ids"], -100), labels], dim=1)
    for name in ("input_ids", "attention_mask"):
        batch[name] = torch.cat([inputs[name], answers[name]], dim=1)
    return {name: value.to(device) for name, value in batch.items()}


def load(name: str, *, seed: int, width: int = 32, device: str = "cpu") -> tuple[Any, Any]:
    """An audio LM of transformers and its processor.

    Args:
        name: a model's id or folder, or "tiny": a random Qwen2-Audio with hidden states of `width`, made here.
        seed: of the tiny model's weights.
    """
    from transformers import AutoModelForMultimodalLM, AutoProcessor, set_seed

    if name == "tiny":
        set_seed(seed)
        return _tiny_model(width).to(device), _tiny_processor()
    model = AutoModelForMultimodalLM.from_pretrained(name, dtype=torch.bfloat16, trust_remote_code=False)
    return model.to(device), AutoProcessor.from_pretrained(name, trust_remote_code=False)


def _tiny_model(width: int) -> Any:
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    audio = {
        "model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4,
        "encoder_ffn_dim": 64, "num_mel_bins": 80, "max_source_positions": 50,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": 256 + len(SPECIAL_TOKENS), "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.1,  # wide: then the sound changes what the random teacher answers
    }  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_id=SPECIAL_TOKENS.index("<|AUDIO|>"))
    return Qwen2AudioForConditionalGeneration(config)


def _tiny_processor() -> Any:
    """One token a byte, and Whisper's log-mel features of one second."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2AudioProcessor, WhisperFeatureExtractor

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL_TOKENS + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL_TOKENS[0], pad_token=SPECIAL_TOKENS[0],
        additional_special_tokens=SPECIAL_TOKENS[1:],
    )  # fmt: skip
    return Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=80, chunk_length=1), wrapped)
