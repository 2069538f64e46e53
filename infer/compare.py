"""Draw the same prompts and seeds at several precisions, without and with an adapter, and say what each one costs.

The experiment of the Hugging Face guide "Quantize Your Diffusion Models with diffusers", measured stage by stage:

    python infer/compare.py model=tiny
    python infer/compare.py model=dev adapter.path=runs/mine/adapter run=mine 'only=[bf16,nf4]'

Writes results.json, comparison.png, report.md and report.html to runs/<run>/compare/.
"""

import math
import os
import platform
import shutil
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.quiet import quieten

    quieten()

from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from infer import report
from infer.adapters import load_recovery
from infer.atomic import clear_partials
from infer.checks import check_guidance, check_running
from infer.command import check_run_name, pick_device, run_command
from infer.encode import Text, decode, release, text_encoder
from infer.fast import Memory, choose_path, hold_of
from infer.flux import Model, check_model, load_scheduler, load_transformer, load_vae, own_size
from infer.generate import Sampling, draw
from infer.graph import Sampler
from infer.idle import refuse_idle
from infer.judge import judge
from infer.measure import measure
from infer.networks import Networks, check_networks
from infer.quantize import Precision, stored_bytes
from infer.scores import Key, Row, find_scores, key_of
from infer.sensitivity import decide
from infer.sets import list_pictures
from infer.several import Trained, load_chosen
from infer.stack import obstacle


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
    seeds: list[int] = field(default_factory=lambda: [0])
    sampling: Sampling = field(default_factory=Sampling)
    memory: Memory = field(default_factory=Memory)
    text_length: int | None = None
    """T5 tokens; null takes the checkpoint's own (512 for FLUX.1-dev)."""
    unrelated: list[str] = field(default_factory=list)
    """Prompts that the adapter has nothing to do with: what it changes there is its drift. None draws none."""
    references: str | None = None
    """The folder of the training pictures, to see how like them the pictures are, and whether any was learned by heart;
    null leaves these scores out."""
    networks: Networks = field(default_factory=Networks)
    scores: dict[str, str] = field(default_factory=dict)
    """More scores: a name and the dotted path of a function (picture, prompt) -> number."""
    run: str = "compare"
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise ValueError(
                "compare needs at least one of prompts and of seeds, as in 'prompts=[a red star]' 'seeds=[0]'"
            )
        for seed in self.seeds:
            if not -(2**63) <= seed < 2**63:
                raise ValueError(f"seeds has {seed}; a seed has 64 bits: choose one below {2**63}")
        if self.text_length is not None and self.text_length < 1:
            raise ValueError(f"text_length is {self.text_length}; it must be 1 or more, or null")
        unknown = set(self.only or []) - set(self.precisions)
        if unknown or not self.precisions or self.only == []:
            raise ValueError(f"only names {sorted(unknown)}; choose from {', '.join(self.precisions)}")
        for name in self.recovery:
            if name not in self.precisions:
                raise ValueError(f"recovery names {name!r}, which is none of {', '.join(self.precisions)}")
            if self.only is not None and name not in self.only:
                raise ValueError(f"recovery names {name!r}, which only={self.only} leaves out; name it in both or none")
        both = [prompt for prompt in self.prompts if prompt in self.unrelated]
        if both:
            raise ValueError(f"{both[0]!r} is among prompts and among unrelated; a prompt is one or the other")
        if self.adapter.path is None:
            reason = "they show what an adapter changes, and adapter.path is null"
            refuse_idle(self, "", ("unrelated",), reason)


def _draw_one(vae: AutoencoderKL, *place: Any) -> None:
    decode(vae, draw(*place), *place[-2])


def draw_precision(
    options: Compare,
    name: str,
    adapter: tuple[str, str] | None,
    folder: Path,
    device: torch.device,
    bar: "tqdm[Any]",
    kept: dict[Key, Tensor],
    memory: Memory,
) -> list[Row]:
    """All pictures of one precision, without and then with the adapter (its name and path); frees everything after.

    The pictures' packed latents go into `kept`, on the CPU. memory: the settings that all of it can be drawn with.
    """
    model, precision = options.model, options.precisions[name]
    prompts = all_prompts(options)
    size = options.sampling.size(own_size(model))
    bar.set_postfix_str(f"{name}: prompts")
    with ExitStack() as stack:
        with measure(device) as load_text:
            encoder = stack.enter_context(text_encoder(model, precision, device, options.text_length))
        with measure(device) as encode:
            texts: list[Text] = encoder(prompts)
        for prompt in encoder.truncated(prompts):
            bar.write(f"T5 sees only the first {encoder.length} tokens of {prompt!r}")
        text_bytes = encoder.weights_bytes
    bar.set_postfix_str(f"{name}: loading")
    with measure(device) as load_rest:
        transformer = load_transformer(model, precision, device, hold_of(memory))
        if name in options.recovery:
            load_recovery(transformer, options.recovery[name], model, precision)
        vae = load_vae(model, device)
        path, stream = choose_path(transformer, memory, precision, device, bar.write)
    scheduler = load_scheduler(model)
    one_step = Sampling(steps=1, guidance=options.sampling.guidance)
    warm_up = partial(_draw_one, vae, transformer, scheduler, texts[0], 0, one_step, size, device)
    if path.graphs(device):
        Sampler(transformer, stream)
    load = {
        "seconds": load_text.seconds + load_rest.seconds,
        "peak_memory_bytes": max(load_text.peak_memory_bytes, load_rest.peak_memory_bytes),
    }
    if load_rest.peak_reserved_bytes is not None:
        load["peak_reserved_bytes"] = max(load_text.peak_reserved_bytes or 0, load_rest.peak_reserved_bytes)
    rows = []
    for variant in (None, adapter) if adapter else (None,):
        if variant:
            load_chosen(transformer, options.adapter, variant[0], model)
            assert not path.fused or obstacle(transformer) is None, obstacle(transformer)
        if stream is not None:
            assert memory.budget_gib is not None
            resident = stream.fit(memory.budget_gib, warm_up)
            bar.write(f"{name}: {resident} of {len(stream.blocks)} blocks stay on the device, the others are streamed")
        weights = text_bytes + stored_bytes(transformer) + stored_bytes(vae)
        # loading kernels, compiling and capturing are not a picture's cost
        for _ in range(2 if path.graphs(device) else 1):
            warm_up()
        for i, prompt in enumerate(prompts):
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
                    "encode": encode.to_dict(),
                    "denoise": denoising.to_dict(),
                    "decode": decoding.to_dict(),
                }
                rows.append(
                    {
                        "precision": name,
                        "adapter": variant[0] if variant else None,
                        "prompt": prompt,
                        "seed": seed,
                        "image": image,
                        "seconds": denoising.seconds + decoding.seconds,
                        "seconds_per_step": denoising.seconds / options.sampling.steps,
                        "weights_bytes": weights,
                        "peak_memory_bytes": max(int(stage["peak_memory_bytes"]) for stage in stages.values()),
                        "scores": {},
                        "stages": stages,
                    }
                )
                kept[key_of(rows[-1])] = latents.cpu()
                bar.update()
    del transformer, vae, warm_up, stream
    release(device)
    return rows


def all_prompts(options: Compare) -> list[str]:
    """What is drawn: the prompts, then with an adapter those that it has nothing to do with."""
    return options.prompts + (options.unrelated if options.adapter.path is not None else [])


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.split(":")[1] for line in lines if line.startswith("model name")]
    return f"cpu: {names[0].strip() if names else platform.processor() or platform.machine()}"


def compare(options: Compare) -> Path:
    """Run the comparison; returns its folder, which appears whole or not at all."""
    device = pick_device(options.device)
    run = check_run_name(options.run)
    check_model(options.model)
    check_networks(options.networks)
    if options.references is not None:
        list_pictures(options.references)
    own = find_scores(options.scores)
    adapter = None
    if options.adapter.path is not None:
        adapter = (options.adapter.name or Path(options.run).name).replace(".", "-"), options.adapter.path
    names = [name for name in options.precisions if options.only is None or name in options.only]
    check_guidance(options.model, {"sampling.guidance": (options.sampling.guidance, Sampling().guidance)})
    memory: dict[str, Memory] = {}
    for turn in range(2):  # before anything is measured, and with the mixtures that came of it
        for name in names:
            how = options.precisions[name], options.adapter, options.recovery.get(name), options.memory
            memory[name] = check_running(options.model, *how, device)
        for name in names if turn == 0 else ():
            options.precisions[name] = decide(options.model, options.precisions[name], device, print)
    for name, score in own.items():  # before an hour of drawing, not after it
        for prompt in options.prompts:
            try:
                given = float(score(Image.new("RGB", (128, 128)), prompt))
            except Exception as error:  # whatever the user's function raises
                raise ValueError(
                    f"scores.{name} fails for a black picture of {prompt!r} ({type(error).__name__}: {error}); mend "
                    "it: it takes a picture and a prompt"
                ) from error
            if not math.isfinite(given):
                raise ValueError(f"scores.{name} gives no number for a black picture of {prompt!r}; let it give one")
    target, unfinished = run / "compare", run / f"compare.{os.getpid()}.partial"
    clear_partials(run, "compare")
    (unfinished / "images").mkdir(parents=True)
    try:
        rows: list[Row] = []
        kept: dict[Key, Tensor] = {}
        pictures = len(names) * len(all_prompts(options)) * len(options.seeds) * (2 if adapter else 1)
        with tqdm(total=pictures, unit="picture", desc="compare") as bar:
            for name in names:
                rows += draw_precision(options, name, adapter, unfinished, device, bar, kept, memory[name])
        plain = (n for n in names if options.precisions[n].kind == "bf16" and not options.precisions[n].layers)
        reference = next(plain, None)
        rows, drift = ([r for r in rows if (r["prompt"] in options.unrelated) is apart] for apart in (False, True))
        found = rows, drift, unfinished, kept, reference, own
        judged = judge(*found, options.networks, options.references, device)
        height, width = options.sampling.size(own_size(options.model))
        libraries = ("torch", "diffusers", "transformers", "bitsandbytes", "peft")
        report.write(
            {
                "model": options.model.path,
                "device": describe_device(device),
                "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
                "sampling": {
                    "steps": options.sampling.steps,
                    "guidance": options.sampling.guidance,
                    "height": height,
                    "width": width,
                },
                "rows": rows,
                **judged,
            },
            unfinished,
        )
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not any(run.iterdir()):
            run.rmdir()
    print(report.table(judged["summary"]))
    if paired := report.differences(judged["summary"]):
        print(f"\ndifferences at the same prompt and seed, with 95 % limits:\n{paired}")
    for score, reason in judged["absent"].items():
        print(f"not measured: {score} ({reason})")
    print(f"report: {target / 'report.html'}")
    return target


if __name__ == "__main__":
    run_command("compare", Compare, compare)
