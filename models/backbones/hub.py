"""Backbones from the model hub: its own cache on this machine first, then the network."""

from __future__ import annotations

import contextlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path

from models.backbones.model_folder import has_all_shards, missing_files

_PATTERNS = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt", "*.jinja"]
_PROBE_SECONDS = 3.0


def from_hub(hub_id: str, revision: str | None, tried: list[str]) -> Path | None:
    """The folder of a hub model, downloaded if need be; None if there is none, with the reason added to `tried`."""
    label = f"model hub ({hub_id})"
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        tried.append(f"model hub: {hub_id!r} is not a hub id of the form owner/name")
        return None
    import huggingface_hub

    with contextlib.suppress(Exception):  # any failure here only means: not in the hub's own cache
        path = Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=_PATTERNS, local_files_only=True
            )
        )
        if missing_files(path) is None and has_all_shards(path):
            return path
    constants = huggingface_hub.constants
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        tried.append(f"{label}: not in its cache, and HF_HUB_OFFLINE=1 forbids the network")
        return None
    reason = _unreachable(constants.ENDPOINT)
    if reason is not None:
        tried.append(f"{label}: {constants.ENDPOINT} cannot be reached ({reason})")
        return None
    try:
        path = Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=_PATTERNS))
    except Exception as error:  # the hub library raises many kinds: missing, gated, interrupted
        tried.append(f"{label}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return None
    if missing_files(path) is not None:
        tried.append(f"{label}: the repository lacks {missing_files(path)}")
        return None
    return path


def _unreachable(endpoint: str) -> str | None:
    """Why the hub does not answer, or None if it does. It takes a few seconds at most, even if the name look-up hangs."""
    outcome: list[str | None] = [f"no answer within {_PROBE_SECONDS:.0f} s"]

    def probe() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            outcome[0] = None  # it answered
        except (OSError, ValueError) as error:
            outcome[0] = str(getattr(error, "reason", error))
        else:
            outcome[0] = None

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1.0)
    return outcome[0]
