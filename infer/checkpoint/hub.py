"""Files of a model on the Hub, through its cache: what lies there whole is used where no network is.

Parts are loaded from the snapshot's folder, never by the Hub's name: for a sharded part diffusers asks the Hub what
there is, though it is in the cache.
"""

from functools import cache
from pathlib import Path

UNREAD = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.pb", "*.pt", "*.pth", "*.fp16.*")
"""Copies of the weights in formats and variants that are not read here."""
CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json")
"""One of which every part has."""


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
