"""Scores of drawn pictures during training: how like the training pictures they are, whether they copy one, and how far
prompts that the adapter has nothing to do with are moved (`scores_every`).

The previews' prompts and `unrelated` are drawn with the adapter, or its average if there is one, and once in a run
without. The scores are those of infer/choose.py, by the same functions.
"""

import json
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import torch

from infer.adapter.switch import without_adapter
from infer.checkpoint.load import load_scheduler, load_vae
from infer.choosing.best import COPIED
from infer.device.device import release
from infer.program.atomic import replace_file
from infer.sample.encode import NotFiniteError, decode
from infer.sample.generate import draw, settled
from infer.score.pairs import Key, key_of
from infer.score.picture import Picture
from infer.score.score_all import score_all
from train.loop.memory import start_memory
from train.loop.preview import preview_size
from train.loop.session import Loop
from train.ranks.launch import from_main
from train.run.names import training_folder

LIKENESS = ("dino", "clip_i")  # the first that a network is there for


def score(loop: Loop) -> None:
    """Draw and score on the main rank, and keep the figures of this step on every rank. Pictures that cannot be drawn
    do not end the training."""
    run = loop.session.run
    figures = from_main(run.accelerator, lambda: _scored(loop) if run.main else {})
    if figures:
        loop.training.progress.scores[str(loop.step)] = figures
    run.accelerator.wait_for_everyone()


def _scored(loop: Loop) -> dict[str, float]:
    session, job, began = loop.session, loop.session.job, time.perf_counter()
    transformer, device = session.model.transformer, session.run.device
    if session.model.offload is not None:
        session.model.offload.release()
    loop.bar.set_postfix_str("drawing for scores")
    transformer.eval()
    try:
        rows, latents, folder = _drawn(loop)
    except torch.OutOfMemoryError:
        loop.bar.write(
            f"step {loop.step}: no scores, as the GPU ran out of memory; training goes on. Set sampling.height and "
            "sampling.width lower, or scores_every=0"
        )
        return {}
    except NotFiniteError as error:
        loop.bar.write(f"step {loop.step}: no scores: {error}")
        return {}
    finally:
        transformer.train()
        release(device)
        start_memory(device)
    mine = session.data.previews
    own, others = ([row for row in rows if (row.prompt in mine) is there] for there in (True, False))
    scored = score_all(own, others, [], folder, latents, None, {}, job.networks, training_folder(job), {}, device)
    start_memory(device)
    found = summary(own, others, scored.references.nearest_rms)
    text = json.dumps({"step": loop.step, **found})
    replace_file(folder / "scores.json", lambda path: path.write_text(text + "\n"))
    loop.metrics.log(loop.step, {f"score_{name}": value for name, value in found.items()})
    session.tracker.log(loop.step, {f"score_{name}": value for name, value in found.items()})
    said = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    loop.bar.write(f"step {loop.step}: {said} ({len(rows)} pictures, {time.perf_counter() - began:.1f} s)")
    return found


def _drawn(loop: Loop) -> tuple[list[Picture], dict[Key, torch.Tensor], Path]:
    """Pictures of every prompt without and with the adapter, in a folder of this step."""
    session, job = loop.session, loop.session.job
    transformer, device, average = session.model.transformer, session.run.device, loop.training.average
    folder = session.run.folder / "scores" / f"step-{loop.step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    texts, size = session.data.previews | session.data.unrelated, preview_size(job)
    sampling, scheduler = settled(job.sampling, job.model), load_scheduler(job.model)
    latents: dict[Key, torch.Tensor] = {}
    rows = []
    with average.applied() if average else nullcontext():
        for number, (prompt, text) in enumerate(texts.items()):
            if prompt not in loop.base_latents:
                with without_adapter(transformer):
                    loop.base_latents[prompt] = draw(transformer, scheduler, text, job.seed, sampling, size, device)
            drawn = draw(transformer, scheduler, text, job.seed, sampling, size, device)
            for adapter, packed in ((None, loop.base_latents[prompt]), ("adapter", drawn)):
                name = f"{number:02d}{'' if adapter else '-base'}.png"
                row = Picture(job.precision.kind, adapter, prompt, job.seed, name)
                rows.append(row)
                latents[key_of(row)] = packed.cpu()
    vae = load_vae(job.model, device)
    for row in rows:
        decode(vae, latents[key_of(row)].to(device), *size).save(folder / row.image)
    return rows, latents, folder


def summary(own: Iterable[Picture], others: Iterable[Picture], usual: float | None) -> dict[str, float]:
    """The figures of one step, by what is known.

    likeness: mean cosine of DINO, else CLIP, to the training pictures. copying: share of the pictures that are nearer
    to a training picture than half of what training pictures usually are to each other (`usual`); nearest: the least
    such distance, as a share of it. change and drift: how far the latents are from those without the adapter, as a
    share of these, for the previews' prompts and for unrelated ones.
    """
    mine, apart = ([row for row in rows if row.adapter is not None] for rows in (own, others))

    def values(rows: list[Picture], name: str) -> list[float]:
        return [value for row in rows if (value := row.scores.get(name)) is not None]

    found: dict[str, float] = {}
    liked = next((given for name in LIKENESS if (given := values(mine, name))), [])
    if liked:
        found["likeness"] = fmean(liked)
    distances = values(mine, "nearest_rms")
    if distances and usual:
        found["copying"] = fmean(distance < COPIED * usual for distance in distances)
        found["nearest"] = min(distances) / usual
    for name, rows in (("change", mine), ("drift", apart)):
        if moved := values(rows, "latents_base"):
            found[name] = fmean(moved)
    return found
