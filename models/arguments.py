"""The parser of every command: one-line errors with the nearest right word, repeatable options, defaults in the help."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """argparse's parser. An error of use is one line with the nearest right word; the exit status is 2."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}{self._nearest(message)} ({self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        """As argparse's. The help ends with the default, if there is one and the help does not name it."""
        action = super().add_argument(*names, **options)
        shown = _typed(action.default)
        if shown and action.help not in (None, argparse.SUPPRESS) and "default" not in action.help:
            action.help += f" (default: {shown})"
        return action

    def add_list(self, *names: str, nargs: str = "+", default: Sequence[str] = (), **options: Any) -> None:
        """An option of several words. Given twice, it holds the words of both."""
        self.add_argument(*names, nargs=nargs, action=Collect, default=list(default), **options)

    def add_comma_list(self, *names: str, **options: Any) -> None:
        """An option of names between commas. Given twice, it holds the names of both, between commas."""
        self.add_argument(*names, action=_Join, **options)

    def add_allow_links(self) -> None:
        """The option of every command that reads clips."""
        self.add_argument(
            "--allow-links",
            action="store_true",
            help="clips may be links that leave the folder of the audio (a hub's cache, git-annex, DVC)",
        )

    def add_hears(self, what: str) -> None:
        """The option of every command whose model may hear other audio than the clips as they are."""
        self.add_list(
            "--hears",
            metavar="NAME=VALUE",
            help=f"{what}: snr_db=0,10 band=common|wide|narrow codec=ulaw|gsm|mp3|opus|vorbis seed=0, and in the prompt "
            "transcript=false context=false context_from=NAME question=WORDS; clean = as they are",
        )

    def _nearest(self, message: str) -> str:
        unknown = re.match(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            options = [name for action in self._actions for name in action.option_strings]
            return _did_you_mean(unknown[1], options)
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        if choice:
            return _did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        return ""


class MixedParser(Parser):
    """A parser of words that may stand before and behind its options."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        return self.parse_intermixed_args(args, namespace)


class Collect(argparse.Action):
    """Adds the words of every use; the first use replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*([] if given is self.default else given), *values])


class _Join(argparse.Action):
    """Puts the text of every use behind a comma; the first use replaces the default."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = getattr(namespace, self.dest)
        setattr(namespace, self.dest, values if given is self.default else f"{given},{values}")


def _typed(default: Any) -> str:
    """A default as the user would type it, for a help; empty where there is none."""
    if default is None or default is False or default == argparse.SUPPRESS:
        return ""
    words = default if isinstance(default, (list, tuple)) else [default]
    return " ".join(map(str, words)).replace("%", "%%")


def nearest(word: str, known: Sequence[str]) -> str:
    """The known word that is most like `word`, or an empty string."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), "")


def _did_you_mean(word: str, known: Sequence[str]) -> str:
    near = nearest(word, known)
    return f"; did you mean {near}?" if near else ""
