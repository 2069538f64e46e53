"""Files of a model on the Hub, through its cache: what lies there whole is used where no network is.

Parts are loaded from the snapshot's folder, never by the Hub's name: for a sharded part diffusers asks the Hub what
there is, though it is in the cache.
"""

import socket
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

WAIT = 5.0  # seconds in which the Hub must answer
UNREAD = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pb", "*.pt", "*.pth", "*.fp16.*")
"""Copies of the weights in formats and variants that are not read here."""
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
"""One of which every part has."""


@cache
def reachable() -> bool:
    """Whether the Hub's machine answers at all: its library would try for most of a minute before it says so.

    Behind a proxy, or where HF_HUB_OFFLINE is set, the library is left to find out.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout=WAIT).close()
    except OSError:
        return False
    return True


def _unreachable() -> ConnectionError:
    return ConnectionError("the Hub cannot be reached, and it is not in the Hub's cache here")


@cache
def hub_part(name: str, revision: str | None, part: str) -> Path:
    """The folder of a part in the cache, downloaded as far as it is not there; once a process, so that all of a run
    sees one version.

    Raises:
        Exception: whatever the Hub's library raises, if it is neither there nor in the cache.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        if not reachable():
            raise _unreachable()
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[f"{part}/*"], ignore_patterns=list(UNREAD))
        )
    except RevisionNotFoundError:
        raise
    except Exception:  # each kind of network that is not there raises its own
        # also where only some files of this part were ever wanted: what loads them says if one is absent
        cached = _cached(name, revision, part)
        if cached is None:
            raise
        folder = cached
    if not (folder / part).is_dir():
        raise FileNotFoundError(f"there is no {part} in it, as far as it is in the cache {folder}")
    return folder / part


def hub_file(name: str, revision: str | None, file: str) -> Path:
    """A file in the cache, downloaded if it is not there.

    Raises:
        Exception: whatever the Hub's library raises, if it is neither there nor in the cache.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        if not reachable():
            raise _unreachable()
        return Path(hf_hub_download(name, file, revision=revision))
    except RevisionNotFoundError:
        raise
    except Exception:
        cached = _cached(name, revision, "", file)
        if cached is None:
            raise
        return cached / file


def _cached(name: str, revision: str | None, part: str, file: str | None = None) -> Path | None:
    """The snapshot's folder that holds a part, or a file, by the cache alone."""
    from huggingface_hub import try_to_load_from_cache

    names = [file] if file else [f"{part}/{config}" for config in CONFIGS]
    for each in names:
        found = try_to_load_from_cache(name, each, revision=revision)
        if isinstance(found, str):
            return Path(found.removesuffix(each))
    return None
