"""How the loss of each training picture stands, in runs/<run>/pictures.json: which are learned, which stand out.

A sample's loss depends on its noise level more than on its picture, so it is compared with others of about the same
level. `relative` divides it by what is usual there now: 1 is usual, 2 stands out. `left` divides it by what was usual
there when the run began: at 0.3 most of it is learned. Both are moving averages over the picture's own visits. It is
figured on the main rank from that rank's samples, after the update's losses were read anyway; nothing that is learned
depends on it. A run that goes on takes over what is there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file

NAME = "pictures.json"
LEVELS = 10  # bins of the noise level
FIRST = 20  # losses of a level that say what was usual when the run began
USUAL = 0.02  # weight of a new loss in what is usual at its level
VISIT = 0.2  # weight of a picture's new visit


class PictureLosses:
    """The losses of one run so far."""

    def __init__(self, file: Path, resumed: bool) -> None:
        self.file = file
        self.pictures: dict[str, list[float]] = {}
        """By name: visits, relative, left."""
        self.levels: list[list[float]] = [[0, 0.0, 0.0] for _ in range(LEVELS)]
        """Of each: losses so far, what was usual first, what is usual now."""
        if resumed:
            self._read()

    def _read(self) -> None:
        try:
            said: Any = json.loads(self.file.read_bytes())
            pictures = {str(name): [int(n), float(a), float(b)] for name, (n, a, b) in said["pictures"].items()}
            levels = [[int(n), float(a), float(b)] for n, a, b in said["levels"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):  # absent, torn, or of another version
            return
        if len(levels) == LEVELS:
            self.pictures, self.levels = pictures, levels

    def note(self, names: Sequence[str], sigmas: Sequence[float], losses: Sequence[float]) -> None:
        """Remember the losses of some samples, all finite."""
        for name, sigma, loss in zip(names, sigmas, losses, strict=True):
            level = self.levels[min(int(sigma * LEVELS), LEVELS - 1)]
            if level[0] < FIRST:
                level[1] += (loss - level[1]) / (level[0] + 1)
            level[2] += (loss - level[2]) * max(USUAL, 1 / (level[0] + 1))
            level[0] += 1
            relative, left = loss / max(level[2], 1e-12), loss / max(level[1], 1e-12)
            one = self.pictures.setdefault(name, [0, relative, left])
            one[0] += 1
            weight = max(VISIT, 1 / one[0])
            one[1] += (relative - one[1]) * weight
            one[2] += (left - one[2]) * weight

    def write(self, step: int) -> None:
        """Replace the file, if there is anything to say."""
        if self.pictures:
            rounded = {name: [n, round(a, 4), round(b, 4)] for name, (n, a, b) in self.pictures.items()}
            text = json.dumps({"step": step, "pictures": rounded, "levels": self.levels}, ensure_ascii=False)
            replace_file(self.file, lambda path: path.write_text(text, encoding="utf-8"))
