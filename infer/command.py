"""A command: its YAML composed by Hydra, turned into dataclasses once, and its errors said in one paragraph.

Exit codes: 0 done, 1 a defect or what Hydra itself refuses, 2 something the user can mend, 3 stopped by a signal with
its state saved (the same command goes on), 4 a check that found a difference.
"""

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

DONE, DEFECT, MEND, STOPPED, DIFFERS = range(5)
ROOT = Path(__file__).resolve().parents[1]
T = TypeVar("T")

OmegaConf.register_new_resolver("root", lambda: str(ROOT), replace=True)


def run_command(name: str, schema: type[T], work: Callable[[T], Any]) -> None:
    """Compose `configs/<name>.yaml` with the command line, check it against `schema`, and do the work."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)

    @hydra.main(version_base="1.3", config_path=str(ROOT / "configs"), config_name=name)
    def main(config: DictConfig) -> None:
        try:
            options: Any = OmegaConf.to_object(config)
            work(options)
        except ValueError as error:
            refuse(error)
        except OSError as error:
            if error.errno is None:
                raise
            mend = "free some space" if error.errno == errno.ENOSPC else "check the path and its permissions"
            refuse(ValueError(f"{error.strerror}: {error.filename or 'writing a file'}; {mend}"))
        except torch.OutOfMemoryError as error:
            mend = "choose precision=nf4, memory=lean or memory.budget_gib=..., or a smaller resolution or batch_size"
            refuse(ValueError(f"the GPU ran out of memory ({str(error).split('.')[0]}); {mend}"))

    main()


def refuse(error: ValueError) -> None:
    """Print what is wrong and leave with exit code 2; FLUX_DEBUG=1 shows the traceback instead."""
    if os.environ.get("FLUX_DEBUG") == "1":
        raise error
    print(f"\nerror: {error}", file=sys.stderr, flush=True)
    sys.exit(MEND)


def pick_device(name: str) -> torch.device:
    """`auto`, `cuda`, `cuda:1` or `cpu` -> device.

    Raises:
        ValueError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; choose auto, cuda or cpu") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch sees no CUDA device here; set device=cpu or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but torch sees {torch.cuda.device_count()} CUDA devices; count from cuda:0")
    return device


def check_run_name(run: str) -> Path:
    """The run's folder, runs/<run>.

    Raises:
        ValueError: the name would leave that folder.
    """
    if not run or run != run.strip() or run.startswith(".") or any(c in run for c in '\\:*?"<>|\n') or ".." in run:
        raise ValueError(f"run is {run!r}; choose a plain name such as mine-nf4")
    if Path(run).is_absolute():
        raise ValueError(f"run is {run!r}, a path; it is the name of a folder within runs/")
    return Path("runs") / run
