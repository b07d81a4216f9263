"""A speech LM of random weights, a few thousand parameters and no files: what the tests of models/ run on."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from models.data.manifest import Example
from models.speech_lm.model import SpeechLM, SpeechLMConfig

TEXTS = [
    "Transcript: Where are you going so late?",
    "Question: Is the speaker a man or a woman?",
    "Note: the speaker is a man. The speaker is a woman.",
    "Answer: The speaker talks slowly. The speaker talks quickly.",
]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of about 350 tokens, with an unused special token for the audio positions."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<empty_output>"]
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        extra_special_tokens=special,
    )


def make_lm(tokenizer: PreTrainedTokenizerFast, *, layers: int = 4, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of width 32 with grouped queries and a tied head, its weights large enough to make tokens matter."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


def make_encoder(*, seed: int = 1) -> tuple[WhisperEncoder, WhisperFeatureExtractor]:
    """Three layers of width 16 over 80 mel bands."""
    torch.manual_seed(seed)
    config = WhisperConfig(
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=80,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
    )
    return WhisperEncoder(config).eval(), WhisperFeatureExtractor(feature_size=80)


def make_config(**changes) -> SpeechLMConfig:
    settings = {
        "lm": "tiny/lm",
        "encoder": "tiny/encoder",
        "encoder_layers": (1, 2),
        "encoder_dim": 16,
        "max_audio_seconds": 1.0,
        "audio_frames": 5,
        "num_queries": 3,
        "connector_width": 16,
        "connector_heads": 2,
    }
    return SpeechLMConfig(**(settings | changes))


class TinyBackbones:
    """Resolver: the tiny backbones under any name that begins with "tiny/"; counts what is loaded."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    def load_causal_lm(self, spec: str, *, dtype: torch.dtype):
        self.loaded.append(spec)
        tokenizer = make_tokenizer()
        return make_lm(tokenizer).to(dtype), tokenizer

    def load_speech_encoder(self, spec: str):
        self.loaded.append(spec)
        return make_encoder()


def make_speech_lm(**changes) -> SpeechLM:
    torch.manual_seed(2)
    return SpeechLM.from_config(make_config(**changes), resolver=TinyBackbones())


def make_examples(count: int = 4) -> list[Example]:
    """Prompts of different lengths, every other one with a hint."""
    return [
        Example(
            id=f"e{number}",
            audio=f"{number}.wav",
            transcription="Where are you going" + " so late" * (number % 3) + "?",
            context="Note: the speaker is a man." if number % 2 else "",
            task="gender",
            question="Is the speaker a man or a woman?",
            choices=("man", "woman"),
            answer=("man", "woman")[number // 2 % 2],
            target=f"The speaker is a {('man', 'woman')[number // 2 % 2]}.",
        )
        for number in range(count)
    ]


def make_features(model: SpeechLM, count: int, *, seed: int = 3) -> torch.Tensor:
    shape = model.connector.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, shape.num_feature_layers, shape.num_frames, shape.feature_dim, generator=generator)
