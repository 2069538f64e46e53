"""The grid drawn: the base and every checkpoint at every strength, with one model that stays loaded."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infer.adapter.checks import check_guidance
from infer.adapter.selection import Trained
from infer.checkpoint.family import own_size, unguided
from infer.choosing.best import Entry, choose_best
from infer.choosing.run import RESULT, RunFiles, checkpoint_file
from infer.choosing.settings import Choose, references_of
from infer.device.device import describe_device
from infer.drawing.loaded import Held, free, load_rest, put_on, read_texts, settle, take
from infer.program.atomic import replace_file
from infer.sample.encode import decode
from infer.sample.generate import Sampling, draw, settled
from infer.score.networks import check_networks
from infer.score.pairs import Key, key_of
from infer.score.picture import Picture
from infer.score.score_all import score_all


def draw_choice(options: Choose, files: RunFiles, device: torch.device, held: Held | None = None) -> dict[str, Any]:
    """Draw the grid, score it, and write runs/<run>/choose; returns what choice.json says. held: the model of what was
    drawn before, as for `draw_pictures`.

    Raises:
        ValueError: something cannot be drawn, or a network is absent.
    """
    check_networks(options.networks)
    held, model = held or Held(), files.model
    check_guidance(model, options.sampling.guidance)
    sampling = settled(options.sampling, model)
    sampling = replace(sampling, guidance=None) if unguided(model) else sampling
    out = files.folder / "choose"
    shutil.rmtree(out / "new", ignore_errors=True)
    (out / "new" / "images").mkdir(parents=True)
    adapters = {name: str(checkpoint_file(files, name)) for name in files.checkpoints}
    said = _drawn(options, files, device, sampling, out / "new", adapters, held)
    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "new" / "images").rename(out / "images")
    (out / "new").rmdir()
    replace_file(out / RESULT, lambda path: path.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8"))
    return said


def _drawn(
    options: Choose,
    files: RunFiles,
    device: torch.device,
    sampling: Sampling,
    out: Path,
    adapters: dict[str, str],
    held: Held,
) -> dict[str, Any]:
    model = files.model
    prompts = options.prompts or files.prompts
    every = list(dict.fromkeys([*prompts, *options.unrelated]))
    size = sampling.size(own_size(model))
    states: list[tuple[str | None, float]] = [(None, 1.0), *((n, w) for n in adapters for w in options.weights)]
    chosen = [Trained() if name is None else Trained(adapters[name], None, weight) for name, weight in states]
    precision, memory = settle(model, files.precision, chosen, options.memory, device)
    pictures: list[Picture] = []
    latents: dict[Key, Tensor] = {}
    with tqdm(total=len(states) * len(every), unit="picture", desc="draw") as bar:
        loaded = take(held, model, precision, memory, device, files.text_length)
        texts = read_texts(held, every, bar.write)
        load_rest(loaded, bar.write)
        for number, (name, weight) in enumerate(states):
            held.between()
            put_on(loaded, chosen[number], texts[every[0]], sampling, size)
            bar.set_postfix_str(_label(name, weight) or "base")
            for i, prompt in enumerate(every):
                held.between()
                packed = draw(loaded.transformer, loaded.scheduler, texts[prompt], options.seed, sampling, size, device)
                image = f"images/{number:03d}-{i:02d}.png"
                decode(loaded.vae, packed, *size).save(out / image)
                picture = Picture(precision.kind, _label(name, weight), prompt, options.seed, image)
                pictures.append(picture)
                latents[key_of(picture)] = packed.cpu()
                bar.update()
        if not held.stays:
            del loaded
            free(held)
    own = [picture for picture in pictures if picture.prompt in prompts]
    others = [picture for picture in pictures if picture.prompt not in prompts]
    training = references_of(options, files)
    scored = score_all(own, others, [], out, latents, None, {}, options.networks, training, {}, device)
    usual = scored.references.nearest_rms
    entries = [
        _entry(name, files.checkpoints[name], weight, files, own, others) for name, weight in states if name is not None
    ]
    best, reason = choose_best(entries, usual)
    return {
        "run": options.run,
        "average": files.average,
        "seed": options.seed,
        "prompts": prompts,
        "unrelated": [prompt for prompt in options.unrelated if prompt not in prompts],
        "base": [picture.image for picture in own if picture.adapter is None],
        "entries": [asdict(entry) for entry in entries],
        "best": {"name": best.name, "weight": best.weight, "reason": reason},
        "usual": usual,
        "absent": scored.absent,
        "sampling": asdict(sampling),
        "size": list(size),
        "device": describe_device(device),
    }


def _label(name: str | None, weight: float) -> str | None:
    return None if name is None else f"{name}@{weight!r}"


def _entry(name: str, step: int, weight: float, files: RunFiles, own: list[Picture], others: list[Picture]) -> Entry:
    label = _label(name, weight)

    def scores(pictures: list[Picture], what: str) -> list[float]:
        mine = [picture.scores.get(what) for picture in pictures if picture.adapter == label]
        return [value for value in mine if value is not None]

    def mean(pictures: list[Picture], what: str) -> float | None:
        values = scores(pictures, what)
        return sum(values) / len(values) if values else None

    likeness = mean(own, "dino")
    return Entry(
        name,
        step,
        weight,
        files.loss_at(step),
        mean(others, "latents_base"),
        mean(own, "latents_base"),
        min(scores(own, "nearest_rms"), default=None),
        likeness if likeness is not None else mean(own, "clip_i"),
        [picture.image for picture in own if picture.adapter == label],
    )
