"""The bundled FLUX.2's transformer in training: velocities by regression, and the base's guided paths."""

import copy
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn

from scripts.tiny import klein_parts, make_flow, rounded, world
from scripts.tiny.make_flow import CAPTIONS
from scripts.tiny.pace import Pace, captured, move_average, turn

FINE = (4, 4, 4, 8)  # small steps within each large one of the distilled model
FEW = len(FINE)
GUIDANCE = 3.0  # of the paths that the distilled model learns


class Flow(nn.Module):
    """The transformer with the places of its tokens in pictures of so many pixels a side: packed latents and text
    states in, velocity out."""

    def __init__(self, transformer: Flux2Transformer2DModel, sides: Sequence[int] = (world.SIZE,)) -> None:
        super().__init__()
        self.transformer = transformer
        for side in (side // 16 for side in sides):
            places = Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, side, side))[0]
            self.register_buffer(f"places_{side * side}", places)  # by tokens
        text = torch.zeros(1, klein_parts.TEXT_TOKENS, 1)
        self.register_buffer("txt_ids", Flux2KleinPipeline._prepare_text_ids(text)[0])

    def forward(self, x: Tensor, texts: Tensor, sigma: Tensor) -> Tensor:
        """x [batch, tokens, 128], texts [batch, TEXT_TOKENS, 3 * WIDTH], sigma [batch] -> like x."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=texts,
            timestep=sigma,
            guidance=None,
            img_ids=self.get_buffer(f"places_{x.shape[1]}"),
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]
        return velocity

    def compile_blocks(self) -> None:
        make_flow.compile_blocks(self.transformer)


Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x, texts, sigma and the velocity that is wanted


def noised(x0: Tensor, texts: Tensor, empty: Tensor, batch: int) -> Callable[[], Batch]:
    """Flow matching: x0 [samples, tokens, 128], texts [captions, TEXT_TOKENS, width], CAPTIONS for each sample.

    empty: the empty caption's states [1, TEXT_TOKENS, width], which one in ten is given.
    """

    def draw() -> Batch:
        def chance(share: float) -> Tensor:
            return torch.rand(batch, device=x0.device) < share

        index = (torch.rand(batch, device=x0.device) * len(x0)).long()
        caption = index * CAPTIONS + (torch.rand(batch, device=x0.device) * CAPTIONS).long()
        clean = x0[index].float()
        noise = torch.randn_like(clean)
        # colours are bound to things where there is much noise, and most of the sampler's steps are there
        sigma = torch.sigmoid(torch.randn(batch, device=x0.device) + chance(0.6).float())
        x = (1 - sigma[:, None, None]) * clean + sigma[:, None, None] * noise
        return x, torch.where(chance(0.1)[:, None, None], empty, texts[caption]), sigma, noise - clean

    return draw


def along(stands: Tensor, texts: Tensor, chosen: Tensor, batch: int) -> Callable[[], Batch]:
    """Distillation: the velocity that leads from one stand of a path to the next.

    stands: [paths, FEW + 1, tokens, 128], as `paths` gives them; chosen: [paths or more], the index of each one's text.
    """
    levels = torch.tensor(sigmas(stands.shape[2], FEW), device=stands.device)

    def draw() -> Batch:
        index = (torch.rand(batch, device=stands.device) * len(stands)).long()
        step = (torch.rand(batch, device=stands.device) * FEW).long()
        before, after = stands[index, step].float(), stands[index, step + 1].float()
        target = (after - before) / (levels[step + 1] - levels[step])[:, None, None]
        return before, texts[chosen[index]], levels[step], target

    return draw


def train(
    name: str,
    flow: Flow,
    batches: Sequence[Callable[[], Batch]],
    steps: int,
    rate: float,
    decay: float,
    seconds: float,
    graphed: bool = True,
    kept: Callable[[Flow], None] = lambda flow: None,
    rough: float = make_flow.ROUNDED,
) -> Flow:
    """Regress the velocities that `batches` give, of one size of pictures each, three steps of four of the first one's;
    returns the average.

    graphed: on a GPU, the whole step is one CUDA graph. kept: called with the average about once a minute.
    rough: share of the steps whose weights are rounded to NF4.
    """
    rng = random.Random(name)
    began = time.monotonic()
    parameters: list[Tensor] = list(flow.parameters())
    device = parameters[0].device
    cuda = device.type == "cuda"
    now, move, total = (torch.zeros((), device=device) for _ in range(3))
    optimizer = torch.optim.AdamW(
        parameters, lr=now if cuda else rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda, capturable=cuda
    )
    average = copy.deepcopy(flow).eval().requires_grad_(False)
    rounding = rounded.Rounding(rounded.linear(flow.transformer))

    def step(batch: Callable[[], Batch]) -> None:
        x, texts, sigma, target = batch()
        rounding.begin()
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            velocity = flow(x, texts, sigma)
        loss = (velocity.float() - target).square().mean()
        loss.backward()
        rounding.end()
        total.add_(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            move_average(list(average.parameters()), parameters, move)

    runs: list[Callable[[], None]] = [partial(step, batch) for batch in batches]
    if graphed:
        runs = [captured(run, optimizer) for run in runs]
    pace = Pace(name, steps, seconds - (time.monotonic() - began))
    total.zero_()
    saved = time.monotonic()
    while pace.more():
        move.fill_(1 - pace.keep())
        now.fill_(pace.rate(rate, warmup=300, decay=decay))
        rounding.on.fill_(float(rng.random() < rough))
        if not (graphed and cuda):
            optimizer.zero_grad()
        runs[turn(pace.done, len(runs))]()
        if pace.report():
            pace.say(f"loss {total.item() / pace.since():.4f}")
            total.zero_()
            if time.monotonic() - saved > 60:
                kept(average)
                saved = time.monotonic()
    return average


def sigmas(tokens: int, steps: int) -> list[float]:
    """The pipeline's noise levels, with the 0 that ends them."""
    scheduler = klein_parts.scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    return [float(value) for value in scheduler.sigmas]


def paths(
    flow: Flow, texts: Tensor, empty: Tensor, batch: int, shape: tuple[int, int], seconds: float = float("inf")
) -> Tensor:
    """Where the guided path of each text stands before and after each large step: [texts, FEW + 1, *shape] bf16.

    seconds: of the first texts alone, as many as they suffice for.
    """
    levels, began = sigmas(shape[0], FEW), time.monotonic()
    kept: list[Tensor] = []
    with torch.no_grad(), torch.autocast(texts.device.type, torch.bfloat16):
        for part in texts.split(batch):
            if kept and time.monotonic() - began > seconds:
                break
            x = torch.randn(len(part), *shape, device=texts.device)
            stands = [x.bfloat16()]
            both = torch.cat([part, empty.expand(len(part), -1, -1)])
            for small, (high, low) in zip(FINE, pairwise(levels), strict=True):
                fine = torch.linspace(high, low, small + 1).tolist()
                for a, b in pairwise(fine):
                    sigma = torch.full((2 * len(part),), a, device=x.device)
                    with_text, without = flow(torch.cat([x, x]), both, sigma).float().chunk(2)
                    x = x + (b - a) * (without + GUIDANCE * (with_text - without))
                stands.append(x.bfloat16())
            kept.append(torch.stack(stands, 1))
            if x.is_cuda:
                torch.cuda.synchronize()  # the clock is the device's
    return torch.cat(kept)
