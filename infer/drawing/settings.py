"""The settings of a drawing, and what can be checked of them before torch is imported."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import yaml

from infer.adapter.selection import Trained, Weighted
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.device.device import check_device_name, pick_device
from infer.fast.memory import Memory
from infer.program.bounds import SEED, TOKENS, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import CONFIGS, expand, expanded
from infer.quantize.precision import Precision
from infer.sample.edit import Edit, check_edits, check_once, check_resolution, label
from infer.sample.generate import Sampling

if TYPE_CHECKING:
    import torch

WORDS = 40  # letters of a prompt in its pictures' names


@dataclass
class Draw:
    """Pictures from prompts: each prompt with each seed, at each precision, with each adapter at each strength."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    adapter: Trained = field(default_factory=Trained)
    weights: list[float] = field(default_factory=list)
    """Strengths of the adapter, drawn side by side, as in `weights=[0,0.5,1]`; none takes adapter.weight."""
    prompt: str | None = None
    """What is drawn."""
    prompts: list[str] = field(default_factory=list)
    """In the place of `prompt`: several, or `prompts=@FILE` with one a line."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the noise: each prompt is drawn once with each."""
    sampling: Sampling = field(default_factory=Sampling)
    memory: Memory = field(default_factory=Memory)
    text_length: int | None = None
    """text tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    edits: list[Edit] = field(default_factory=list)
    """Prompts with reference pictures, as in `edits=[{prompt: make it blue, references: [before.png]}]`; drawn after
    those without."""
    reference_resolution: int | None = None
    """Pixels a side of the square that a reference has about as many pixels as; null takes the size that the family's
    pipeline in diffusers gives it: about 1024 for FLUX.1 Kontext, its own up to 1024 for FLUX.2."""
    adapters: list[str] = field(default_factory=list)
    """In the place of adapter.path: several, drawn side by side; a run's checkpoints are some too, as in
    `adapters=[runs/mine/checkpoints/step-000200,runs/mine/adapter]`."""
    precisions: list[str] = field(default_factory=list)
    """In the place of `precision`: several files of configs/precision, drawn side by side, as in
    `precisions=[nf4,bf16]`."""
    like: str | None = None
    """A PNG that this command drew: its settings are taken, but for those that stand on the command line."""
    out: str = "pictures"
    """The pictures' folder, in which none of their names may exist."""
    resident: bool = False
    """Have a process draw that stays with the model loaded (infer/serve.py), so that the next drawing takes no loading;
    it is started if there is none."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        refuse_idle(self.sampling, "sampling.", ("model",), "this command draws on one model")
        check_most(self, "", text_length=TOKENS, seeds=SEED, weights=10**6)
        expand(self, "out")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"text_length is {self.text_length}; it must be 1 or more, or null")
        check_resolution("reference_resolution", self.reference_resolution)
        if not self.edits:
            refuse_idle(self, "", ("reference_resolution",), "edits gives no references")
        if self.prompt is not None and self.prompts:
            raise ValueError("prompt and prompts are both given; put the one among the others, prompts=[...]")
        self.adapters = [expanded(path) for path in self.adapters]
        for what in ("prompts", "seeds", "weights", "adapters", "precisions"):
            twice = [one for one, times in Counter(getattr(self, what)).items() if times > 1]
            if twice:
                raise ValueError(f"{what} has {twice[0]!r} twice; give each once")
        check_once(self.edits)
        if not self.seeds:
            raise ValueError("seeds is []; give at least one, as in seeds=[0]")
        if not self.out:
            raise ValueError("out is empty; give a folder")
        if bad := [weight for weight in self.weights if not math.isfinite(weight)]:
            raise ValueError(f"weights has {bad[0]}; give numbers")
        if self.adapters and self.adapter.path is not None:
            raise ValueError("adapters and adapter.path are both given; put the one among the others, adapters=[...]")
        if self.precisions and self.precision != Precision():
            raise ValueError("precisions and precision are both given; put the one among the others, precisions=[...]")
        for name in self.precisions:
            precision_named(name)
        if self.adapter.path is None and not self.adapters:
            refuse_idle(self, "", ("weights",), "adapter.path is null")
        if self.weights:
            refuse_idle(self.adapter, "adapter.", ("weight",), "weights says the strengths")
        refuse_idle(self.adapter, "adapter.", ("name",), "pictures are named by their prompts")

    def all_prompts(self) -> list[Edit | str]:
        """What is drawn: those without references first."""
        return [*(self.prompts if self.prompt is None else [self.prompt]), *self.edits]

    def columns(self) -> list[Column]:
        """The ways in which every prompt is drawn, in the order of the contact sheet."""
        paths = self.adapters or ([] if self.adapter.path is None else [self.adapter.path])
        on = [(path, weight) for path in paths for weight in self.weights or [self.adapter.weight]]
        at: list[str | None] = [*self.precisions] or [None]
        return [Column(name, *each) for name in at for each in on] or [Column(name, None, None) for name in at]

    def at(self, column: Column) -> Draw:
        """The settings of one column alone."""
        trained = Trained() if column.adapter is None else replace(self.adapter, path=column.adapter)
        if column.strength is not None:
            trained = replace(trained, weight=column.strength)
        precision = self.precision if column.precision is None else precision_named(column.precision)
        return replace(self, adapter=trained, precision=precision, adapters=[], precisions=[], weights=[])

    def title(self, column: Column) -> str:
        """A column's name in the contact sheet."""
        words = [] if column.precision is None else [column.precision]
        if column.adapter is None:
            words.append("base")
        elif self.adapters:
            words.append(short_names(self.adapters)[column.adapter])
        return ", ".join([*words, *([] if column.strength is None else [f"weight {column.strength:g}"])])

    def ending(self, column: Column) -> str:
        """What tells a column's files from those of others."""
        adapter = short_names(self.adapters)[column.adapter or ""] if len(self.adapters) > 1 else None
        # repr, not :g, of which two strengths may have one
        weight = f"w{column.strength!r}" if len(self.weights) > 1 else None
        precision = column.precision if len(self.precisions) > 1 else None
        return "".join(f"-{word}" for word in (adapter, weight, precision) if word)


class Column(NamedTuple):
    """A way in which every prompt is drawn. None: the one that the settings say, or nothing."""

    precision: str | None
    adapter: str | None
    strength: float | None


@dataclass(frozen=True)
class Planned:
    """One picture: what it shows, and its file."""

    prompt: str
    seed: int
    column: Column
    file: Path
    references: tuple[str, ...] = ()

    @property
    def row(self) -> str:
        """Its row in the contact sheet."""
        return f"{label(self.prompt, self.references)} [seed {self.seed}]"


def precision_named(name: str) -> Precision:
    """A file of configs/precision.

    Raises:
        ValueError: there is none of that name.
    """
    folder = CONFIGS / "precision"
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if name not in known:
        raise ValueError(f"precisions has {name!r}; choose among {', '.join(known)}")
    return Precision(**yaml.safe_load((folder / f"{name}.yaml").read_bytes()))


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Of each path as many of its last parts as tell it from the others, as a part of a file's name."""
    for count in range(1, 20):
        names = [re.sub(r"[^\w.-]+", "-", "-".join(Path(path).parts[-count:])).strip("-.") for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(paths, names, strict=True))


def adapters_at(chosen: Trained) -> Trained:
    """The adapters that are on; one of weight 0 is none at all."""
    if chosen.path is None:
        return Trained()
    on = [one for one in (Weighted(chosen.path, chosen.weight), *chosen.also) if one.weight]
    return Trained(on[0].path, None, on[0].weight, on[1:]) if on else Trained()


def plan_pictures(options: Draw) -> list[Planned]:
    """Every picture in the order of the contact sheet, named by its prompt's first words, its seed and its column."""
    found, taken = [], set[str]()
    for asked in options.all_prompts():
        prompt, references = (asked, ()) if isinstance(asked, str) else (asked.prompt, tuple(asked.references))
        words = re.sub(r"[^\w]+", "-", prompt)[:WORDS].strip("-").lower() or "empty"
        words = words.encode()[: 4 * WORDS].decode(errors="ignore")
        name, number = words, 2
        while name in taken:
            name, number = f"{words}-{number}", number + 1
        taken.add(name)
        for seed in options.seeds:
            for column in options.columns():
                file = Path(options.out) / f"{name}-{seed}{options.ending(column)}.png"
                found.append(Planned(prompt, seed, column, file, references))
    return found


def sheet_file(options: Draw) -> Path | None:
    """The contact sheet's file; None for a single picture."""
    return Path(options.out) / "sheet.png" if len(plan_pictures(options)) > 1 else None


def check_draw(options: Draw) -> torch.device:
    """See that everything that a drawing names is there and none of its files is; returns the device.

    Raises:
        ValueError: something is not.
    """
    check_named(options)
    return pick_device(options.device)


def check_named(options: Draw) -> None:
    """The same without the device, for which torch is imported."""
    if options.like is not None:
        raise ValueError(f"like is {options.like!r}; it is read on the command line of infer/draw.py alone")
    if not options.all_prompts():
        raise ValueError('there is no prompt; give prompt="a cup on a table", or prompts=@FILE with one a line')
    check_device_name(options.device)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {options.out!r}, which is a file; give a folder")
    files = [one.file for one in plan_pictures(options)]
    sheet = sheet_file(options)
    if there := [file for file in (*files, *([] if sheet is None else [sheet])) if file.exists()]:
        free = next(name for n in range(2, 10**6) if not Path(name := f"{options.out.rstrip('/')}-{n}").exists())
        raise ValueError(f"{there[0]} exists; choose another folder, such as out={free}")
    check_model(options.model)
    check_edits(options.edits, options.model, options.adapter.path is not None or bool(options.adapters))
    for column in options.columns():
        options.at(column).adapter.all()
