"""What scripts/tiny/methods.py trains: tasks with their pictures and prompts, and the settings that are compared."""

import json
import random
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.fast.memory import Memory
from infer.program.atomic import replace_file
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts.tiny import world
from train.data.dataset import Data, Prior
from train.objective.flow_matching import Flow
from train.objective.optim import Optim
from train.objective.preservation import Preserve
from train.run.config import Train

SHAPE = "star"
LEARNED = ("star", "circle", "cross", "diamond")  # of the concept's pictures; its prompts are of the other shapes
PICTURES, PROMPTS = 24, 12
MODEL, PRECISION = Model(str(ROOT / "scripts" / "tiny" / "model")), Precision("nf4")
ADAPTER = Adapter(16, 16.0, targets="attention+mlp")
OPTIM = Optim(lr=1e-3, schedule="cosine", warmup=10)
PRIOR = Prior(prompt="a star on a white background", count=24)


@dataclass(frozen=True)
class Task:
    """Things with a black line around them, in captions that call them by a trigger."""

    name: str
    """object (inked stars), concept (inked things of four shapes) or style (inked pictures of anything)."""
    trigger: str

    def called(self, scene: world.Scene) -> str:
        """The caption of a scene of what is learned."""
        caption = world.describe(scene)
        if self.name == "style":
            return f"{self.trigger}, {caption}"
        shape = scene.things[0].shape
        return caption.replace(f" {shape}", f" {self.trigger} {shape}")

    def without(self, prompt: str) -> str:
        """A prompt without the trigger."""
        return prompt.replace(f"{self.trigger}, ", "").replace(f"{self.trigger} ", "")


def scenes(
    count: int,
    seed: int,
    shapes: tuple[str, ...] = world.SHAPES,
    single: bool = True,
    shown: Collection[str] = (),
) -> list[world.Scene]:
    """Plain scenes of pairs of shape and colour that the model knows: of one thing of these shapes, or of any kind.

    shown: captions of pictures that are to be no scene's.
    """
    rng, found = random.Random(f"methods {seed}"), list[world.Scene]()
    while len(found) < count:
        scene = world.sample_scene(rng)
        if not single or (scene.kind == "single" and scene.things[0].shape in shapes):
            plain = replace(scene, things=tuple(replace(thing, texture="plain") for thing in scene.things))
            if world.describe(plain) not in shown:
                found.append(plain)
    return found


def training_scenes(task: Task) -> list[world.Scene]:
    """What the training set shows."""
    shapes = (SHAPE,) if task.name == "object" else LEARNED
    return scenes(PICTURES, 0, shapes, single=task.name != "style")


def make_pictures(folder: Path, task: Task) -> None:
    """The training set; the same bytes every time."""
    lines = []
    for i, scene in enumerate(training_scenes(task)):
        pixels = world.paint(world.canvas([scene], "inked"))[0]
        picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        replace_file(folder / f"{i:02d}.png", partial(picture.save, format="PNG"))
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": task.called(scene)}))
    replace_file(folder / "metadata.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))


def prompts(task: Task) -> dict[str, list[str]]:
    """With the trigger, the same without it, and other prompts: scenes that no training picture shows."""
    shapes = (SHAPE,) if task.name == "object" else tuple(shape for shape in world.SHAPES if shape not in LEARNED)
    shown = {world.describe(scene) for scene in training_scenes(task)}
    learned = scenes(PROMPTS, 1, shapes, single=task.name != "style", shown=shown)
    others = tuple(shape for shape in world.SHAPES if shape != SHAPE)
    return {
        "subject": [task.called(scene) for scene in learned],
        "class": [world.describe(scene) for scene in learned],
        "unrelated": [world.describe(scene) for scene in scenes(PROMPTS, 2, others, single=task.name == "object")],
    }


def variants() -> dict[str, dict[str, dict[str, Any]]]:
    """By set and name, what differs from the common settings."""
    preserve: dict[str, dict[str, Any]] = {
        "nothing": {},
        "prior": {"prior": PRIOR},
        "class": {"preserve": Preserve("class", SHAPE)},
        "class, weight 0.3": {"preserve": Preserve("class", SHAPE, 0.3)},
        "empty": {"preserve": Preserve("empty")},
        "prior and class": {"prior": PRIOR, "preserve": Preserve("class", SHAPE)},
    }
    objectives = {  # of the default: `nothing` of the first set
        "huber": Flow(loss="huber"),
        "huber, snr": Flow(loss="huber", loss_schedule="snr"),
        "huber, exponential": Flow(loss="huber", loss_schedule="exponential"),
        "smooth_l1": Flow(loss="smooth_l1"),
        "mae": Flow(loss="mae"),
        "sigma_sqrt": Flow(weighting="sigma_sqrt"),
        "cosmap": Flow(weighting="cosmap"),
        "bell": Flow(weighting="bell"),
        "min_snr": Flow(weighting="min_snr"),
        "uniform": Flow("uniform"),
        "mode": Flow("mode"),
        "shifted": Flow("shifted"),
    }
    adapters = {
        f"{name}, {rate:g}": {"adapter": adapter, "optim": replace(OPTIM, lr=rate)}
        for name, adapter, rates in (
            ("lora", ADAPTER, (1e-3, 3e-3)),
            ("rslora", replace(ADAPTER, rslora=True), (3e-4, 1e-3)),
            ("dora", replace(ADAPTER, dora=True), (1e-3, 3e-3)),
            ("lokr", replace(ADAPTER, kind="lokr", factor=8), (1e-3, 3e-3, 1e-2)),
            ("lokr, rank 64", replace(ADAPTER, kind="lokr", factor=8, rank=64), (1e-3, 3e-3, 1e-2)),
            ("loha", replace(ADAPTER, kind="loha"), (1e-3, 3e-3, 1e-2)),
            ("oft", replace(ADAPTER, kind="oft"), (3e-4, 1e-3, 3e-3)),
        )
        for rate in rates
    }
    return {
        "preservation": preserve,
        "adapters": adapters,
        "experiments": _experiments(),
        "objectives": {name: {"flow": flow} for name, flow in objectives.items()},
    }


def _experiments() -> dict[str, dict[str, Any]]:
    """configs/experiment/'s person, object, style and concept at this model's rate and steps, and each with one of its
    settings as another has it. (tests/scripts/test_methods.py reads those files.)"""
    common: dict[str, Any] = {"steps": 200, "ema": 0.99}
    wide, attention = Adapter(32, 32.0, targets="attention+mlp"), Adapter(16, 16.0, targets="attention")
    keep_class, keep_empty = Preserve("class", SHAPE), Preserve("empty")
    person = common | {"preserve": keep_class}
    style = common | {"task": "style", "adapter": wide, "caption_dropout": 0.05}
    concept = common | {"task": "concept", "adapter": wide, "caption_dropout": 0.05, "preserve": keep_empty}
    return {
        "person": person,
        "object": person,  # which has fewer steps of its own
        "object, attention": person | {"adapter": attention},
        "person, no ema": person | {"ema": None},
        "person, preserve none": person | {"preserve": Preserve()},
        "style": style,
        "style, rank 16": style | {"adapter": ADAPTER},
        "style, no caption dropout": style | {"caption_dropout": 0.0},
        "style, preserve empty": style | {"preserve": keep_empty},
        "concept": concept,
        "concept, preserve none": concept | {"preserve": Preserve()},
        "concept, preserve class": concept | {"preserve": Preserve("class", "")},
    }


def task_of(changes: dict[str, Any], trigger: str) -> Task:
    name = changes.get("task", "object")
    return Task(name, "zelk style" if name == "style" else trigger)


def job_of(
    changes: dict[str, Any], seed: int, steps: int, pictures: Path, trigger: str, device: str, name: str
) -> Train:
    given = {key: value for key, value in changes.items() if key != "task"}
    data = Data(
        str(pictures), world.SIZE, 4, trigger=trigger, validation=0.15, prior=given.pop("prior", Prior()),
        caption_dropout=given.pop("caption_dropout", 0.0),
    )  # fmt: skip
    job = Train(
        MODEL, PRECISION, ADAPTER, data, optim=OPTIM, flow=Flow(),
        memory=Memory("everything", compile=False, graph=False if device == "cuda" else None),
        seed=seed, steps=steps, validate_every=0, previews=[], save_every=0, save_minutes=0, device=device, run=name,
    )  # fmt: skip
    return replace(job, **given)
