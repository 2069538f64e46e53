"""Many pictures of the bundled model at once, by the toolkit's own parts, at any precision."""

from collections.abc import Iterator

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family.family import Text
from infer.family.find import of_model
from infer.family.packing import pack
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision
from infer.sample.encode import decode, text_encoder

AT_ONCE = 25


def encode(model: Model, precision: Precision, every: list[str], device: torch.device) -> dict[str, Text]:
    with text_encoder(model, precision, device, None) as encoder:
        return dict(zip(every, encoder(every), strict=True))


def draw(
    model: Model,
    transformer: FluxTransformer2DModel,
    texts: list[Text],
    seeds: range,
    side: int,
    steps: int,
    guidance: float,
    device: torch.device,
) -> Tensor:
    """Packed latents of one picture a text and seed, all at once."""
    dtype, count = compute_dtype_of(transformer), len(texts)
    start = torch.stack(
        [torch.randn(16, side // 8, side // 8, generator=torch.Generator().manual_seed(i)) for i in seeds]
    )
    latents = pack(start).to(device, dtype)
    embeds = torch.stack([text.embeds for text in texts]).to(device, dtype)
    pooled = torch.stack([text.pooled for text in texts if text.pooled is not None]).to(device, dtype)
    family, scheduler = of_model(transformer), load_scheduler(model)
    given = family.inputs(transformer.config, latents, side // 8, side // 8, embeds, pooled, guidance, dtype)
    mu = family.mu(scheduler.config, latents.shape[1], steps)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), device=device, mu=mu)
    with torch.no_grad():
        for t in scheduler.timesteps:
            time_step = (t.expand(count) / 1000).to(dtype)
            velocity = transformer(**(given | {"hidden_states": latents}), timestep=time_step, return_dict=False)[0]
            latents = scheduler.step(velocity, t, latents, return_dict=False)[0]
    return latents


def pictures(
    model: Model, precision: Precision, prompts: list[str], side: int, steps: int, guidance: float, device: torch.device
) -> Iterator[Image.Image]:
    """One picture a prompt, seeds 0 upwards."""
    texts = encode(model, precision, list(dict.fromkeys(prompts)), device)
    transformer = load_transformer(model, precision, device).eval()
    vae: AutoencoderKL = load_vae(model, device)
    for first in range(0, len(prompts), AT_ONCE):
        own = [texts[prompt] for prompt in prompts[first : first + AT_ONCE]]
        seeds = range(first, first + len(own))
        for latents in draw(model, transformer, own, seeds, side, steps, guidance, device):
            yield decode(vae, latents[None], side, side)
