"""The checkpoints in a run's folder: their steps, and whether one is whole. Nothing here imports torch."""

import hashlib
import json
import re
from pathlib import Path

ADAPTER, AVERAGE, OPTIMIZER, STATE = "adapter.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"


def list_checkpoints(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first; without partial ones."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def read_whole(path: Path) -> tuple[str, dict[str, bytes]]:
    """A checkpoint's state as it was written, and the contents of its other files by their names.

    Raises:
        ValueError: the checksums differ from what was written.
        OSError, LookupError, TypeError, AttributeError, RecursionError: a file is absent or holds something else.
    """
    header = json.loads((path / STATE).read_text())
    sums, text = header["sha256"], header["state"]
    names = [ADAPTER, OPTIMIZER, *([AVERAGE] if AVERAGE in sums else [])]
    contents = {name: (path / name).read_bytes() for name in names}
    found = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    if found | {STATE: hashlib.sha256(text.encode()).hexdigest()} != sums:
        raise ValueError("its checksums differ from what was written")
    return text, contents


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None if there is none."""
    for path in reversed(list_checkpoints(folder)):
        try:
            read_whole(path)
        except (OSError, LookupError, TypeError, AttributeError, ValueError, RecursionError):
            continue
        return path
    return None
