"""Whether a run's folder belongs to this run: the config that is recorded there, and the adapters.

Which settings a resumed run may change is said beside each field (`may_change` in the field's metadata). Paths are
compared by what they lead to, not by their spelling: `set`, `set/` and /home/me/set are one folder, and what has moved
since is compared by its content later (train/state/progress.py). More `steps` go on where fewer ended.
"""

import hashlib
import re
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from infer.adapter.read import FILE, find_adapter, read_notes
from infer.checkpoint.family import own_drawing
from infer.program.atomic import replace_file
from train.run.config import Train
from train.state.checkpoint import list_checkpoints

CONFIG, WRITTEN = "config.yaml", "adapter.sha256"
ADAPTERS = ("adapter", "adapter-ema")
PATHS = re.compile(r"(model|data|data\.prior|data\.sources\.\d+)\.path|data(\.sources\.\d+)?\.(masks|references\.\d+)")
FILES = re.compile(r"adapter\.(start|recovery)")


def fixed_settings(config: Any) -> dict[str, Any]:
    """The settings of a config dataclass that a resumed run must repeat, in plain containers, groups nested."""

    def plain(value: Any) -> Any:
        if is_dataclass(value):
            return fixed_settings(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list) else value

    return {each.name: plain(getattr(config, each.name)) for each in fields(config) if not may_change(each)}


def may_change(setting: Field[Any]) -> bool:
    """Whether a resumed run may change it, and all that is within it."""
    return bool(setting.metadata.get("may_change"))


def record_config(job: Train, folder: Path, processes: int) -> int:
    """Write the run's config, or, once it has a checkpoint, compare it with the recorded one; returns the number of
    processes that the run began with.

    Raises:
        ValueError: the run exists with another config, or its folder holds an adapter that it has not written.
    """
    config = fixed_settings(job) | {"processes": processes}
    file = folder / CONFIG
    check_adapters(folder)
    if not (list_checkpoints(folder / "checkpoints") or (folder / "adapter").is_dir()) or not file.is_file():
        _write(file, config)
        return processes
    try:
        recorded = yaml.safe_load(file.read_bytes())
        began_with = int(recorded["processes"])
        recorded.keys()
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{file} is not what this run wrote ({type(error).__name__}: {error}); put it back, or delete {folder} "
            "to start over"
        ) from error
    config["processes"] = began_with  # the batches stay as they were, whoever computes them
    _bring_up_to_date(recorded, job)
    _forget_own_drawing(recorded, job)
    changes = _changes(recorded | {"steps": job.steps}, config)
    if changes:
        raise ValueError(
            f"run {job.run!r} exists with another config ({'; '.join(changes[:5])}{', ...' if changes[5:] else ''}); "
            f"choose another name with run=..., or delete {folder} to start over"
        )
    return began_with


def _bring_up_to_date(recorded: Any, config: Any) -> None:
    """Make what an older version recorded a config of this one: settings that may change go, and those that it did not
    have yet get the value that they had in effect, their default."""
    if isinstance(recorded, list) and isinstance(config, list):
        for entry, own in zip(recorded, config, strict=False):
            _bring_up_to_date(entry, own)
    if not isinstance(recorded, dict) or not is_dataclass(config):
        return
    for each in fields(config):
        if may_change(each):
            recorded.pop(each.name, None)
        elif each.name not in recorded and each.default is not MISSING:
            recorded[each.name] = each.default
        elif each.name not in recorded and each.default_factory is list:
            recorded[each.name] = []
        else:
            _bring_up_to_date(recorded.get(each.name), getattr(config, each.name))


def _forget_own_drawing(recorded: dict[str, Any], job: Train) -> None:
    """An older version recorded 28 steps and guidance 3.5 of class pictures where nothing was said: it is null now, and
    the checkpoint's own, which is the same for FLUX.1-dev."""
    prior = recorded.get("data", {}).get("prior")
    if not isinstance(prior, dict) or [prior.get("steps"), prior.get("guidance")] != [28, 3.5]:
        return
    if (job.data.prior.steps, job.data.prior.guidance) != (None, None):
        return
    if not job.data.prior.count or tuple(own_drawing(job.model)) == (28, 3.5):
        prior |= {"steps": None, "guidance": None}


def recorded_steps(folder: Path) -> Any:
    """The number of steps that the run was last asked for."""
    return yaml.safe_load((folder / CONFIG).read_bytes()).get("steps")


def record_steps(folder: Path, steps: int) -> None:
    """Have the recorded config name another number of steps."""
    recorded = yaml.safe_load((folder / CONFIG).read_bytes())
    _write(folder / CONFIG, recorded | {"steps": steps})


def _write(file: Path, config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    replace_file(file, lambda path: path.write_bytes(text.encode()))


def _changes(a: Any, b: Any, name: str = "") -> list[str]:
    """Each setting in which two configs differ, with both values; name: of the group that is compared."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = dict.fromkeys([*a, *b])
        return [d for key in keys for d in _changes(a.get(key), b.get(key), f"{name}.{key}".lstrip("."))]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, pair in enumerate(zip(a, b, strict=True)) for d in _changes(*pair, f"{name}.{i}")]
    if a == b or (isinstance(a, str) and isinstance(b, str) and _same_path(name, a, b)):
        return []
    return [f"{name} was {a!r}, is {b!r}"]


def _same_path(name: str, was: str, now: str) -> bool:
    """Whether two paths lead to the same folder or file."""
    if not (PATHS if "adapter." not in name else FILES).fullmatch(name):
        return False
    old, new = (Path(path).expanduser() for path in (was, now))
    if was and now and old.resolve() == new.resolve():
        return True
    if FILES.fullmatch(name):
        return old.exists() and new.exists() and _digest(find_adapter(was)) == _digest(find_adapter(now))
    # it has moved, or was downloaded: its content is compared before anything is trained
    return bool(was) and not old.exists() and new.exists()


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_adapters(folder: Path) -> None:
    """See that this run has written every adapter in its folder.

    Raises:
        ValueError: another program or another run has written one.
    """
    record = folder / WRITTEN
    lines = record.read_text().splitlines() if record.is_file() else []
    recorded = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    for name in ADAPTERS:
        file = folder / name / FILE
        if not file.is_file():
            continue
        if (digest := recorded.get(f"{name}/{FILE}")) is not None:
            written_here = digest == _digest(file)
        else:  # a run that was killed before it recorded the checksums
            written_here = "step" in read_notes(file)
        if not written_here or not (folder / CONFIG).is_file():
            raise ValueError(
                f"{file} was not written by this run, which would write its own there; move it elsewhere, or choose "
                "another name with run=..."
            )


def forget_adapters(folder: Path) -> None:
    """Remove the record of the adapters' checksums; call before the adapters are written anew."""
    (folder / WRITTEN).unlink(missing_ok=True)


def record_adapters(folder: Path) -> None:
    """Record the checksums of the adapters that the run has written, as `sha256sum -c` reads them."""
    files = [f"{name}/{FILE}" for name in ADAPTERS if (folder / name / FILE).is_file()]
    text = "".join(f"{_digest(folder / file)}  {file}\n" for file in files)
    replace_file(folder / WRITTEN, lambda path: path.write_text(text))
