"""Whether a run's folder is this run's: its config, and the adapter that lies there.

What a config names is compared as what it is, not as it is spelled: `set`, `set/` and /home/me/set are one folder, and
what has moved since is compared by its content later on (train/state/progress.py). More steps go on where fewer ended.
"""

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from infer.adapter.read import FILE, find_adapter, read_notes
from infer.program.atomic import replace_file
from train.run.config import Train
from train.state.checkpoint import list_checkpoints

CONFIG, WRITTEN = "config.yaml", "adapter.sha256"
ADAPTERS = ("adapter", "adapter-ema")
ASIDE = (  # these change nothing about what is learned
    "track",
    "sweep",
    "device",
    "deterministic",
    "memory",
    "save_every",
    "save_minutes",
    "keep",
    "keep_best",
    "resume",
    "stop_after_bad",
    "spikes",
    "validate_every",
    "preview_every",
    "previews",
    "sampling",
    "push",
)
PATHS = re.compile(r"(model|data|data\.prior|data\.sources\.\d+)\.path|data(\.sources\.\d+)?\.masks")
FILES = re.compile(r"adapter\.(start|recovery)")


def claim(job: Train, folder: Path, processes: int) -> int:
    """Write the run's config, or once it has a checkpoint compare it with the one that is there; returns the number of
    processes that the run began with.

    Raises:
        ValueError: the run exists with another config, or its folder holds an adapter that it has not written.
    """
    own: dict[str, Any] = asdict(job) | {"processes": processes}
    for aside in ASIDE:
        own.pop(aside)
    for aside in ("cache", "on_error", "least"):
        own["data"].pop(aside)
    own["encode"] = {"tile": job.encode.tile}
    file = folder / CONFIG
    check_adapters(folder)
    if not (list_checkpoints(folder / "checkpoints") or (folder / "adapter").is_dir()) or not file.is_file():
        _write(file, own)
        return processes
    try:
        there = yaml.safe_load(file.read_bytes())
        begun = int(there["processes"])
        there.keys()
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not what this run wrote ({type(error).__name__}: {error}); put it back, or delete {folder} "
            "to start over"
        ) from error
    own["processes"] = begun  # the batches stay as they were, whoever computes them
    other = _differences(there | {"steps": job.steps}, own)
    if other:
        raise ValueError(
            f"run {job.run!r} exists with another config ({'; '.join(other[:5])}{', ...' if other[5:] else ''}); "
            f"choose another name with run=..., or delete {folder} to start over"
        )
    return begun


def begun_steps(folder: Path) -> Any:
    """The steps that the run was last asked for, which the config says."""
    return yaml.safe_load((folder / CONFIG).read_bytes()).get("steps")


def note_steps(folder: Path, steps: int) -> None:
    """Have the run's config say other steps."""
    there = yaml.safe_load((folder / CONFIG).read_bytes())
    _write(folder / CONFIG, there | {"steps": steps})


def _write(file: Path, config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    replace_file(file, lambda path: path.write_bytes(text.encode()))


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [d for key in keys for d in _differences(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in _differences(*pair, f"{name}.{i}")]
    if a == b or (isinstance(a, str) and isinstance(b, str) and _same(name, a, b)):
        return []
    return [f"{name} was {a!r}, is {b!r}"]


def _same(name: str, was: str, now: str) -> bool:
    """Whether two spellings name one thing."""
    if not (PATHS if "adapter." not in name else FILES).fullmatch(name):
        return False
    old, new = (Path(path).expanduser() for path in (was, now))
    if was and now and old.resolve() == new.resolve():
        return True
    if FILES.fullmatch(name):
        return old.exists() and new.exists() and _digest(find_adapter(was)) == _digest(find_adapter(now))
    # what has moved, or was downloaded: its content is compared before anything is trained
    return bool(was) and not old.exists() and new.exists()


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_adapters(folder: Path) -> None:
    """See that no adapter lies where the run writes its own, but what it has written.

    Raises:
        ValueError: one does.
    """
    record = folder / WRITTEN
    lines = record.read_text().splitlines() if record.is_file() else []
    told = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    for name in ADAPTERS:
        file = folder / name / FILE
        if not file.is_file():
            continue
        # a run whose record is absent was killed while it wrote it
        own = told[f"{name}/{FILE}"] == _digest(file) if f"{name}/{FILE}" in told else "step" in read_notes(file)
        if not own or not (folder / CONFIG).is_file():
            raise ValueError(
                f"{file} was not written by this run, which would write its own there; move it elsewhere, or choose "
                "another name with run=..."
            )


def forget_adapters(folder: Path) -> None:
    """Before the run's adapters are written: the record is of none."""
    (folder / WRITTEN).unlink(missing_ok=True)


def record_adapters(folder: Path) -> None:
    """Note the checksums of the adapters that the run has written, as `sha256sum -c` reads them."""
    files = [f"{name}/{FILE}" for name in ADAPTERS if (folder / name / FILE).is_file()]
    text = "".join(f"{_digest(folder / file)}  {file}\n" for file in files)
    replace_file(folder / WRITTEN, lambda path: path.write_text(text))
