"""Arguments of `features`."""

from __future__ import annotations

from models.arguments import Parser

# What makes the encoder's input, see models/speech_lm/log_mel.py.
LOG_MELS = ("processor", "torch", "torchaudio")
RESAMPLERS = ("soxr", "torchaudio")  # soxr on the CPU; torchaudio on the encoder's device, see models/speech_lm/resampling.py


def features_parser() -> Parser:
    parser = Parser(prog="python -m models features", description="Run every clip through the frozen audio encoder once.")
    parser.add_argument("manifest", help="manifest, or rows of another form (docs/data.md), whose clips are encoded")
    parser.add_argument("--model", required=True, help="folder of a SpeechLM; its encoder is used")
    parser.add_argument("--out", required=True, help="folder for shards, or a .safetensors file, to write")
    parser.add_argument("--audio-root", help="folder of the audio (default: the manifest's)")
    parser.add_allow_links()
    parser.add_hears("the clips are heard with noise, in a band or through a codec")
    parser.add_argument("--part", default="0/1", help="I/N: encode every N-th clip from the I-th on, beside other processes")
    parser.add_argument("--batch-clips", type=int, default=8, help="clips that are read and encoded together")
    parser.add_argument("--backend", choices=LOG_MELS, default="processor", help="what makes log-mel spectrograms")
    parser.add_argument(
        "--resampler", choices=RESAMPLERS, default="soxr", help="soxr on the CPU, or torchaudio on the encoder's device"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda ... of the encoder")
    parser.add_argument(
        "--max-cut-fraction", type=float, default=1.0, help="share of clips longer than the model's window above which it stops"
    )
    return parser
