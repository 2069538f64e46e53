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
from train.state.foreign import CONFIG, check_foreign
from train.state.steps import list_checkpoints, newest_whole, step_of

WRITTEN = "adapter.sha256"
CARD = "adapter/README.md"
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
    began_with = check_recorded(job, folder)
    if began_with is None:
        _write(folder / CONFIG, fixed_settings(job) | {"processes": processes})
    return began_with or processes


def check_recorded(job: Train, folder: Path) -> int | None:
    """Compare the run's config with the one that is recorded in its folder, and the steps with its checkpoints; returns
    the number of processes that the run began with, None if there is nothing yet to go on from. Nothing is written, and
    torch is not imported.

    Raises:
        ValueError: as of `record_config`.
    """
    check_foreign(folder)
    file, there = folder / CONFIG, list_checkpoints(folder / "checkpoints")
    check_adapters(folder)
    if not (there or (folder / "adapter").is_dir()) or not file.is_file():
        return None
    recorded = yaml.safe_load(file.read_bytes())
    began_with = int(recorded["processes"])
    # the batches stay as they were, whoever computes them
    config = fixed_settings(job) | {"processes": began_with}
    _bring_up_to_date(recorded, job)
    _forget_own_drawing(recorded, job)
    if job.precision.kind == "auto":  # it is measured first, and compared then
        recorded["precision"] = config["precision"]
    changes = _changes(recorded | {"steps": job.steps}, config)
    if changes:
        raise ValueError(
            f"run {job.run!r} exists with another config ({'; '.join(changes[:5])}{', ...' if changes[5:] else ''}); "
            f"choose another name with run=..., or delete {folder} to start over"
        )
    if there and job.resume is None and step_of(there[-1]) > job.steps:
        newest = newest_whole(folder / "checkpoints")
        if newest is not None:
            check_steps(job, step_of(newest), folder)
    return began_with


def check_steps(job: Train, step: int, folder: Path) -> None:
    """See that the checkpoint's step is not beyond the run's last step.

    Raises:
        ValueError: it is.
    """
    if step > job.steps:
        raise ValueError(
            f"steps is {job.steps}, but run {job.run!r} is at step {step} already; set steps={step} or more, go on "
            f"from an older checkpoint in {folder / 'checkpoints'} with resume=step-..., or choose another name with "
            "run=..."
        )


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
    # it has moved, or was downloaded or copied: its content is compared before anything is trained
    if not was or not new.exists():
        return False
    configs = [folder / "transformer" / "config.json" for folder in (old, new)]
    copied = name == "model.path" and all(map(Path.is_file, configs)) and _digest(configs[0]) == _digest(configs[1])
    return copied or not old.exists()


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def check_adapters(folder: Path) -> None:
    """See that this run has written every adapter in its folder.

    Raises:
        ValueError: another program or another run has written one.
    """
    recorded = _recorded(folder)
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


def _recorded(folder: Path) -> dict[str, str]:
    """The checksums of what the run has written last, by the names of the files."""
    record = folder / WRITTEN
    lines = record.read_text().splitlines() if record.is_file() else []
    return {file: digest for digest, _, file in (line.partition("  ") for line in lines)}


def set_card_aside(folder: Path) -> Path | None:
    """Rename the adapter's card if it was edited since the run wrote it, so that a new one overwrites nothing; returns
    where it is now. Call before `forget_adapters`."""
    card, written = folder / CARD, _recorded(folder).get(CARD)
    if written is None or not card.is_file() or _digest(card) == written:
        return None
    return card.replace(card.with_name("README.edited.md"))


def forget_adapters(folder: Path) -> None:
    """Remove the record of the adapters' checksums; call before the adapters are written anew."""
    (folder / WRITTEN).unlink(missing_ok=True)


def record_adapters(folder: Path) -> None:
    """Record the checksums of the adapters and of the card that the run has written, as `sha256sum -c` reads them."""
    files = [name for name in (*(f"{each}/{FILE}" for each in ADAPTERS), CARD) if (folder / name).is_file()]
    text = "".join(f"{_digest(folder / file)}  {file}\n" for file in files)
    replace_file(folder / WRITTEN, lambda path: path.write_text(text))
