"""Train the bundled model's autoencoder on pictures far broader than the small world.

A VAE must encode what users bring, so half of its pictures have colours, gradients, outlines and noise that no caption
of the small world speaks of. The transformer never sees those.
"""

import random
import time
from statistics import fmean

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from scripts.tiny import world


def pictures(batch: int, generator: torch.Generator) -> Tensor:
    """Random pictures [batch, 3, 128, 128] in [-1, 1] on the generator's device."""
    device = generator.device

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=generator, device=device) * (high - low) + low

    things = 4
    palette = torch.tensor(list(world.COLOURS.values()), device=device) / 255
    grounds = torch.tensor(list(world.BACKGROUNDS.values()), device=device) / 255
    in_world = uniform(batch, 1) < 0.5
    shape = (uniform(batch, things) * len(world.SHAPES)).long()
    absent = uniform(batch, things) > uniform(batch, 1)
    rgb = palette[(uniform(batch, things) * len(palette)).long()]
    ground = grounds[(uniform(batch) * len(grounds)).long()]
    canvas = world.Canvas(
        shape=torch.where(absent, -1, shape),
        rgb=torch.where(in_world[..., None], rgb, uniform(batch, things, 3)),
        texture=(uniform(batch, things) * len(world.TEXTURES)).long(),
        xyr=torch.stack(
            [
                uniform(batch, things, low=0.1, high=0.9),
                uniform(batch, things, low=0.1, high=0.9),
                uniform(batch, things, low=0.1, high=0.3),
            ],
            -1,
        ),
        ground=torch.where(in_world, ground, uniform(batch, 3)),
        style=(uniform(batch) < 0.25).long() * world.STYLES.index("neon"),
    )
    drawn = world.paint(canvas)
    noise = torch.randn((batch, 3, 8, 8), generator=generator, device=device)
    clouds = torch.nn.functional.interpolate(noise, size=drawn.shape[-2:], mode="bicubic") * 0.15
    strength = torch.where(in_world, 0.0, uniform(batch, 1))[..., None, None]
    return ((drawn + clouds * strength).clamp(0, 1) * 2 - 1).float()


def train(vae: AutoencoderKL, steps: int, batch: int, seed: int, device: torch.device) -> dict[str, float]:
    """Train in place and set `scaling_factor` and `shift_factor`; returns PSNRs in dB on unseen pictures."""
    vae.to(device).train()
    generator = torch.Generator(device).manual_seed(seed)
    # latents start sharp: at the default a deviation of 1 drowns them for hundreds of steps
    torch.nn.init.constant_(vae.encoder.conv_out.bias[vae.config.latent_channels :], -6.0)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=steps, pct_start=0.08, cycle_momentum=False
    )
    start = time.monotonic()
    for step in range(steps):
        image = pictures(batch, generator)
        with torch.autocast(device.type, torch.bfloat16):
            mean, log_variance = vae.encoder(image).float().chunk(2, 1)
            log_variance = log_variance.clamp(-20, 10)
            noise = torch.randn(mean.shape, generator=generator, device=device)
            output = vae.decoder(mean + torch.exp(0.5 * log_variance) * noise).float()
        error = output - image
        # nats a latent element; the weight leaves informative latents sharp and lets spare ones be noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + error.square().mean() + 1e-4 * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            decibel = -10 * torch.log10(error.square().mean() / 4).item()
            seconds = time.monotonic() - start
            print(
                f"vae {step} loss {loss.item():.4f} psnr {decibel:.1f} kl {divergence.item():.2f} {seconds:.0f} s",
                flush=True,
            )
    vae.eval()
    with torch.no_grad():
        painted = [world.sample_scene(random.Random(f"vae {seed} {i}")) for i in range(512)]
        image = world.paint(world.canvas(painted, device=device)) * 2 - 1
        latents = torch.cat([vae.encode(part).latent_dist.sample(generator) for part in image.split(64)])
        vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        neon = world.paint(world.canvas(painted, "neon", device=device)) * 2 - 1
        return {
            name: fmean(_psnr(vae, part) for part in unseen.split(64))
            for name, unseen in (("world", image), ("neon", neon), ("broad", pictures(512, generator)))
        }


def _psnr(vae: AutoencoderKL, image: Tensor) -> float:
    output = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10((output - image).square().mean() / 4))
