"""Every picture of a drawing, each in its file with its settings inside, and the contact sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from infer.adapter.attach import remove_adapter
from infer.adapter.checks import check_guidance, check_running
from infer.adapter.selection import load_chosen
from infer.checkpoint.family import own_size, unguided
from infer.checkpoint.files import read_config
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.device.device import describe_device, release
from infer.drawing.record import KEY, digests, record, versions
from infer.drawing.settings import Draw, Planned, adapters_at, column, plan_pictures, sheet_file
from infer.family.family import Text
from infer.fast.cuda_graph import Sampler
from infer.fast.install import choose_path, hold_of
from infer.fast.ready_kernels import prepare_kernels
from infer.fast.weights import obstacle
from infer.program.atomic import replace_file
from infer.quantize.compute import stored_on
from infer.rounding.layer_errors import decide
from infer.sample.encode import NotFiniteError, decode, drawn_texts, text_encoder
from infer.sample.generate import draw, settled
from infer.sample.references import encode_files, latents_behind
from infer.sample.sheet import Layout, sheet_of
from infer.sample.warm_up import draw_unseen


def draw_pictures(options: Draw, device: torch.device) -> list[Path]:
    """Draw all; returns the files, the contact sheet last where there are several pictures.

    Each picture is written when it is drawn. One that is not finite has no file and hinders no other.

    Raises:
        ValueError: something cannot be drawn; of pictures that are not finite, their names.
    """
    model, memory = options.model, options.memory
    check_guidance(model, options.sampling.guidance)
    sampling = settled(options.sampling, model)
    assert sampling.steps is not None
    asked = replace(options, sampling=replace(sampling, guidance=None) if unguided(model) else sampling)
    size = sampling.size(own_size(model))
    digest, planned = digests(options.adapter), plan_pictures(options)
    precision = options.precision
    for turn in range(2):  # before anything is measured, and with the mixture that came of it
        for strength in options.strengths():
            memory = check_running(model, precision, adapters_at(options.adapter, strength), None, memory, device)
        if turn == 0:
            precision = stored_on(decide(model, precision, device, print), device)
    facts = {"device": describe_device(device), "versions": versions()}
    pictures: dict[tuple[str, str], Image.Image] = {}
    broken: dict[Path, NotFiniteError] = {}
    seconds: list[float] = []

    def keep(one: Planned, picture: Image.Image, took: float) -> None:
        seconds.append(took)
        pictures[one.row, one.column] = picture
        info = PngImagePlugin.PngInfo()
        said = record(asked, one, digest, size, facts | {"seconds": round(took, 3)})
        info.add_itxt(KEY, said)
        replace_file(one.file, lambda path: picture.save(path, format="PNG", pnginfo=info))

    began = time.perf_counter()
    with tqdm(total=len(planned), unit="picture", desc="draw") as bar:
        drawn = replace(options, precision=precision, memory=memory, sampling=sampling)
        before = _draw_all(drawn, planned, size, device, bar, keep, broken) - began
    files = [one.file for one in planned if one.file not in broken]
    sheet = sheet_file(options)
    if sheet is not None and not broken:
        rows = list(dict.fromkeys(one.row for one in planned))
        board = sheet_of(Layout(rows, [column(strength) for strength in options.strengths()], size), pictures)
        replace_file(sheet, lambda path: board.save(path, format="PNG"))
        files.append(sheet)
    for file in files:
        print(file)
    if seconds:
        drawn = f"{len(seconds)} picture{'s' * (len(seconds) > 1)} of {size[1]}x{size[0]}"
        print(
            f"{drawn} in {time.perf_counter() - began:.1f} s: {before:.1f} s until the first was begun, then "
            f"{sum(seconds) / len(seconds):.2f} s each ({sampling.steps} steps)"
        )
    if broken:
        said = "; ".join(f"{file.name}: {error}" for file, error in broken.items())
        raise ValueError(f"{len(broken)} of {len(planned)} pictures are not finite and were not written: {said}")
    return files


def _draw_one(vae: Any, *arguments: Any) -> None:
    """A picture that nobody looks at; arguments: those of `draw`."""
    try:
        draw_unseen(vae, *arguments)
    except NotFiniteError:
        return  # said of each picture that is asked for, by its name


def _draw_all(
    options: Draw,
    planned: list[Planned],
    size: tuple[int, int],
    device: torch.device,
    bar: tqdm[Any],
    keep: Callable[[Planned, Image.Image, float], None],
    broken: dict[Path, NotFiniteError],
) -> float:
    """Load, draw and free; `keep` is given each picture with its seconds, `broken` those that are not finite. Returns
    when the first was begun, by the performance counter.

    options: with what the device made of precision, memory and sampling.
    """
    model, precision, memory = options.model, options.precision, options.memory
    prompts = list(dict.fromkeys(one.prompt for one in planned))
    prepare_kernels(read_config(model, "transformer"), precision, memory, device)
    bar.set_postfix_str("prompts")
    with text_encoder(model, precision, device, options.text_length) as encoder:
        texts = dict(zip(prompts, drawn_texts(model, encoder, prompts), strict=True))
        for prompt in encoder.truncated(prompts):
            bar.write(f"only the first {encoder.length} tokens are seen of {prompt!r}")
    bar.set_postfix_str("loading")
    transformer = load_transformer(model, precision, device, hold_of(memory))
    vae, scheduler = load_vae(model, device), load_scheduler(model)
    latents_of = encode_files(vae, (file for one in planned for file in one.references), options.reference_resolution)

    def text_of(one: Planned) -> Text:
        return replace(texts[one.prompt], references=tuple(latents_of[file] for file in one.references))

    path, offload = choose_path(transformer, memory, precision, device, bar.write)
    if path.graphs(device):
        Sampler(transformer, offload)

    one_step = replace(options.sampling, steps=1)
    largest = max(map(text_of, planned), key=latents_behind)
    warm_up = partial(_draw_one, vae, transformer, scheduler, largest, 0, one_step, size, device)
    first: float | None = None
    on: list[str] = []
    # those without any adapter first: nothing of one has touched the model then
    strengths = sorted(options.strengths(), key=lambda each: adapters_at(options.adapter, each).path is not None)
    for strength in strengths:
        for name in on:
            remove_adapter(transformer, name, model)
        chosen = adapters_at(options.adapter, strength)
        on = [] if chosen.path is None else load_chosen(transformer, chosen, model)
        assert not path.fused or obstacle(transformer) is None, obstacle(transformer)
        if offload is not None:
            assert memory.budget_gib is not None
            offload.fit(memory.budget_gib, warm_up)
        bar.set_postfix_str(column(strength))
        for one in planned:
            if one.strength != strength:
                continue
            started = time.perf_counter()
            first = started if first is None else first
            try:
                latents = draw(transformer, scheduler, text_of(one), one.seed, options.sampling, size, device)
                picture = decode(vae, latents, *size)  # on the CPU: the device has finished
            except NotFiniteError as error:
                broken[one.file] = error
            else:
                keep(one, picture, time.perf_counter() - started)
            bar.update()
    del transformer, vae, warm_up, offload
    release(device)
    assert first is not None, "nothing was drawn"
    return first
