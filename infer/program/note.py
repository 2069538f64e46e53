"""Lines that a person should know of, from wherever they are found out."""

import os
import sys
from functools import cache

from tqdm import tqdm


@cache
def note(line: str) -> None:
    """One line a process, of the first rank alone, above a progress bar that is being shown."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(f"note: {line}", file=sys.stderr)
