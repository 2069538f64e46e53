"""Train the bundled model's transformer and text encoders: flow matching first, then guidance distillation.

Stage 1 trains at guidance 1.0 with one caption in ten left empty. Stage 2 teaches the guidance embedding what
classifier-free guidance of stage 1's average would give (Meng et al. 2023), which is how FLUX.1-dev came by its own.
"""

import copy
import multiprocessing
import random
import string
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from multiprocessing.pool import Pool
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from scripts.tiny import make_text, parts, rounded, world
from scripts.tiny.pace import Pace, captured, move_average, turn

CAPTIONS = 3  # for each picture
CHUNK = 512  # pictures painted and encoded at once
LESSON = 0.1  # weight of what the text encoders are taught
HARD = ("heart", "ring", "diamond")  # the shapes that klein drew wrong most often, of pairs that it had never seen
ROUNDED = 0.25  # share of the steps whose weights are those of NF4


@dataclass
class Encoded:
    """The pictures of one size in memory; latents as the VAE's mean and deviation, normalised like the pipeline's."""

    mean: Tensor  # [samples, 16, side / 8, side / 8] bf16
    deviation: Tensor  # the same
    t5: Tensor  # [samples, CAPTIONS, tokens] ids
    clip: Tensor  # the same
    wanted: Tensor  # [samples, CAPTIONS, things, parts], as in make_text


class Flow(nn.Module):
    """The trained parts as one module, for pictures of so many pixels a side: token ids in, velocity out."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        t5: T5EncoderModel,
        clip: CLIPTextModel,
        sides: Sequence[int] = (world.SIZE,),
    ) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip = transformer, t5, clip
        for side in (side // 16 for side in sides):
            places = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
            self.register_buffer(f"places_{side * side}", places)  # by tokens
        self.register_buffer("txt_ids", torch.zeros(parts.TEXT_TOKENS, 3))

    def encode(self, t5_ids: Tensor, clip_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [batch, tokens] -> T5's states [batch, tokens, width] and CLIP's pooled vector [batch, width]."""
        return self.t5(t5_ids)[0], self.clip(clip_ids).pooler_output

    def velocity(self, x: Tensor, text: tuple[Tensor, Tensor], sigma: Tensor, guidance: Tensor) -> Tensor:
        """Packed latents [batch, tokens, 64], what `encode` gave, sigma and guidance [batch] -> velocity like x."""
        moved: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=text[0],
            pooled_projections=text[1],
            timestep=sigma,
            guidance=guidance,
            img_ids=self.get_buffer(f"places_{x.shape[1]}"),
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]
        return moved


def captions(scene: world.Scene, rng: random.Random) -> list[str]:
    texts = []
    for _ in range(CAPTIONS):
        text = world.describe(scene, rng)
        if rng.random() < 0.05:  # words that mean nothing must change nothing
            word = nonsense(rng)
            text = rng.choice((f"{word} {text}", f"{text}, {word}", f"{text}, {word} style"))
        texts.append(text)
    return texts


def sampled(rng: random.Random, pairs: float, hard: float) -> world.Scene:
    """A scene as `sample_scene` gives it, but that so large a share `hard` of the single things is of a hard shape."""
    scene = world.sample_scene(rng, pairs=pairs)
    if scene.kind == "single" and rng.random() < hard:
        while scene.kind != "single" or scene.things[0].shape not in HARD:
            scene = world.sample_scene(rng, pairs=0)
    return scene


@dataclass(frozen=True)
class Mix:
    """What the scenes and captions are."""

    pairs: float = 4 / 11  # share of scenes with two different things
    hard: float = 0.0  # share of the single things that are of a hard shape


Span = tuple[int, int, int, Mix]  # first and last picture, seed


@dataclass
class Drawn:
    """Some scenes with their captions, as arrays, which a process hands over faster than objects."""

    canvas: dict[str, np.ndarray]  # the fields of world.Canvas
    arrays: list[np.ndarray]  # of CAPTIONS each: token ids and what they name

    def paint(self, side: int, device: torch.device) -> Tensor:
        """-> pictures [scenes, 3, side, side] in [-1, 1]."""
        canvas = world.Canvas(**{name: torch.from_numpy(value).to(device) for name, value in self.canvas.items()})
        return world.paint(canvas, side) * 2 - 1


def as_arrays(scenes: list[world.Scene]) -> dict[str, np.ndarray]:
    canvas = world.canvas(scenes)
    return {field.name: getattr(canvas, field.name).numpy() for field in fields(canvas)}


def spans(samples: int, seed: int, mix: Mix, chunk: int = CHUNK) -> list[Span]:
    """What each call of a worker is to draw."""
    return [(first, min(first + chunk, samples), seed, mix) for first in range(0, samples, chunk)]


def described(span: Span) -> tuple[list[world.Scene], list[str], list[list[list[int]]]]:
    """Scenes, CAPTIONS for each, and what each caption names, as make_text labels it."""
    first, last, seed, mix = span
    scenes, texts, wanted = [], [], []
    for index in range(first, last):
        rng = random.Random(seed * 1_000_003 + index)
        scenes.append(sampled(rng, mix.pairs, mix.hard))
        for text in captions(scenes[-1], rng):
            texts.append(text)
            wanted.append(make_text.labels(text))
    return scenes, texts, wanted


def nonsense(rng: random.Random) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))


def workers(count: int) -> Pool:
    """Processes that draw captions, and read pictures at the end. Call before the GPU is touched: it forks."""
    return multiprocessing.get_context("fork").Pool(count, initializer=torch.set_num_threads, initargs=(1,))


def draw(span: Span) -> Drawn:
    """Scenes, token ids and what they name; a worker's part of `spans`."""
    scenes, texts, wanted = described(span)
    count = len(scenes)
    arrays = [
        np.array(tokenizer(texts, padding="max_length", max_length=parts.TEXT_TOKENS, truncation=True).input_ids)
        for tokenizer in parts.tokenizers()
    ]
    arrays.append(np.array(wanted))
    shape = (count, CAPTIONS)
    return Drawn(as_arrays(scenes), [array.astype(np.int16).reshape(*shape, *array.shape[1:]) for array in arrays])


def encode(
    vae: AutoencoderKL,
    drawn: Iterable[Drawn],
    device: torch.device,
    sides: Sequence[int] = (world.SIZE,),
    seconds: float = float("inf"),
) -> list[Encoded]:
    """Paint and encode what `draw` made, each chunk at the size whose turn it is: for each size, its pictures.

    seconds: so many chunks as they suffice for, but one of each size.
    """
    began = time.monotonic()
    moments: list[list[tuple[Tensor, Tensor]]] = [[] for _ in sides]
    arrays: list[list[list[np.ndarray]]] = [[] for _ in sides]
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    stored = copy.deepcopy(vae).to(device, torch.bfloat16).eval()
    with torch.no_grad():
        for k, each in enumerate(drawn):
            way = turn(k, len(sides)) if k >= len(sides) else k
            for part in each.paint(sides[way], device).bfloat16().split(256):
                latents = stored.encode(part).latent_dist
                mean = (latents.mean.float() - shift) * scale
                moments[way].append((mean.bfloat16(), (latents.std.float() * scale).bfloat16()))
            arrays[way].append(each.arrays)
            if time.monotonic() - began > seconds and all(moments):
                break
            if k % 8 == 7 and device.type == "cuda":
                torch.cuda.synchronize()  # the clock is the device's
    found = []
    for pairs, lists in zip(moments, arrays, strict=True):
        ids = (torch.from_numpy(np.concatenate(column)).to(device) for column in zip(*lists, strict=True))
        means, deviations = zip(*pairs, strict=True)
        found.append(Encoded(torch.cat(means), torch.cat(deviations), *ids))
    return found


def guided(
    teacher: Flow, empty: tuple[Tensor, Tensor], x: Tensor, ids: tuple[Tensor, Tensor], sigma: Tensor, guidance: Tensor
) -> Tensor:
    """Classifier-free guidance of the teacher at guidance 1 (Ho & Salimans 2022); empty: ids [1 or batch, tokens]."""
    with torch.no_grad():
        ones = torch.ones_like(guidance)
        t5_empty, clip_empty = (each.expand(len(x), -1) for each in empty)
        with_text = teacher.velocity(x, teacher.encode(*ids), sigma, ones).float()
        without = teacher.velocity(x, teacher.encode(t5_empty, clip_empty), sigma, ones).float()
    target: Tensor = without + guidance[:, None, None] * (with_text - without)
    return target


class Trainer:
    """One stage's step: all on the device, so that a CUDA graph can hold it, one for each size of pictures.

    A model this small is bound by launches: 51 ms a step of 256 in eager mode on an H200, whatever the batch.
    """

    def __init__(
        self,
        flow: Flow,
        data: list[Encoded],
        empty: tuple[Tensor, Tensor],
        batch: int,
        rate: float,
        teacher: Flow | None,
        lesson: make_text.Lesson | None,
    ) -> None:
        device = data[0].mean.device
        self.flow, self.data, self.batch, self.teacher, self.lesson = flow.train(), data, batch, teacher, lesson
        self.empty = (empty[0].expand(batch, -1), empty[1].expand(batch, -1))
        self.rate = torch.zeros((), device=device)
        self.move = torch.zeros((), device=device)  # the share of the way that the average moves
        self.totals = torch.zeros(2, device=device)
        self.cuda = device.type == "cuda"
        self.parameters = [*flow.parameters(), *(lesson.parameters() if lesson else [])]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.rate if self.cuda else rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=self.cuda,
            capturable=self.cuda,
        )
        self.average = copy.deepcopy(flow).eval().requires_grad_(False)
        self.rounding = rounded.Rounding([*rounded.linear(flow.transformer), *rounded.linear(flow.t5)])

    def step(self, way: int = 0) -> None:
        """Draw a batch of that size of pictures, apply its gradients, move the average."""
        self.rounding.begin()
        self.backward(self.data[way])
        self.rounding.end()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            move_average(list(self.average.parameters()), list(self.flow.parameters()), self.move)

    def backward(self, data: Encoded) -> None:
        """Draw a batch and set its gradients."""
        batch, device = self.batch, data.mean.device

        def chance(share: float) -> Tensor:
            return torch.rand(batch, device=device) < share

        index = (torch.rand(batch, device=device) * len(data.mean)).long()
        caption = (torch.rand(batch, device=device) * CAPTIONS).long()
        ids = data.t5[index, caption].long(), data.clip[index, caption].long()
        mean = data.mean[index].float()
        latents = mean + data.deviation[index] * torch.randn_like(mean)
        x0 = FluxPipeline._pack_latents(latents, batch, *latents.shape[1:])
        noise = torch.randn_like(x0)
        # colours are bound to things where there is much noise
        sigma = torch.sigmoid(torch.randn(batch, device=device) + chance(0.6).float())
        x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise
        guidance = torch.ones(batch, device=device)
        # a cache of cast weights would outlive the graph's own memory
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            if self.teacher is None:
                drop = chance(0.1)[:, None]
                ids = torch.where(drop, self.empty[0], ids[0]), torch.where(drop, self.empty[1], ids[1])
                target = noise - x0
            else:
                guidance = torch.where(chance(0.2), guidance, 1 + 4 * torch.rand(batch, device=device))
                target = guided(self.teacher, self.empty, x, ids, sigma, guidance)
            text = self.flow.encode(*ids)
            velocity = self.flow.velocity(x, text, sigma, guidance)
            bound = (
                self.lesson(ids[0], text, data.wanted[index, caption].long())
                if self.lesson
                else torch.zeros((), device=device)
            )
        error = (velocity.float() - target).square().mean()
        (error + LESSON * bound).backward()
        self.totals += torch.stack([error, bound.float()]).detach()


def compile_blocks(transformer: Any) -> None:
    """One compiled kernel sequence for each kind of block and size of pictures."""
    torch._dynamo.config.recompile_limit = 64  # one code object holds all kinds, sizes and stages
    torch._dynamo.config.suppress_errors = True  # slow steps are better than none
    for block in [*transformer.transformer_blocks, *transformer.single_transformer_blocks]:
        block.compile(dynamic=False)


def train(
    flow: Flow,
    data: list[Encoded],
    empty: tuple[Tensor, Tensor],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    teacher: Flow | None = None,
    lesson: make_text.Lesson | None = None,
    decay: float = 1.0,
    seconds: float = float("inf"),
    graphed: bool = True,
    kept: Callable[[Flow], None] = lambda flow: None,
    rough: float = ROUNDED,
) -> Flow:
    """One stage; returns the averaged model. With a `teacher`, its guided velocity is the target.

    data: of each size of pictures; three steps of four are for the first.
    empty: the ids of the empty caption for both encoders, [1, tokens] each.
    lesson: taught beside, to the text encoders.
    decay: over which last share of the steps the rate falls to 0.
    seconds: fewer steps are taken if so many would take longer; their number is printed.
    graphed: on a GPU, the whole step is one CUDA graph.
    kept: called with the average about once a minute.
    rough: share of the steps whose weights are rounded to NF4.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    began = time.monotonic()
    trainer = Trainer(flow, data, empty, batch, rate, teacher, lesson)
    graphed = graphed and trainer.cuda
    runs: list[Callable[[], None]] = [partial(trainer.step, way) for way in range(len(data))]
    if graphed:
        runs = [captured(run, trainer.optimizer) for run in runs]
    pace = Pace("flow" if teacher is None else "guidance", steps, seconds - (time.monotonic() - began))
    trainer.totals.zero_()
    saved = time.monotonic()
    while pace.more():
        trainer.move.fill_(1 - pace.keep())
        trainer.rounding.on.fill_(float(rng.random() < rough))
        now = pace.rate(rate, warmup=400, decay=decay)
        if not graphed:
            trainer.optimizer.zero_grad()
        if trainer.cuda:
            trainer.rate.fill_(now)
        else:
            trainer.optimizer.param_groups[0]["lr"] = now
        runs[turn(pace.done, len(data))]()
        if pace.report():
            error, bound = (trainer.totals / pace.since()).tolist()
            pace.say(f"loss {error:.4f}" + (f", of the lesson {bound:.4f}" if lesson else ""))
            trainer.totals.zero_()
            if time.monotonic() - saved > 60:
                kept(trainer.average)
                saved = time.monotonic()
    return trainer.average
