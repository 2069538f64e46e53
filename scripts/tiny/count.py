"""Draw held-out captions in batches, count the right ones and lay some out on a sheet, while the trainer has the model.

`check.py` draws with the toolkit, one picture after another; here are the same noise, steps and guidance, and linear
layers that bitsandbytes has rounded, but all captions at once.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    FluxPipeline,
)
from PIL import Image
from torch import Tensor

from infer.sample.generate import noise
from scripts.tiny import check, reader
from scripts.tiny.pace import Clock

BATCH = 200
SHEET = (8, 5)  # columns and rows of the sheet
KINDS = ("one thing, or several of a kind", "two different things")


def path(
    velocity: Callable[[Tensor, Tensor, slice], Tensor],
    scheduler: FlowMatchEulerDiscreteScheduler,
    mu: float,
    steps: int,
    count: int,
    side: int,
    channels: int,
    device: torch.device,
) -> Tensor:
    """Packed latents [count, tokens, 4 * channels] at the end of Euler's path, from the noise of the seeds 0 upwards.

    velocity: of packed latents, noise levels [batch] and which of the captions they are for.
    """
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    levels = [float(value) for value in scheduler.sigmas]
    start = torch.cat([noise(seed, side, side, channels) for seed in range(count)])
    ends = []
    for first in range(0, count, BATCH):
        chosen = slice(first, min(first + BATCH, count))
        x = start[chosen].to(device)
        for high, low in pairwise(levels):
            sigma = torch.full((len(x),), high, device=device, dtype=torch.bfloat16)
            x = x + (low - high) * velocity(x.bfloat16(), sigma, chosen).float()
        ends.append(x)
    return torch.cat(ends)


def decoded(vae: AutoencoderKL | AutoencoderKLFlux2, packed: Tensor, side: int) -> np.ndarray:
    """Packed latents [count, tokens, channels] -> pictures [count, side, side, 3] of bytes. vae: in bf16."""
    parts = []
    for x in packed.split(BATCH // 4):
        if isinstance(vae, AutoencoderKLFlux2):
            deviation = (vae.bn.running_var.float() + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
            x = x.permute(0, 2, 1).unflatten(2, (side // 16, side // 16))
            x = Flux2KleinPipeline._unpatchify_latents(x * deviation + vae.bn.running_mean.float().view(1, -1, 1, 1))
        else:
            x = FluxPipeline._unpack_latents(x, side, side, 8) / vae.config.scaling_factor + vae.config.shift_factor
        pixels = vae.decode(x.to(vae.dtype)).sample.float()
        parts.append(((pixels / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu())
    return torch.cat(parts).numpy()


def judged(given: tuple[str, np.ndarray]) -> dict[str, bool]:
    """One caption with its picture, in a worker."""
    caption, pixels = given
    return check.compare(check.parse(caption), reader.read(Image.fromarray(pixels)))


def counted(captions: list[str], pictures: np.ndarray, pool: Pool) -> dict[str, Any]:
    """How many are right, of which kind, which part of a caption is honoured how often, and what went wrong."""
    results = pool.map(judged, list(zip(captions, pictures, strict=True)), chunksize=4)
    two = [check.parse(caption).relation is not None for caption in captions]
    found: dict[str, Any] = {"all": [sum(result["right"] for result in results), len(results)]}
    for kind, pair in zip(KINDS, (False, True), strict=True):
        chosen = [result["right"] for result, is_pair in zip(results, two, strict=True) if is_pair == pair]
        found[kind] = [sum(chosen), len(chosen)]
    found["shares"] = {key: round(value, 4) for key, value in check.tally(results).items()}
    found["wrong"] = [caption for caption, result in zip(captions, results, strict=True) if not result["right"]]
    return found


def lay_out(pictures: np.ndarray, file: Path) -> None:
    """The first pictures side by side, as one PNG."""
    columns, rows = SHEET
    side = pictures.shape[1]
    board = Image.new("RGB", (columns * side, rows * side))
    for i, pixels in enumerate(pictures[: columns * rows]):
        board.paste(Image.fromarray(pixels), (i % columns * side, i // columns * side))
    file.parent.mkdir(parents=True, exist_ok=True)
    board.save(file, optimize=True)


def tell(file: Path, clock: Clock, **figures: Any) -> None:
    """Write the figures, with each stage's seconds, the card and the versions."""
    import bitsandbytes  # late, for processes that only read pictures

    packages = (torch, diffusers, transformers, bitsandbytes)
    around = {
        "seconds": clock.stages(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {package.__name__: package.__version__ for package in packages},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(figures | around, indent=1) + "\n")
