"""Telephone prompts in five languages, from Debian's asterisk-core-sounds-*-wav and asterisk-prompt-it-menardi-wav.

A folder holds the prompts of one voice, at 8 kHz. A prompt has the same name in every language ("queue-thankyou.wav") and no
transcript. The same woman speaks English and Spanish. A man speaks Italian; in the Menardi prompts a woman does.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Letters and call signs sound alike in many languages; the others are not speech.
_SKIPPED_FOLDERS = {"letters", "phonetic", "silence"}
_SKIPPED_PREFIXES = ("beep", "spy-", "tt-monkeys", "tt-weasels", "ascending-", "descending-")


@dataclass(frozen=True)
class PromptRecording:
    """One prompt: its name, the language, the voice (the folder's name), and the file."""

    prompt: str
    language: str
    voice: str
    path: Path

    @property
    def gloss(self) -> str:
        """What is said, by the prompt's name: "queue thankyou"."""
        return " ".join(self.prompt.replace("/", " ").replace("-", " ").replace("_", " ").split())


def read_prompts(root: str | os.PathLike[str], language: str) -> list[PromptRecording]:
    """The prompts of one voice that are words of its language, sorted by name.

    Args:
        root: folder of the voice, such as .../sounds/en_US_f_Allison.
        language: "English", ...

    Raises:
        ValueError: `root` holds no prompts.
    """
    root = Path(root)
    recordings = []
    for path in sorted(root.rglob("*.wav")):
        parts = path.relative_to(root).with_suffix("").parts
        if path.is_symlink() or parts[0] in _SKIPPED_FOLDERS or parts[-1].startswith(_SKIPPED_PREFIXES):
            continue
        recordings.append(PromptRecording("/".join(parts), language, root.name, path))
    if not recordings:
        raise ValueError(f"root: expected a folder with Asterisk prompts, got {root}")
    return recordings
