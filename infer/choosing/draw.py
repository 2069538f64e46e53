"""The grid drawn: the base and every checkpoint at every strength, with one model that stays loaded."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from infer.adapter.attach import remove_adapter
from infer.adapter.checks import check_guidance, check_running
from infer.adapter.read import FILE
from infer.adapter.selection import Trained, load_chosen
from infer.adapter.write import write_pairs
from infer.checkpoint.family import own_size, unguided
from infer.checkpoint.files import read_config
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.choosing.best import Entry, choose_best
from infer.choosing.run import RunFiles, read_checkpoint_pairs
from infer.choosing.settings import Choose, references_of
from infer.device.device import describe_device, release
from infer.fast.cuda_graph import Sampler
from infer.fast.install import choose_path, hold_of
from infer.fast.ready_kernels import prepare_kernels
from infer.program.atomic import replace_file
from infer.quantize.compute import stored_on
from infer.report.curves import STAGES
from infer.report.results import Row, Stage
from infer.rounding.layer_errors import decide
from infer.sample.encode import decode, drawn_texts, text_encoder
from infer.sample.generate import draw, settled
from infer.sample.warm_up import draw_unseen
from infer.score.networks import check_networks
from infer.score.pairs import Key, key_of
from infer.score.score_all import score_all

RESULT = "choice.json"


def draw_choice(options: Choose, files: RunFiles, device: torch.device) -> dict[str, Any]:
    """Draw the grid, score it, and write runs/<run>/choose; returns what choice.json says.

    Raises:
        ValueError: something cannot be drawn, or a network is absent.
    """
    check_networks(options.networks)
    model = files.model
    check_guidance(model, options.sampling.guidance)
    sampling = settled(options.sampling, model)
    sampling = replace(sampling, guidance=None) if unguided(model) else sampling
    out = files.folder / "choose"
    shutil.rmtree(out / "new", ignore_errors=True)
    (out / "new" / "images").mkdir(parents=True)
    adapters: dict[str, str] = {}
    for name in files.checkpoints:
        place = out / "new" / "adapters" / name
        write_pairs(read_checkpoint_pairs(files, name), "diffusers", place / FILE, {"step": files.checkpoints[name]})
        adapters[name] = str(place)
    try:
        said = _drawn(options, files, device, sampling, out / "new", adapters)
    finally:
        shutil.rmtree(out / "new" / "adapters", ignore_errors=True)
    shutil.rmtree(out / "images", ignore_errors=True)
    (out / "new" / "images").rename(out / "images")
    (out / "new").rmdir()
    replace_file(out / RESULT, lambda path: path.write_text(json.dumps(said, ensure_ascii=False), encoding="utf-8"))
    return said


def _drawn(
    options: Choose, files: RunFiles, device: torch.device, sampling: Any, out: Path, adapters: dict[str, str]
) -> dict[str, Any]:
    model, memory = files.model, options.memory
    prompts = options.prompts or files.prompts
    every = list(dict.fromkeys([*prompts, *options.unrelated]))
    size = sampling.size(own_size(model))
    states: list[tuple[str | None, float]] = [(None, 1.0), *((n, w) for n in adapters for w in options.weights)]
    precision = files.precision
    for name, weight in states:
        chosen = Trained() if name is None else Trained(adapters[name], None, weight)
        memory = check_running(model, precision, chosen, None, memory, device)
    precision = stored_on(decide(model, precision, device, print), device)
    rows: list[Row] = []
    latents: dict[Key, Tensor] = {}
    prepare_kernels(read_config(model, "transformer"), precision, memory, device)
    with tqdm(total=len(states) * len(every), unit="picture", desc="draw") as bar:
        with text_encoder(model, precision, device, files.text_length) as encoder:
            texts = dict(zip(every, drawn_texts(model, encoder, every), strict=True))
        transformer = load_transformer(model, precision, device, hold_of(memory))
        vae, scheduler = load_vae(model, device), load_scheduler(model)
        path, offload = choose_path(transformer, memory, precision, device, bar.write)
        if path.graphs(device):
            Sampler(transformer, offload)
        once = replace(sampling, steps=1)
        warm_up = partial(draw_unseen, vae, transformer, scheduler, texts[every[0]], 0, once, size, device)
        on: list[str] = []
        for number, (name, weight) in enumerate(states):
            for old in on:
                remove_adapter(transformer, old, model)
            on = [] if name is None else load_chosen(transformer, Trained(adapters[name], None, weight), model)
            if offload is not None:
                assert memory.budget_gib is not None
                offload.fit(memory.budget_gib, warm_up)
            bar.set_postfix_str(_label(name, weight) or "base")
            for i, prompt in enumerate(every):
                began = time.perf_counter()
                packed = draw(transformer, scheduler, texts[prompt], options.seed, sampling, size, device)
                picture, image = decode(vae, packed, *size), f"images/{number:03d}-{i:02d}.png"
                picture.save(out / image)
                row = _row(
                    precision.kind, _label(name, weight), prompt, options.seed, image, time.perf_counter() - began
                )
                rows.append(row)
                latents[key_of(row)] = packed.cpu()
                bar.update()
        del transformer, vae, warm_up, offload
        release(device)
    own = [row for row in rows if row.prompt in prompts]
    others = [row for row in rows if row.prompt not in prompts]
    training = references_of(options, files)
    scored = score_all(own, others, [], out, latents, None, {}, options.networks, training, {}, device)
    usual = scored.references.nearest_rms
    entries = [
        _entry(name, files.checkpoints[name], weight, files, own, others) for name, weight in states if name is not None
    ]
    best, reason = choose_best(entries, usual)
    return {
        "run": options.run,
        "seed": options.seed,
        "prompts": prompts,
        "unrelated": [prompt for prompt in options.unrelated if prompt not in prompts],
        "base": [row.image for row in own if row.adapter is None],
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


def _row(precision: str, adapter: str | None, prompt: str, seed: int, image: str, seconds: float) -> Row:
    return Row(
        precision=precision,
        adapter=adapter,
        prompt=prompt,
        seed=seed,
        image=image,
        seconds=seconds,
        seconds_per_step=0.0,
        weights_bytes=0,
        peak_memory_bytes=0,
        scores={},
        stages={stage: Stage(0.0, 0) for stage in STAGES},
    )


def _entry(name: str, step: int, weight: float, files: RunFiles, own: list[Row], others: list[Row]) -> Entry:
    def scores(rows: list[Row], what: str) -> list[float]:
        mine = [row.scores.get(what) for row in rows if row.adapter == _label(name, weight)]
        return [value for value in mine if value is not None]

    def mean(rows: list[Row], what: str) -> float | None:
        values = scores(rows, what)
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
        [row.image for row in own if row.adapter == _label(name, weight)],
    )
