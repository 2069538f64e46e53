"""The settings of the drawing process, and the files by which it is found."""

from dataclasses import dataclass
from pathlib import Path

from infer.program.bounds import check_most

FOLDER = Path("runs/.resident")
SOCKET, STATE, LOG = FOLDER / "socket", FOLDER / "state.json", FOLDER / "log.txt"


@dataclass
class Serve:
    """A process that stays with a model loaded, and draws what draw.py and choose.py with resident=true ask for."""

    idle: float = 600.0
    """Seconds without a request after which it ends."""

    def __post_init__(self) -> None:
        check_most(self, "", idle=7 * 86400)
        if not self.idle > 0:
            raise ValueError(f"idle is {self.idle:g}; give seconds above 0, such as 600")
