"""The settings of the page."""

from dataclasses import dataclass, field

from infer.program.bounds import check_most
from infer.program.paths import expanded


@dataclass
class Page:
    """A local page over runs/: watch runs, draw with them, choose a checkpoint, start and stop them."""

    port: int = 7878
    """On 127.0.0.1 alone; 0 takes one that is free. From another machine: ssh -L 7878:127.0.0.1:7878 that-machine."""
    folders: list[str] = field(default_factory=list)
    """Folders of pictures besides those in runs/ that the page may show, and whose captions it may change."""
    open: bool = True
    """Open the page in a browser."""

    def __post_init__(self) -> None:
        check_most(self, "", port=65535)
        self.folders = [expanded(folder) for folder in self.folders]
        if self.port < 0:
            raise ValueError(f"port is {self.port}; it must be 0 (one that is free) or more, such as 7878")
