"""What training methods do on the bundled model: likeness of a subject, and how far it bleeds, over several seeds.

    python scripts/tiny/methods.py runs/methods.jsonl --sets preservation --seeds 0 1 2 3 4
    python scripts/tiny/methods.py runs/methods.jsonl --table

The subject is a star with a black line around it, in 24 pictures whose captions call it `dotted star`: a trigger that
the model's text encoders tell apart. Of words that they never saw (--trigger zelk) CLIP's vector changes by 4 % alone,
and the model can hardly tell subject and class. Each run is one of train.py's own. Its adapter draws prompts of the
subject, of its class (the same without the trigger) and of other shapes, and scripts/tiny/check.py reads the pictures
back. A line of the file is a run; what is there is not run again.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from infer.adapter.attach import load_adapter
from infer.adapter.lora import Adapter
from infer.adapter.switch import without_adapter
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.device.device import pick_device
from infer.family.family import Text
from infer.family.find import of_model
from infer.family.packing import pack
from infer.fast.memory import Memory
from infer.program.atomic import replace_file
from infer.program.errors import explained
from infer.program.paths import ROOT
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision
from infer.report.markdown import plain_table
from infer.sample.encode import decode, text_encoder
from infer.score.bootstrap import interval
from scripts.tiny import world
from scripts.tiny.check import inked, right
from train.data.dataset import Data, Prior
from train.objective.flow_matching import Flow
from train.objective.optim import Optim
from train.objective.preservation import Preserve
from train.run.config import Train
from train.train import train

SHAPE = "star"
PICTURES, PROMPTS, STEPS, GUIDANCE = 24, 12, 16, 2.0
SIDE = world.SIZE
MODEL, PRECISION = Model(str(ROOT / "scripts" / "tiny" / "model")), Precision("nf4")
ADAPTER = Adapter(16, 16.0, targets="attention+mlp")
OPTIM = Optim(lr=1e-3, schedule="cosine", warmup=10)
PRIOR = Prior(prompt="a star on a white background", count=24)


def scenes(count: int, seed: int, shapes: tuple[str, ...]) -> list[world.Scene]:
    """Scenes of one thing of these shapes, of pairs of shape and colour that the model knows."""
    rng, found = random.Random(f"methods {seed}"), list[world.Scene]()
    while len(found) < count:
        scene = world.sample_scene(rng)
        if scene.kind == "single" and scene.things[0].shape in shapes:
            found.append(replace(scene, things=(replace(scene.things[0], texture="plain"),)))
    return found


def of_subject(caption: str, trigger: str) -> str:
    return caption.replace(f" {SHAPE}", f" {trigger} {SHAPE}")


def make_pictures(folder: Path, trigger: str) -> None:
    """The training set; the same bytes every time."""
    lines = []
    for i, scene in enumerate(scenes(PICTURES, 0, (SHAPE,))):
        pixels = world.paint(world.canvas([scene], "inked"))[0]
        picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        replace_file(folder / f"{i:02d}.png", partial(picture.save, format="PNG"))
        lines.append(json.dumps({"file_name": f"{i:02d}.png", "text": of_subject(world.describe(scene), trigger)}))
    replace_file(folder / "metadata.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))


def prompts(trigger: str) -> dict[str, list[str]]:
    """Of the subject, its class and other shapes: scenes that no training picture shows."""
    stars = [world.describe(scene) for scene in scenes(PROMPTS, 1, (SHAPE,))]
    others = tuple(shape for shape in world.SHAPES if shape != SHAPE)
    return {
        "subject": [of_subject(star, trigger) for star in stars],
        "class": stars,
        "unrelated": [world.describe(scene) for scene in scenes(PROMPTS, 2, others)],
    }


def variants() -> dict[str, dict[str, dict[str, Any]]]:
    """By set and name, what differs from the common settings."""
    preserve: dict[str, dict[str, Any]] = {
        "nothing": {},
        "prior": {"prior": PRIOR},
        "class": {"preserve": Preserve("class", SHAPE)},
        "empty": {"preserve": Preserve("empty")},
        "class, weight 0.3": {"preserve": Preserve("class", SHAPE, 0.3)},
        "prior and class": {"prior": PRIOR, "preserve": Preserve("class", SHAPE)},
    }
    objectives = {
        "mse": {},
        "huber": {"flow": Flow(loss="huber")},
        "huber, snr": {"flow": Flow(loss="huber", loss_schedule="snr")},
        "huber, exponential": {"flow": Flow(loss="huber", loss_schedule="exponential")},
        "smooth_l1": {"flow": Flow(loss="smooth_l1")},
        "mae": {"flow": Flow(loss="mae")},
        "sigma_sqrt": {"flow": Flow(weighting="sigma_sqrt")},
        "cosmap": {"flow": Flow(weighting="cosmap")},
        "bell": {"flow": Flow(weighting="bell")},
        "min_snr": {"flow": Flow(weighting="min_snr")},
        "uniform": {"flow": Flow("uniform")},
        "mode": {"flow": Flow("mode")},
        "shifted": {"flow": Flow("shifted")},
    }
    adapters = {
        f"{name}, {rate:g}": {"adapter": adapter, "optim": replace(OPTIM, lr=rate)}
        for name, adapter, rates in (
            ("lora", ADAPTER, (1e-3, 3e-3)),
            ("dora", replace(ADAPTER, dora=True), (1e-3, 3e-3)),
            ("lokr", replace(ADAPTER, kind="lokr", factor=8), (1e-3, 3e-3, 1e-2)),
            ("lokr, rank 64", replace(ADAPTER, kind="lokr", factor=8, rank=64), (1e-3, 3e-3, 1e-2)),
            ("loha", replace(ADAPTER, kind="loha"), (1e-3, 3e-3, 1e-2)),
            ("oft", replace(ADAPTER, kind="oft"), (3e-4, 1e-3, 3e-3)),
        )
        for rate in rates
    }
    return {"preservation": preserve, "objectives": objectives, "adapters": adapters}


def job_of(
    changes: dict[str, Any], seed: int, steps: int, pictures: Path, trigger: str, device: str, name: str
) -> Train:
    given = dict(changes)
    data = Data(str(pictures), SIDE, 4, trigger=trigger, validation=0.15, prior=given.pop("prior", Prior()))
    job = Train(
        MODEL, PRECISION, ADAPTER, data, optim=OPTIM, flow=Flow(),
        memory=Memory("everything", compile=False, graph=False if device == "cuda" else None),
        seed=seed, steps=steps, validate_every=0, previews=[], save_every=0, save_minutes=0, device=device, run=name,
    )  # fmt: skip
    return replace(job, **given)


def encode(every: list[str], device: torch.device) -> dict[str, Text]:
    with text_encoder(MODEL, PRECISION, device, None) as encoder:
        return dict(zip(every, encoder(every), strict=True))


def draw(transformer: Any, texts: list[Text], device: torch.device) -> torch.Tensor:
    """Packed latents of one picture a text, seeds 0 upwards, all at once."""
    dtype, count = compute_dtype_of(transformer), len(texts)
    start = torch.stack(
        [torch.randn(16, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(i)) for i in range(count)]
    )
    latents = pack(start).to(device, dtype)
    embeds = torch.stack([text.embeds for text in texts]).to(device, dtype)
    pooled = torch.stack([text.pooled for text in texts if text.pooled is not None]).to(device, dtype)
    family, scheduler = of_model(transformer), load_scheduler(MODEL)
    given = family.inputs(transformer.config, latents, SIDE // 8, SIDE // 8, embeds, pooled, GUIDANCE, dtype)
    mu = family.mu(scheduler.config, latents.shape[1], STEPS)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / STEPS, STEPS), device=device, mu=mu)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time_step = (t.expand(count) / 1000).to(dtype)
            velocity = transformer(**(given | {"hidden_states": latents}), timestep=time_step, return_dict=False)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def judge(adapter: Path, texts: dict[str, Text], trigger: str, device: torch.device) -> dict[str, float]:
    """Of each kind of prompt: the share that is inked, the share that is right, and how far the adapter moves it."""
    transformer, vae = load_transformer(MODEL, PRECISION, device).eval(), load_vae(MODEL, device)
    load_adapter(transformer, str(adapter), "mine", MODEL)
    found = {}
    for kind, wanted in prompts(trigger).items():
        own = [texts[prompt] for prompt in wanted]
        latents = draw(transformer, own, device)
        with without_adapter(transformer):
            base = draw(transformer, own, device)
        moved = (latents - base).float().flatten(1).norm(dim=1) / base.float().flatten(1).norm(dim=1)
        plain = [prompt.replace(f"{trigger} ", "") for prompt in wanted]
        pictures = [decode(vae, one[None], SIDE, SIDE) for one in latents]
        found[f"{kind}_inked"] = fmean(map(inked, pictures, plain))
        found[f"{kind}_right"] = fmean(map(right, pictures, plain))
        found[f"{kind}_moved"] = float(moved.mean())
    return found


def figures(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    seconds = median([line["seconds"] for line in lines if "seconds" in line][5:])
    found = {"seconds_per_step": seconds, "validation_loss": validated[-1]["validation_loss"]}
    return found | {k: v for k, v in validated[-1].items() if k == "validation_preservation"}


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds with 95 % limits, a line a variant."""
    columns = ("subject_inked", "subject_right", "class_inked", "class_moved", "unrelated_inked", "unrelated_moved",
               "validation_loss", "seconds_per_step")  # fmt: skip
    lines = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == name]
        cells = [name, str(len(own))]
        for column in columns:
            found = interval([row[column] for row in own], [(row["seed"], 0) for row in own])
            assert found is not None
            limits = "" if found.low is None else f" ({found.low:.2f} to {found.high:.2f})"
            cells.append(f"{found.mean:.2f}{limits}" if column != "validation_loss" else f"{found.mean:.4f}")
        lines.append(cells)
    return plain_table([["variant", "seeds", *columns], *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a JSON line a run")
    parser.add_argument("--sets", nargs="+", default=list(variants()), choices=list(variants()))
    parser.add_argument("--only", nargs="+", help="these variants alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--trigger", default="dotted")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--table", action="store_true", help="show what is there, and run nothing")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.is_file() else []
    if args.table:
        print(table(rows))
        return
    began, device = time.monotonic(), pick_device(args.device)
    pictures = args.out.parent / f"{args.out.stem}-pictures"
    make_pictures(pictures, args.trigger)
    texts = encode(list(dict.fromkeys(text for kind in prompts(args.trigger).values() for text in kind)), device)
    done = {(row["variant"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for chosen in args.sets:
            for name, changes in variants()[chosen].items():
                if args.only is not None and name not in args.only:
                    continue
                if (name, seed) in done or time.monotonic() - began > args.seconds:
                    continue
                done.add((name, seed))
                run = f"{args.out.stem}-{name.replace(' ', '_').replace(',', '')}-{seed}"
                job = job_of(changes, seed, args.steps, pictures, args.trigger, device.type, run)
                adapter = train(job)
                row = {"variant": name, "seed": seed, "steps": args.steps, **figures(adapter.parent)}
                row |= judge(adapter, texts, args.trigger, device)
                with args.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


if __name__ == "__main__":
    with explained():
        main()
