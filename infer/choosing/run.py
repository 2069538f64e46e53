"""What a choice reads of a training run: its settings, checkpoints, validation losses and last previews' prompts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from PIL import Image, UnidentifiedImageError

from infer.adapter.lora import FROM_ERROR
from infer.adapter.own_checkpoint import AVERAGE, WEIGHTS
from infer.checkpoint.model import Model
from infer.quantize.precision import Precision

SHEET = "flux_lora_sheet"
"""The text of a preview sheet's PNG that says what is drawn where (train/loop/preview.py)."""
RESULT = "choice.json"
"""What a choice found, in the run's folder `choose`."""


@dataclass
class RunFiles:
    """A run as its folder describes it."""

    folder: Path
    model: Model
    precision: Precision
    adapter: dict[str, Any]
    """The adapter's recorded settings."""
    trigger: str | None
    text_length: int | None
    """Text tokens of its captions and previews; None is the checkpoint's own."""
    data: str | None
    """The folder of its pictures; None if its data is another kind of source."""
    checkpoints: dict[str, int]
    """Steps by name, the earliest first."""
    average: bool
    """Whether the moving averages of the checkpoints' weights (train.py's ema) are meant, not the weights."""
    validation: dict[int, float]
    """Losses of the held-out pictures by step, of the same weights."""
    prompts: list[str]
    """Of its last previews."""

    def loss_at(self, step: int) -> float | None:
        """The validation loss at a checkpoint: the last one that was measured up to its step."""
        before = [measured for measured in self.validation if measured <= step]
        return self.validation[max(before)] if before else None


def known_settings(kind: Any, values: Any) -> Any:
    """A dataclass of the recorded values that it has; others are of another version."""
    there = {each.name for each in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in there})


def read_run(folder: Path, wanted: list[str], average: bool | None) -> RunFiles:
    """Read a run; wanted: names of its checkpoints, none for all; average: whether their averaged weights are meant,
    None takes them where all have some.

    Raises:
        ValueError: it is not there, has no such checkpoint, or cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no run {folder}; name one that was trained")
    try:
        config = yaml.safe_load((folder / "config.yaml").read_bytes())
        model, precision = known_settings(Model, config["model"]), known_settings(Precision, config["precision"])
        adapter, data = dict(config["adapter"]), config["data"]
        trigger, path, text_length = (data.get(name) for name in ("trigger", "path", "text_length"))
    except (OSError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.yaml'} does not say what was trained ({error}); train it again") from error
    found = sorted(
        (int(each.name[5:]), each.name)
        for each in (folder / "checkpoints").glob("step-*")
        if re.fullmatch(r"step-\d+", each.name)
    )
    there = {name: step for step, name in found}
    if absent := [name for name in wanted if name not in there]:
        raise ValueError(f"run {folder} has no checkpoint {absent[0]}; it has {', '.join(there) or 'none'}")
    chosen = {name: step for name, step in there.items() if not wanted or name in wanted}
    if not chosen:
        raise ValueError(
            f"run {folder} has no checkpoints; train with keep=5 or keep_best=3 to have some to choose from"
        )
    without = [name for name in chosen if not (folder / "checkpoints" / name / AVERAGE).is_file()]
    if average and without:
        raise ValueError(
            f"average is true, but checkpoint {without[0]} of {folder} has no averaged weights; train with ema=0.99 to "
            "have some, or set average=false"
        )
    average = not without if average is None else average
    if adapter.get("init") in FROM_ERROR or adapter.get("recovery"):
        raise ValueError(
            f"run {folder} starts from the quantization's error (adapter.init or adapter.recovery), and its "
            "checkpoints do not say that part; compare its adapter with infer/compare.py"
        )
    if data.get("references"):
        raise ValueError(f"run {folder} learned edits of references, which are not drawn here; see its previews")
    return RunFiles(
        folder,
        model,
        precision,
        adapter,
        trigger,
        text_length,
        path if isinstance(path, str) and Path(path).is_dir() else None,
        chosen,
        average,
        _validation(folder / "metrics.jsonl", "validation_loss_ema" if average else "validation_loss"),
        _prompts(folder / "previews"),
    )


def _validation(file: Path, name: str) -> dict[int, float]:
    losses: dict[int, float] = {}
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        if f'"{name}"' not in line:
            continue
        try:
            entry = json.loads(line)
            losses[int(entry["step"])] = float(entry[name])
        except (ValueError, LookupError, TypeError):  # torn
            continue
    return losses


def _prompts(previews: Path) -> list[str]:
    for sheet in sorted(previews.glob("step-*.png"), reverse=True):
        try:
            with Image.open(sheet) as board:
                said = json.loads(getattr(board, "text", {}).get(SHEET, "{}"))
        except (OSError, ValueError, UnidentifiedImageError):
            continue
        prompts = said.get("prompts") if isinstance(said, dict) else None
        if prompts:
            return [str(prompt) for prompt in prompts]
    return []


def checkpoint_file(files: RunFiles, name: str) -> Path:
    """The weights of a checkpoint that are meant."""
    return files.folder / "checkpoints" / name / (AVERAGE if files.average else WEIGHTS)
