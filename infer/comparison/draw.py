"""Every picture of a comparison drawn and measured, precision by precision, and the report written."""

from __future__ import annotations

import math
import platform
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer.adapter.attach import load_recovery
from infer.adapter.checks import check_guidance, check_running
from infer.adapter.selection import load_chosen
from infer.checkpoint.family import own_size
from infer.checkpoint.files import read_config
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.comparison.settings import Compare
from infer.device.device import describe_device, release
from infer.device.measure import Measure, measure
from infer.fast.cuda_graph import Sampler
from infer.fast.install import choose_path, hold_of
from infer.fast.memory import Memory
from infer.fast.ready_kernels import prepare_kernels
from infer.fast.weights import obstacle
from infer.program.atomic import clear_partials, partial_of
from infer.program.run_names import check_run_name
from infer.quantize.compute import NAMES, product_dtype_of, stored_on
from infer.quantize.storage import stored_bytes
from infer.report.results import Comparison, Row, Stage
from infer.report.terminal import print_comparison
from infer.report.write import write
from infer.rounding.layer_errors import decide
from infer.sample.edit import Edit, label
from infer.sample.encode import NotFiniteError, decode, drawn_texts, text_encoder
from infer.sample.generate import draw, settled
from infer.sample.picture import decode as decode_file
from infer.sample.references import encode_files, latents_behind
from infer.sample.warm_up import draw_unseen
from infer.score.edits import check_scored, fitted
from infer.score.judges import find_scores
from infer.score.networks import check_networks
from infer.score.pairs import Key, key_of
from infer.score.score_all import score_all
from infer.score.summary import summarise_scores


def _stage(measured: Measure) -> Stage:
    return Stage(measured.seconds, measured.peak_memory_bytes, measured.peak_reserved_bytes)


def draw_precision(
    options: Compare,
    name: str,
    adapter: tuple[str, str] | None,
    folder: Path,
    device: torch.device,
    bar: tqdm[Any],
    all_latents: dict[Key, Tensor],
    memory: Memory,
) -> list[Row]:
    """All pictures of one precision, without and then with the adapter (its name and path); frees everything after.

    The pictures' packed latents go into `all_latents`, on the CPU; memory: the settings that all of it can be drawn
    with.
    """
    model, precision = options.model, options.precisions[name]
    asked = all_prompts(options)
    prompts = list(dict.fromkeys(one if isinstance(one, str) else one.prompt for one in asked))
    size = options.sampling.size(own_size(model))
    bar.set_postfix_str(f"{name}: prompts")
    with ExitStack() as stack:
        with measure(device) as load_text:
            encoder = stack.enter_context(text_encoder(model, precision, device, options.text_length))
        with measure(device) as encode:
            of_prompt = dict(zip(prompts, drawn_texts(model, encoder, prompts), strict=True))
        for prompt in encoder.truncated(prompts):
            bar.write(f"only the first {encoder.length} tokens are seen of {prompt!r}")
        text_bytes = encoder.weights_bytes
    bar.set_postfix_str(f"{name}: loading")
    with measure(device) as load_rest:
        transformer = load_transformer(model, precision, device, hold_of(memory))
        if name in options.recovery:
            load_recovery(transformer, options.recovery[name], model, precision)
        vae = load_vae(model, device)
        path, offload = choose_path(transformer, memory, precision, device, bar.write)
    references = [file for _, files in listed(asked) for file in files]
    latents_of = encode_files(vae, references, options.reference_resolution)
    texts = [
        replace(of_prompt[prompt], references=tuple(latents_of[file] for file in files))
        for prompt, files in listed(asked)
    ]
    scheduler = load_scheduler(model)
    steps, one_step = options.sampling.steps, replace(options.sampling, steps=1)
    assert steps is not None, "the settings are not settled"
    forms = {tuple(each.shape for each in text.references): text for text in texts}
    largest = max(texts, key=latents_behind)
    warm_up = partial(draw_unseen, vae, transformer, scheduler, largest, 0, one_step, size, device)
    if path.graphs(device):
        Sampler(transformer, offload)
    load = Stage(load_text.seconds + load_rest.seconds, max(load_text.peak_memory_bytes, load_rest.peak_memory_bytes))
    if load_rest.peak_reserved_bytes is not None:
        load.peak_reserved_bytes = max(load_text.peak_reserved_bytes or 0, load_rest.peak_reserved_bytes)
    rows = []
    for variant in (None, adapter) if adapter else (None,):
        if variant:
            load_chosen(transformer, options.adapter, model)
            assert not path.fused or obstacle(transformer) is None, obstacle(transformer)
        if offload is not None:
            assert memory.budget_gib is not None
            resident = offload.fit(memory.budget_gib, warm_up)
            bar.write(
                f"{name}: {resident} of {len(offload.blocks)} blocks stay on the device, the others are offloaded"
            )
        weights = text_bytes + stored_bytes(transformer) + stored_bytes(vae)
        # loading kernels, compiling and capturing are not a picture's cost
        for text in forms.values():
            for _ in range(2 if path.graphs(device) else 1):
                draw_unseen(vae, transformer, scheduler, text, 0, one_step, size, device)
        for i, (prompt, files) in enumerate(listed(asked)):
            for seed in options.seeds:
                bar.set_postfix_str(f"{name}{' + ' + variant[0] if variant else ''}")
                with measure(device) as denoising:
                    latents = draw(transformer, scheduler, texts[i], seed, options.sampling, size, device)
                with measure(device) as decoding:
                    picture = decode(vae, latents, *size)
                image = f"images/{name}{'-adapter' if variant else ''}-{i:03d}-{seed}.png"
                picture.save(folder / image)
                stages = {
                    "load": load,
                    "encode": _stage(encode),
                    "denoise": _stage(denoising),
                    "decode": _stage(decoding),
                }
                rows.append(
                    Row(
                        precision=name,
                        adapter=variant[0] if variant else None,
                        prompt=prompt,
                        seed=seed,
                        image=image,
                        seconds=denoising.seconds + decoding.seconds,
                        seconds_per_step=denoising.seconds / steps,
                        weights_bytes=weights,
                        compute_dtype=NAMES[product_dtype_of(transformer)],
                        peak_memory_bytes=max(stage.peak_memory_bytes for stage in stages.values()),
                        scores={},
                        stages=stages,
                        references=[reference_name(i, k) for k in range(len(files))] or None,
                    )
                )
                all_latents[key_of(rows[-1])] = latents.cpu()
                bar.update()
    del transformer, vae, warm_up, offload
    release(device)
    return rows


def all_prompts(options: Compare) -> list[Edit | str]:
    """What is drawn: the prompts, then those with references. With an adapter also unrelated prompts, and prompts of
    its class."""
    apart = [*options.unrelated, *options.class_prompts] if options.adapter.path is not None else []
    return [*options.prompts, *options.edits, *apart]


def listed(asked: Sequence[Edit | str]) -> list[tuple[str, list[str]]]:
    """Each prompt with the files of its references."""
    return [(one, []) if isinstance(one, str) else (one.prompt, one.references) for one in asked]


def reference_name(number: int, place: int) -> str:
    """Where the report has a reference of the prompt of this number."""
    return f"images/reference-{number:03d}-{place}.png"


def save_references(options: Compare, folder: Path, size: tuple[int, int]) -> dict[str, Edit]:
    """Put all references at the pictures' size beside them; returns the prompts that have some, as rows call them."""
    found = {}
    for i, one in enumerate(all_prompts(options)):
        if isinstance(one, str):
            continue
        names = [reference_name(i, k) for k in range(len(one.references))]
        for file, name in zip(one.references, names, strict=True):
            fitted(decode_file(Path(file).read_bytes(), file), size[::-1]).save(folder / name)
        found[label(one.prompt, names)] = one
    return found


def memory_of(options: Compare, name: str, device: torch.device) -> Memory:
    """The memory settings with which all of a precision's pictures can be drawn.

    Raises:
        ValueError: the checkpoint or the device cannot do what is asked for.
    """
    how = options.precisions[name], options.adapter, options.recovery.get(name), options.memory
    return check_running(options.model, *how, device)


def names_of(options: Compare) -> list[str]:
    """The precisions that are drawn."""
    return [name for name in options.precisions if options.only is None or name in options.only]


def draw_all(options: Compare, device: torch.device, folder: str = "compare") -> Path:
    """Run the comparison; returns its folder within the run's, which appears whole or not at all."""
    run, scores = check_run_name(options.run), find_scores(options.scores)
    check_networks(options.networks)
    adapter = None
    if options.adapter.path is not None:
        adapter = options.adapter.name or Path(options.run).name, options.adapter.path
    names = names_of(options)
    check_guidance(options.model, options.sampling.guidance)
    options.sampling = settled(options.sampling, options.model)
    memory: dict[str, Memory] = {}
    for turn in range(2):  # before anything is measured, and with the mixtures that came of it
        for name in names:
            memory[name] = memory_of(options, name, device)
        for name in names if turn == 0 else ():
            options.precisions[name] = stored_on(decide(options.model, options.precisions[name], device, print), device)
    size = options.sampling.size(own_size(options.model))
    check_scored(options.edits, size[::-1])
    for name, each in memory.items():
        prepare_kernels(read_config(options.model, "transformer"), options.precisions[name], each, device)
    for name, score in scores.items():  # before an hour of drawing, not after it
        for prompt, _ in listed(all_prompts(options)):
            try:
                given = float(score(Image.new("RGB", (128, 128)), prompt))
            except Exception as error:  # whatever the user's function raises
                raise ValueError(
                    f"scores.{name} fails for a black picture of {prompt!r} ({type(error).__name__}: {error}); mend "
                    "it: it takes a picture and a prompt"
                ) from error
            if not math.isfinite(given):
                raise ValueError(f"scores.{name} gives no number for a black picture of {prompt!r}; let it give one")
    target, unfinished = run / folder, partial_of(run / folder)
    clear_partials(run, folder)
    (unfinished / "images").mkdir(parents=True)
    try:
        rows: list[Row] = []
        latents: dict[Key, Tensor] = {}
        edits = save_references(options, unfinished, size)
        pictures = len(names) * len(all_prompts(options)) * len(options.seeds) * (2 if adapter else 1)
        with tqdm(total=pictures, unit="picture", desc="compare") as bar:
            for name in names:
                try:
                    rows += draw_precision(options, name, adapter, unfinished, device, bar, latents, memory[name])
                except NotFiniteError as error:
                    raise ValueError(f"at precision {name} {error}; only=[...] compares the others") from error
        plain = (n for n in names if options.precisions[n].kind == "bf16" and options.precisions[n].exact)
        reference = next(plain, None)
        drift, bleed = (
            [row for row in rows if row.asked in prompts] for prompts in (options.unrelated, options.class_prompts)
        )
        rows = [row for row in rows if row.asked not in {*options.unrelated, *options.class_prompts}]
        drawn = rows, drift, bleed, unfinished, latents, reference, scores
        scored = score_all(*drawn, options.networks, options.references, edits, device)
        summary = summarise_scores(rows, {"drift": drift, "bleed": bleed}, scored.sets, reference, list(scores))
        height, width = size
        libraries = ("torch", "diffusers", "transformers", "bitsandbytes", "peft")
        comparison = Comparison(
            model=options.model.path,
            device=describe_device(device),
            versions={"python": platform.python_version(), **{name: version(name) for name in libraries}},
            sampling={
                "steps": options.sampling.steps,
                "guidance": options.sampling.guidance,
                "height": height,
                "width": width,
            },
            rows=rows,
            drift=drift,
            bleed=bleed,
            summary=summary,
            references=scored.references,
            absent=scored.absent,
        )
        write(comparison, unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not any(run.iterdir()):
            run.rmdir()
    print_comparison(comparison)
    print(f"report: {target / 'report.html'}")
    return target
