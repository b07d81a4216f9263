"""Arguments of `features`."""

from __future__ import annotations

from models.arguments import Parser


def features_parser() -> Parser:
    parser = Parser(prog="python -m models features", description="Run every clip through the frozen audio encoder once.")
    parser.add_argument("manifest")
    parser.add_argument("--model", required=True, help="SpeechLM folder whose encoder is used")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--audio-root", help="folder of the audio (default: the manifest's)")
    parser.add_argument("--batch-clips", type=int, default=8, help="clips read and encoded at once")
    return parser
