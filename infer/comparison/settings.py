"""The settings of a comparison, and what can be checked of them before torch is imported."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import TYPE_CHECKING

from infer.adapter.read import find_adapter
from infer.adapter.second import check_same_start, second_model, short_name
from infer.adapter.selection import Trained
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.device.device import check_device_name, pick_device
from infer.fast.memory import Memory
from infer.program.bounds import TOKENS, check_most
from infer.program.no_effect import refuse_idle
from infer.program.paths import expand, expanded
from infer.program.run_names import check_file_names, check_run_name
from infer.quantize.precision import Precision
from infer.sample.edit import Edit, check_edits, check_once, check_resolution
from infer.sample.generate import Sampling
from infer.score.judges import Networks, check_paths, find_scores, list_pictures

if TYPE_CHECKING:
    import torch

TAKEN_SCORES = re.compile(
    r"(psnr|ssim|latents|lpips|drift|bleed|kept|changed|target)(_.*)?|nearest_(rms|dino)|clip_[ti]|image_reward|dino"
    r"|kid|cmmd"
)


@dataclass
class Compare:
    """One comparison."""

    model: Model = field(default_factory=Model)
    precisions: dict[str, Precision] = field(default_factory=dict)
    """By the names that the report shows; the one of kind bf16 is what the others are compared with."""
    only: list[str] | None = None
    """Names of the precisions to run; null runs all."""
    adapter: Trained = field(default_factory=Trained)
    recovery: dict[str, str] = field(default_factory=dict)
    """Recovery adapters (infer/recover.py) by the names of the precisions that they belong to, always on there."""
    prompts: list[str] = field(default_factory=list)
    """What is drawn, at every precision and with every seed."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """Of the noise: each prompt is drawn once with each."""
    sampling: Sampling = field(default_factory=Sampling)
    memory: Memory = field(default_factory=Memory)
    text_length: int | None = None
    """text tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    edits: list[Edit] = field(default_factory=list)
    """Prompts with reference pictures, drawn after `prompts`, as in
    `edits=[{prompt: make it blue, references: [before.png], mask: star.png}]`; mask and target are for scores."""
    reference_resolution: int | None = None
    """Pixels a side of the square that a reference has about as many pixels as; null takes the size that the family's
    pipeline in diffusers gives it: about 1024 for FLUX.1 Kontext, its own up to 1024 for FLUX.2."""
    unrelated: list[str] = field(default_factory=list)
    """Prompts that the adapter has nothing to do with: what it changes there is its drift. None draws none."""
    class_prompts: list[str] = field(default_factory=list)
    """Prompts of the class without the trigger, as 'a dog' beside 'sks dog': what the adapter changes there has bled
    into the class. None draws none."""
    references: str | None = None
    """The folder of the training pictures, to see how like them the pictures are, and whether any was learned by heart;
    null leaves these scores out."""
    networks: Networks = field(default_factory=Networks)
    scores: dict[str, str] = field(default_factory=dict)
    """More scores: a name and the dotted path of a function (picture, prompt) -> number."""
    run: str = "compare"
    """Its folder is runs/<run>; the report goes to runs/<run>/compare."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        check_most(self, "", text_length=TOKENS)
        expand(self, "references")
        self.recovery = {name: expanded(path) for name, path in self.recovery.items()}
        if not (self.prompts or self.edits) or not self.seeds:
            raise ValueError(
                "compare needs at least one of prompts and of seeds, as in 'prompts=[a red star]' 'seeds=[0]'"
            )
        check_once(self.edits)
        check_resolution("reference_resolution", self.reference_resolution)
        if not self.edits:
            refuse_idle(self, "", ("reference_resolution",), "edits gives no references")
        for seed in self.seeds:
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"seeds has {seed}; a seed has 64 bits: choose one below {2**63}")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"text_length is {self.text_length}; it must be 1 or more, or null")
        check_file_names("precisions", self.precisions)
        if "base" in self.precisions:
            raise ValueError("precisions has the name 'base', which is what runs without the adapter; rename it")
        if both := [name for name in self.precisions if f"{name}-adapter" in self.precisions]:
            raise ValueError(
                f"precisions has {both[0]} and {both[0]}-adapter, whose pictures have one name; rename one"
            )
        for name in self.scores:
            if TAKEN_SCORES.fullmatch(name):
                raise ValueError(f"scores.{name} has the name of a score that is measured anyway; choose another one")
        for what in ("prompts", "seeds", "unrelated", "class_prompts"):
            twice = [one for one, times in Counter(getattr(self, what)).items() if times > 1]
            if twice:
                raise ValueError(f"{what} has {twice[0]!r} twice; give each once")
        unknown = set(self.only or []) - set(self.precisions)
        if unknown or not self.precisions or self.only == []:
            raise ValueError(f"only names {sorted(unknown)}; choose from {', '.join(self.precisions)}")
        for name in self.recovery:
            if name not in self.precisions:
                raise ValueError(f"recovery names {name!r}, which is none of {', '.join(self.precisions)}")
            if self.only is not None and name not in self.only:
                raise ValueError(f"recovery names {name!r}, which only={self.only} leaves out; name it in both or none")
        named = {name: set(getattr(self, name)) for name in ("prompts", "unrelated", "class_prompts")}
        for one, other in combinations(named, 2):
            if both := sorted(named[one] & named[other]):
                raise ValueError(f"{both[0]!r} is among {one} and among {other}; a prompt is one or the other")
        if self.adapter.path is None:
            reason = "they show what an adapter changes, and adapter.path is null"
            refuse_idle(self, "", ("unrelated", "class_prompts"), reason)


def on_second(options: Compare) -> tuple[str, Compare] | None:
    """The name of the report of what is drawn on sampling.model, and its comparison; None where there is none."""
    if options.sampling.model is None:
        return None
    second = second_model(options.model, options.sampling.model)
    # steps and guidance are the second's own
    sampling = Sampling(height=options.sampling.height, width=options.sampling.width)
    # precisions of kind auto are settled in place, of each checkpoint by its own layers
    settings = replace(options, model=second, sampling=sampling, precisions=dict(options.precisions))
    return f"compare-{short_name(second)}", settings


def check_compare(options: Compare) -> torch.device:
    """See that everything that a comparison names is there; returns the device.

    Raises:
        ValueError: something is not.
    """
    check_device_name(options.device)
    check_run_name(options.run)
    check_model(options.model)
    check_edits(options.edits, options.model, options.adapter.path is not None, scored=True)
    check_paths(options.networks)
    if options.references is not None:
        list_pictures(options.references)
    options.adapter.all()
    if options.sampling.model is not None:
        second = second_model(options.model, options.sampling.model)
        check_edits(options.edits, second, options.adapter.path is not None, scored=True)
        check_same_start([one.path for one in options.adapter.all()], bool(options.recovery))
    for path in options.recovery.values():
        find_adapter(path)
    find_scores(options.scores)
    return pick_device(options.device)
