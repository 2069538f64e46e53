"""The names of a run's checkpoints, read without torch."""

import re
from pathlib import Path


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, the earliest first; without partial ones."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for path in folder.iterdir() if (found := re.fullmatch(r"step-(\d+)", path.name)))
