"""Every picture of a drawing, each in its file with its settings inside, and the contact sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from infer.adapter.checks import check_guidance
from infer.checkpoint.family import own_size, unguided
from infer.device.device import describe_device
from infer.drawing.loaded import Held, Loaded, free, load_rest, put_on, read_texts, settle, take
from infer.drawing.record import KEY, digests, record, versions
from infer.drawing.settings import Draw, Planned, adapters_at, plan_pictures, sheet_file
from infer.family.family import Text
from infer.program.atomic import replace_file
from infer.sample.encode import NotFiniteError, decode
from infer.sample.generate import draw, settled
from infer.sample.references import encode_files, latents_behind
from infer.sample.sheet import Layout, sheet_of


def draw_pictures(options: Draw, device: torch.device, held: Held | None = None) -> list[Path]:
    """Draw all; returns the files, the contact sheet last where there are several pictures.

    Each picture is written when it is drawn. One that is not finite has no file and hinders no other. held: the model
    of the drawing before, which is taken if it is the same one; without it the model is freed at the end.

    Raises:
        ValueError: something cannot be drawn; of pictures that are not finite, their names.
    """
    held, model = held or Held(), options.model
    check_guidance(model, options.sampling.guidance)
    sampling = settled(options.sampling, model)
    assert sampling.steps is not None
    asked = replace(options, sampling=replace(sampling, guidance=None) if unguided(model) else sampling)
    size = sampling.size(own_size(model))
    columns = options.columns()
    digest, planned = digests(*(options.at(column).adapter for column in columns)), plan_pictures(options)
    settled_at = {}
    for name in dict.fromkeys(column.precision for column in columns):
        alike = [options.at(column) for column in columns if column.precision == name]
        adapters = [adapters_at(one.adapter) for one in alike]
        settled_at[name] = settle(model, alike[0].precision, adapters, options.memory, device)
    facts = {"device": describe_device(device), "versions": versions()}
    pictures: dict[tuple[str, str], Image.Image] = {}
    broken: dict[Path, NotFiniteError] = {}
    seconds: list[float] = []

    def keep(one: Planned, picture: Image.Image, took: float) -> None:
        seconds.append(took)
        pictures[one.row, options.title(one.column)] = picture
        info = PngImagePlugin.PngInfo()
        said = record(asked, one, digest, size, facts | {"seconds": round(took, 3)})
        info.add_itxt(KEY, said)
        replace_file(one.file, lambda path: picture.save(path, format="PNG", pnginfo=info))

    began = time.perf_counter()
    with tqdm(total=len(planned), unit="picture", desc="draw") as bar:
        firsts = []
        for name, (precision, memory) in settled_at.items():
            loaded = take(held, model, precision, memory, device, options.text_length)
            these = [one for one in planned if one.column.precision == name]
            firsts.append(_draw_all(replace(options, sampling=sampling), loaded, these, size, bar, keep, broken, held))
        before = firsts[0] - began
    if not held.stays:
        free(held)
    files = [one.file for one in planned if one.file not in broken]
    sheet = sheet_file(options)
    if sheet is not None and not broken:
        rows = list(dict.fromkeys(one.row for one in planned))
        board = sheet_of(Layout(rows, [options.title(column) for column in columns], size), pictures)
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


def _draw_all(
    options: Draw,
    loaded: Loaded,
    planned: list[Planned],
    size: tuple[int, int],
    bar: tqdm[Any],
    keep: Callable[[Planned, Image.Image, float], None],
    broken: dict[Path, NotFiniteError],
    held: Held,
) -> float:
    """Load and draw what is planned at one precision; `keep` is given each picture with its seconds, `broken` those
    that are not finite. Returns when the first was begun, by the performance counter.

    options: with settled sampling.
    """
    bar.set_postfix_str("prompts")
    texts = read_texts(held, list(dict.fromkeys(one.prompt for one in planned)), bar.write)
    if loaded.transformer is not None:
        bar.write("the model is there already: nothing is loaded")
    bar.set_postfix_str("loading")
    load_rest(loaded, bar.write)
    transformer, vae, scheduler = loaded.transformer, loaded.vae, loaded.scheduler
    latents_of = encode_files(vae, (file for one in planned for file in one.references), options.reference_resolution)

    def text_of(one: Planned) -> Text:
        return replace(texts[one.prompt], references=tuple(latents_of[file] for file in one.references))

    largest = max(map(text_of, planned), key=latents_behind)
    first: float | None = None
    # those without any adapter first: nothing of one has touched the model then
    columns = dict.fromkeys(one.column for one in planned)
    chosen = {column: adapters_at(options.at(column).adapter) for column in columns}
    for column in sorted(columns, key=lambda each: chosen[each].path is not None):
        held.between()
        put_on(loaded, chosen[column], largest, options.sampling, size)
        bar.set_postfix_str(options.title(column))
        for one in planned:
            if one.column != column:
                continue
            held.between()
            started = time.perf_counter()
            first = started if first is None else first
            try:
                latents = draw(transformer, scheduler, text_of(one), one.seed, options.sampling, size, loaded.device)
                picture = decode(vae, latents, *size)  # on the CPU: the device has finished
            except NotFiniteError as error:
                broken[one.file] = error
            else:
                keep(one, picture, time.perf_counter() - started)
            bar.update()
    assert first is not None, "nothing was drawn"
    return first
