"""What lies in a run's folder that no run has written, and what would stand in the way of what it writes."""

from pathlib import Path
from typing import Any

import yaml

from infer.program.run_names import FILES, FOLDERS

CONFIG, JOURNAL = "config.yaml", "metrics.jsonl"


def check_foreign(folder: Path, whole: bool = True) -> None:
    """See that a run can have its folder, before anything is loaded. whole: it is all there, and not what a download
    that broke off has left, whose config would have come last.

    Raises:
        ValueError: a file is where a folder belongs or the other way round, or a file that a run would write over was
            not written by one.
    """
    mend = "take it away, or choose another name with run=..."
    for above in (folder, *folder.parents):
        if above.is_symlink() and not above.is_dir():
            raise ValueError(f"{above} is a link that leads nowhere; {mend}")
        if above.exists() and not above.is_dir():
            raise ValueError(f"{above} is a file, and the run's folder would be {folder}; {mend}")
    for name in sorted(FOLDERS):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a file, where a run has a folder of that name; {mend}")
    for name in FILES:
        if (folder / name).is_dir():
            raise ValueError(f"{folder / name} is a folder, where a run has a file of that name; {mend}")
    if (folder / CONFIG).is_file() and not _is_ours(folder / CONFIG):
        raise ValueError(f"{folder / CONFIG} is none that a run wrote; put back the one that was there, or {mend}")
    if whole and (folder / JOURNAL).is_file() and not (folder / CONFIG).is_file():
        raise ValueError(f"{folder / JOURNAL} is there without the {CONFIG} of a run; {mend}")


def _is_ours(file: Path) -> bool:
    """Whether it is the config of a run, as `record_config` writes it."""
    try:
        config: Any = yaml.safe_load(file.read_bytes())
        return int(config["processes"]) > 0 and {"model", "data", "adapter"} <= config.keys()
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return False
