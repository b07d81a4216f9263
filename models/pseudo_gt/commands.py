"""Arguments of `pseudo-gt`."""

from __future__ import annotations

from pathlib import Path

from models.arguments import Parser
from models.audio_lms.settings import DTYPES, FORMULAS

DEFAULT_BACKBONE = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCES = ("text_backbone", "template", "audio_lm")
ACCEPTS = ("choice", "free")
DEFAULT_MAX_NEW_TOKENS = 24
DEFAULT_MAX_CHARACTERS = 160
# Of an audio LM's free answers.
FREE_MAX_NEW_TOKENS = 256
FREE_MAX_CHARACTERS = 2000


def default_limits(source: str) -> tuple[int, int, int, str]:
    """(max_new_tokens, max_characters, batch_examples, accept) of a source, where nothing else is asked for."""
    if source == "audio_lm":
        return FREE_MAX_NEW_TOKENS, FREE_MAX_CHARACTERS, 16, "free"
    return DEFAULT_MAX_NEW_TOKENS, DEFAULT_MAX_CHARACTERS, 64, "choice"


def pseudo_gt_parser() -> Parser:
    parser = Parser(
        prog="python -m models pseudo-gt", description="Stage 1: write the answers that the student learns from."
    )
    parser.add_argument("manifest", type=Path, help="manifest, or rows of another form (docs/data.md)")
    parser.add_argument("--out", type=Path, required=True, help="manifest to write; one of other settings needs --restart")
    parser.add_argument(
        "--source",
        default="text_backbone",
        choices=SOURCES,
        help="who writes the answers: a language model that reads the metadata, a sentence for each task (only for rows with "
        "choices), or a model that hears the clips",
    )
    parser.add_argument("--backbone", help=f"id or folder of a causal language model (default: {DEFAULT_BACKBONE})")
    parser.add_argument(
        "--audio-lm", metavar="MODEL", help="audio_lm: hub id or folder of an audio LM of transformers, or SpeechLM folder"
    )
    parser.add_argument("--alpha", type=float, help="audio_lm: contrastive decoding with this strength (default: greedy)")
    parser.add_argument("--formula", choices=FORMULAS, help="audio_lm: of contrastive decoding (default: extrapolate)")
    parser.add_argument(
        "--plausibility",
        type=float,
        help="audio_lm: contrastive decoding keeps tokens with this share of the best one's probability, in (0, 1]",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="audio_lm: of the weights (default: auto)")
    parser.add_argument("--attention", help="audio_lm: transformers' attn_implementation, such as flash_attention_2")
    parser.add_argument("--device", help="audio_lm: auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_hears("audio_lm: it hears and reads other things than the clip and the prompt as they are")
    parser.add_comma_list(
        "--splits", default="train,dev", help="comma-separated splits that get answers; the others are copied"
    )
    parser.add_list("--pool", nargs=1, help='only rows with this metadata["pool"]; may be repeated; the others are copied')
    parser.add_list("--task", nargs=1, help="only rows of this task; may be repeated; the others are copied")
    parser.add_argument(
        "--keep-targets", action="store_true", help="rows that have a target keep it (default: they get a new one)"
    )
    parser.add_argument(
        "--batch-examples", type=int, help="rows that the backbone or the audio LM reads at once (default: 64; audio_lm: 16)"
    )
    parser.add_argument(
        "--accept",
        choices=ACCEPTS,
        help="which answers become targets: choice = those that name one choice, the right one if it is known; free = those that "
        "end and do not repeat themselves (default: choice; audio_lm: free)",
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=float,
        default=0.5,
        help="share of rejected answers above which no manifest is written; without any row none is written",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help="longest answer; one that does not end within these tokens is rejected "
        f"(default: {DEFAULT_MAX_NEW_TOKENS}; audio_lm: {FREE_MAX_NEW_TOKENS})",
    )
    parser.add_argument(
        "--max-characters",
        type=int,
        help=f"a longer answer is rejected (default: {DEFAULT_MAX_CHARACTERS}; audio_lm: {FREE_MAX_CHARACTERS})",
    )
    parser.add_argument(
        "--max-cut-fraction",
        type=float,
        help="audio_lm: share of clips longer than a SpeechLM's window above which nothing is asked (default: 1.0)",
    )
    parser.add_argument("--restart", action="store_true", help="begin again: discard an unfinished run's answers, write over OUT")
    parser.add_argument("--audio-root", type=Path, help="folder of the audio (default: the manifest's)")
    parser.add_allow_links()
    return parser
