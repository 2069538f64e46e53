"""What went wrong, said to people: one paragraph with the mend; a traceback only with FLUX_DEBUG=1.

Exit codes: 0 done; 1 a defect of ours, whose traceback is kept in a file; 2 something that the user can mend; 3 stopped
by a signal with its state saved (the same command goes on); 4 a check that found a difference; 130 ended by Ctrl-C,
with nothing half-written left.
"""

import errno
import os
import platform
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

from infer.program.atomic import replace_file
from infer.program.paths import INSTALLED, ROOT
from infer.program.secrets import hide

DONE, DEFECT, MEND, STOPPED, DIFFERS = range(5)
INTERRUPTED = 130  # as shells count SIGINT
TRACEBACK = "traceback.txt"
MENDS = {
    errno.ENOSPC: "free some space, then start again: what was written before is whole",
    errno.EDQUOT: "free some space or raise the quota, then start again: what was written before is whole",
    errno.EIO: "the disk or the network failed: see to it, then start again: what was written before is whole",
    errno.EROFS: "mount it writable, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EMFILE: "raise the limit with ulimit -n",
    errno.ENAMETOOLONG: "choose a shorter name",
}
MEMORY = "choose precision=nf4, memory=lean or memory.budget_gib=..., or a smaller resolution or batch_size"
PACKAGES = ("hydra_plugins", "infer", "train")
LIBRARIES = ("torch", "diffusers", "transformers", "bitsandbytes", "peft", "accelerate", "safetensors")


@contextmanager
def explained(folder: Path | None = None) -> Iterator[None]:
    """Within, an exception ends the program with one paragraph and the exit code, and so does Ctrl-C with a sentence.

    folder: where the traceback of a defect is kept, if it is there; else it goes to the temporary folder.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read what is printed has left, as head does: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        fail(error, folder)
    except KeyboardInterrupt as error:
        _leave(INTERRUPTED, "stopped by Ctrl-C; nothing half-written is left, the same command starts again", error)


def fail(error: Exception, folder: Path | None = None) -> NoReturn:
    """Say what is wrong and leave with the exit code."""
    said = reason(error)
    if said is not None:
        refuse(said, error)
    kept = "" if debugging() else f"; {_keep(error, folder)}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    at = f"{Path(frame.filename).name} line {frame.lineno}"
    _leave(DEFECT, f"a defect of flux-lora, not of yours: {_named(error)} at {at}; please report it{kept}", error)


def refuse(said: str, error: BaseException | None = None) -> NoReturn:
    """Leave with what the user can mend."""
    _leave(MEND, said, error)


def debugging() -> bool:
    return os.environ.get("FLUX_DEBUG") == "1"


def reason(error: Exception) -> str | None:
    """What the user can mend, and how; None if the error is a defect."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which this file does without
        return f"the GPU ran out of memory ({str(error).split('.')[0]}); {MEMORY}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return f"the machine ran out of memory ({_named(error)}); {MEMORY}"
    number = error.errno if isinstance(error, OSError) else None
    # safetensors writes in Rust, and says the number in its text alone
    told = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    number = int(told[1]) if told else number
    if number in errno.errorcode:
        assert number is not None
        file = getattr(error, "filename", None) or "reading or writing a file"
        mend = MENDS.get(number, "check the path and its permissions")
        return f"{os.strerror(number)}: {file}; {mend}"
    return str(error) if is_ours(error) else None


def is_ours(error: Exception) -> bool:
    """Whether our own code raised this ValueError: a library's says nothing that a user could mend."""
    if not isinstance(error, ValueError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    raised_in = Path(frames[-1].filename) if frames else ROOT
    if not raised_in.is_relative_to(ROOT):
        return False
    inside = raised_in.relative_to(ROOT).parts
    if INSTALLED:  # among the libraries
        return not inside or inside[0] in PACKAGES
    return not inside or not inside[0].startswith(".")  # an environment within the repository


def _named(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _keep(error: Exception, folder: Path | None) -> str:
    """Write the traceback; says where it is."""
    versions = []
    for name in LIBRARIES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            versions.append(f"{name} absent")
    head = [time.strftime("%Y-%m-%d %H:%M:%S"), " ".join(sys.argv), platform.python_version(), ", ".join(versions)]
    text = hide("\n".join([*head, "", *traceback.format_exception(error)]))
    file = folder / TRACEBACK if folder is not None and folder.is_dir() else None
    try:
        if file is None:
            handle, name = tempfile.mkstemp(prefix="flux-lora-", suffix=".txt")
            os.close(handle)
            file = Path(name)
        replace_file(file, lambda path: path.write_bytes(text.encode(errors="replace")))
    except OSError as other:
        return f"its traceback cannot be kept ({other.strerror}): FLUX_DEBUG=1 shows it"
    return f"its traceback is in {file} (FLUX_DEBUG=1 shows it)"


def _leave(code: int, said: str, error: BaseException | None) -> NoReturn:
    """Print the message and exit. What every rank finds is printed by rank 0 alone: the others wait, and the launcher
    ends them."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(3)
    sys.stdout.flush()
    if debugging() and error is not None:
        print(hide("".join(traceback.format_exception(error))), file=sys.stderr)
    head = "" if code == INTERRUPTED else f"error{f' on rank {rank}' if rank != '0' else ''}: "
    print(f"\n{head}{hide(' '.join(said.split()))}", file=sys.stderr, flush=True)
    sys.exit(code)
