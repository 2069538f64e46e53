"""Train the bundled model's transformer and text encoders: flow matching first, then guidance distillation.

Stage 1 trains at guidance 1.0 with one caption in ten left empty. Stage 2 teaches the guidance embedding what
classifier-free guidance of stage 1's average would give (Meng et al. 2023), which is how FLUX.1-dev came by its own.
"""

import copy
import math
import multiprocessing
import random
import string
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from scripts.tiny import parts, world

CAPTIONS = 3  # for each picture
CHUNK = 1024  # pictures painted and encoded at once


@dataclass
class Encoded:
    """The training set in memory; latents as the VAE's mean and deviation, normalised like the pipeline's."""

    mean: Tensor  # [samples, 16, 16, 16] bf16
    deviation: Tensor  # the same
    t5: Tensor  # [samples, CAPTIONS, tokens] ids
    clip: Tensor  # the same


class Flow(nn.Module):
    """The trained parts as one module: token ids in, velocity out."""

    def __init__(self, transformer: FluxTransformer2DModel, t5: T5EncoderModel, clip: CLIPTextModel) -> None:
        super().__init__()
        self.transformer, self.t5, self.clip = transformer, t5, clip
        side = world.SIZE // 16
        self.register_buffer("img_ids", FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32))
        self.register_buffer("txt_ids", torch.zeros(parts.TEXT_TOKENS, 3))

    def forward(self, x: Tensor, t5_ids: Tensor, clip_ids: Tensor, sigma: Tensor, guidance: Tensor) -> Tensor:
        """Packed latents [batch, 64, 64], ids [batch, tokens], sigma and guidance [batch] -> velocity like x."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=self.t5(t5_ids)[0],
            pooled_projections=self.clip(clip_ids).pooler_output,
            timestep=sigma,
            guidance=guidance,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]
        return velocity


def _captions(scene: world.Scene, rng: random.Random) -> list[str]:
    captions = []
    for _ in range(CAPTIONS):
        text = world.describe(scene, rng)
        if rng.random() < 0.05:  # words that mean nothing must change nothing
            word = "".join(rng.choices(string.ascii_lowercase, k=rng.randint(3, 6)))
            text = rng.choice((f"{word} {text}", f"{text}, {word}", f"{text}, {word} style"))
        captions.append(text)
    return captions


def _draw(span: tuple[int, int, int, float, Path | None]) -> tuple[list[world.Scene], list[np.ndarray]]:
    first, last, seed, pairs, model = span
    scenes, texts = [], []
    for index in range(first, last):
        rng = random.Random(seed * 1_000_003 + index)
        scenes.append(world.sample_scene(rng, pairs=pairs))
        texts += _captions(scenes[-1], rng)
    ids = [
        np.array(tokenizer(texts, padding="max_length", max_length=parts.TEXT_TOKENS, truncation=True).input_ids)
        for tokenizer in parts.tokenizers(model)
    ]
    return scenes, [array.astype(np.int16).reshape(last - first, CAPTIONS, -1) for array in ids]


def draw(
    samples: int, seed: int, workers: int, pairs: float, model: Path | None
) -> list[tuple[list[world.Scene], list[np.ndarray]]]:
    """Scenes and their token ids in chunks, by several processes. Call before the GPU is touched: it forks.

    pairs: share of scenes with two different things. model: whose tokenizers; None makes new ones.
    """
    spans = [(first, min(first + CHUNK, samples), seed, pairs, model) for first in range(0, samples, CHUNK)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return pool.map(_draw, spans)


def encode(
    vae: AutoencoderKL, drawn: list[tuple[list[world.Scene], list[np.ndarray]]], device: torch.device
) -> Encoded:
    """Paint and encode what `draw` made."""
    means, deviations = [], []
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        for scenes, _ in drawn:
            image = world.paint(world.canvas(scenes, device=device)) * 2 - 1
            for part in image.split(256):
                latents = vae.encode(part).latent_dist
                means.append(((latents.mean.float() - shift) * scale).bfloat16())
                deviations.append((latents.std.float() * scale).bfloat16())
    t5, clip = (torch.from_numpy(np.concatenate([ids[i] for _, ids in drawn])).to(device) for i in (0, 1))
    return Encoded(torch.cat(means), torch.cat(deviations), t5, clip)


def guided(
    teacher: Flow, empty: tuple[Tensor, ...], x: Tensor, t5: Tensor, clip: Tensor, sigma: Tensor, guidance: Tensor
) -> Tensor:
    """Classifier-free guidance of the teacher at guidance 1 (Ho & Salimans 2022); empty: ids [1 or batch, tokens]."""
    with torch.no_grad():
        ones = torch.ones_like(guidance)
        with_text = teacher(x, t5, clip, sigma, ones).float()
        without = teacher(x, *(ids.expand(len(x), -1) for ids in empty), sigma, ones).float()
    target: Tensor = without + guidance[:, None, None] * (with_text - without)
    return target


class Trainer:
    """One stage's update: all on the device, so that a CUDA graph can hold it.

    A model this small is bound by launches: 51 ms a step of 256 in eager mode on an H200, whatever the batch.
    """

    def __init__(
        self,
        flow: Flow,
        data: Encoded,
        empty: tuple[Tensor, Tensor],
        batch: int,
        teacher: Flow | None,
    ) -> None:
        device = data.mean.device
        self.flow, self.data, self.batch, self.teacher = flow.train(), data, batch, teacher
        self.empty = tuple(ids.expand(batch, -1) for ids in empty)
        self.rate = torch.zeros((), device=device)
        self.keep = torch.zeros((), device=device)  # the average's decay
        self.total = torch.zeros((), device=device)
        cuda = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            flow.parameters(),
            lr=self.rate if cuda else 0.0,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=cuda,
            capturable=cuda,
        )
        self.average = copy.deepcopy(flow).eval().requires_grad_(False)

    def backward(self) -> None:
        """Draw a batch and add its gradients."""
        data, batch, device = self.data, self.batch, self.data.mean.device
        index = (torch.rand(batch, device=device) * len(data.mean)).long()
        caption = (torch.rand(batch, device=device) * CAPTIONS).long()
        t5_ids, clip_ids = data.t5[index, caption].long(), data.clip[index, caption].long()
        mean = data.mean[index].float()
        latents = mean + data.deviation[index] * torch.randn_like(mean)
        x0 = FluxPipeline._pack_latents(latents, batch, *latents.shape[1:])
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(batch, device=device) + 0.3)
        x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise
        guidance = torch.ones(batch, device=device)
        # a cache of cast weights would outlive the graph's own memory
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            if self.teacher is None:
                drop = (torch.rand(batch, device=device) < 0.1)[:, None]
                t5_ids, clip_ids = torch.where(drop, self.empty[0], t5_ids), torch.where(drop, self.empty[1], clip_ids)
                target = noise - x0
            else:
                plain = torch.rand(batch, device=device) < 0.2
                guidance = torch.where(plain, guidance, 1 + 4 * torch.rand(batch, device=device))
                target = guided(self.teacher, self.empty, x, t5_ids, clip_ids, sigma, guidance)
            velocity = self.flow(x, t5_ids, clip_ids, sigma, guidance)
        loss = (velocity.float() - target).square().mean()
        loss.backward()
        self.total += loss.detach()

    def update(self) -> None:
        """Apply the gradients and move the average."""
        nn.utils.clip_grad_norm_(self.flow.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            move = torch._foreach_sub(list(self.flow.parameters()), list(self.average.parameters()))
            torch._foreach_mul_(move, 1 - self.keep)
            torch._foreach_add_(list(self.average.parameters()), move)

    def capture(self) -> "torch.cuda.CUDAGraph":
        """The whole step as one CUDA graph; the warm-up steps it needs run at rate 0."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward()
                self.update()
                self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.backward()
            self.update()
        return graph


def train(
    flow: Flow,
    data: Encoded,
    empty: tuple[Tensor, Tensor],
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    graphed: bool,
    teacher: Flow | None = None,
    seconds: float = float("inf"),
) -> Flow:
    """One stage; returns the averaged model. With a `teacher`, its guided velocity is the target.

    empty: the ids of the empty caption for both encoders, [1, tokens] each.
    seconds: fewer steps are taken if so many would take longer; their number is printed.
    """
    torch.manual_seed(seed)
    trainer = Trainer(flow, data, empty, batch, teacher)
    start = time.monotonic()
    name = "flow" if teacher is None else "guidance"
    graph = trainer.capture() if graphed else None
    trainer.total.zero_()
    timed = start
    for step in range(steps):
        if step == 100 and seconds < float("inf"):
            trainer.total.item()  # waits for the device
            pace = (time.monotonic() - timed) / 90
            steps = min(steps, 100 + int((seconds - (time.monotonic() - start)) / pace))
            print(f"{name}: {pace * 1000:.1f} ms a step, {steps} steps", flush=True)
        if step == 10:
            trainer.total.item()
            timed = time.monotonic()
        if step >= steps:
            break
        # the warm-up is as long for any number of steps
        now = rate * min(1.0, (step + 1) / 500) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        trainer.keep.fill_(min(0.999, (step + 1) / (step + 10)))
        if graph is not None:
            trainer.rate.fill_(now)
            graph.replay()
        else:
            for group in trainer.optimizer.param_groups:
                group["lr"] = now
            trainer.backward()
            trainer.update()
            trainer.optimizer.zero_grad()
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            mean = trainer.total.item() / (step % 1000 + 1)
            print(f"{name} {step + 1} loss {mean:.4f} {time.monotonic() - start:.0f} s", flush=True)
            trainer.total.zero_()
    return trainer.average
