"""Train the bundled models' autoencoders on pictures far broader than the small world.

    python scripts/tiny/make_vae.py scripts/tiny/model --out FOLDER --seconds 120    # the decoder alone, on a GPU

A VAE must encode what users bring, so half of its pictures have colours and noise that no caption of the small world
speaks of, and half have outlines, neon or inked. The transformer never sees those.

The decoder alone can be trained further at any time: latents stay what they are, and so does what the transformer
learned of them.
"""

import argparse
import copy
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import parts, world
from scripts.tiny.pace import Pace, captured, move_average, turn

AT_ONCE = 8  # batches that are painted together: fewer launches
DECIBELS = -10 / math.log(10)  # of a squared error's natural logarithm
PEAK = 20 * math.log10(2)  # dB, of values from -1 to 1
DIVERGENCE = 0.01  # weight of the posterior's divergence from a normal distribution


def pictures(batch: int, device: torch.device, side: int = world.SIZE) -> Tensor:
    """Random pictures [batch, 3, side, side] in [-1, 1], half of them of the world's own colours."""

    def uniform(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, device=device) * (high - low) + low

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
        style=(uniform(batch) * len(world.STYLES)).long() * (uniform(batch) < 0.75).long(),  # half of them plain
    )
    drawn = world.paint(canvas, side)
    noise = torch.randn((batch, 3, 8, 8), device=device)
    clouds = torch.nn.functional.interpolate(noise, size=drawn.shape[-2:], mode="bicubic") * 0.15
    strength = torch.where(in_world, 0.0, uniform(batch, 1))[..., None, None]
    return ((drawn + clouds * strength).clamp(0, 1) * 2 - 1).float()


class Trainer:
    """The step: all on the device, so that a CUDA graph can hold it, one for each size of pictures."""

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderKLFlux2,
        batch: int,
        rate: float,
        device: torch.device,
        sides: Sequence[int] = (world.SIZE,),
    ) -> None:
        self.vae, self.cuda = vae, device.type == "cuda"
        self.parameters = [p for p in vae.parameters() if p.requires_grad]
        self.average = copy.deepcopy([p.detach() for p in self.parameters])
        self.rate = torch.zeros((), device=device)
        self.move = torch.zeros((), device=device)  # the share of the way that the average moves
        self.figures = torch.zeros(2, device=device)  # sums of the squared error's logarithm and of the divergence
        self.images = {side: pictures(batch, device, side) for side in sides}
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=self.rate if self.cuda else rate,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            fused=self.cuda,
            capturable=self.cuda,
        )

    def step(self, side: int) -> None:
        """Learn from the side's images and move the average.

        Computed in bf16 throughout: autocast would do the norms in fp32, at twice the memory that they read and write.
        """
        image = self.images[side]
        with _in_bf16(self.vae):
            mean, log_variance = _moments(self.vae, image.bfloat16())
            log_variance = log_variance.clamp(-20, 10)
            output = _decoded(self.vae, (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).bfloat16())
        # its logarithm is what PSNR measures; the limit keeps empty pictures from ruling
        square = ((output - image).square().mean((1, 2, 3)) + 1e-5).log().mean()
        # nats a latent element; the weight leaves informative latents sharp and lets spare ones be noise
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = square + DIVERGENCE * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            move_average(self.average, self.parameters, self.move)
            self.figures += torch.stack([square, divergence])


def train(
    vae: AutoencoderKL | AutoencoderKLFlux2,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    device: torch.device,
    seconds: float = float("inf"),
    graphed: bool = True,
    sides: Sequence[int] = (world.SIZE,),
) -> dict[str, float]:
    """Train in place, leave the average of its weights, and set how its latents are normalised.

    An encoder that requires no gradients stays as it is, and with it the latents and how they are normalised.
    Returns PSNRs in dB on unseen pictures. `seconds`: fewer steps are taken if so many would take longer. `sides`: of
    its pictures in pixels, the first for three steps of four.
    """
    torch.manual_seed(seed)
    began = time.monotonic()
    vae.to(device).train()
    trainer = Trainer(vae, batch, rate, device, sides)
    graphed = graphed and trainer.cuda
    runs: list[Callable[[], None]] = [partial(trainer.step, side) for side in sides]
    if graphed:
        runs = [captured(run, trainer.optimizer) for run in runs]
    pools: dict[int, list[Tensor]] = {side: [] for side in sides}
    pace = Pace("vae", steps, seconds - (time.monotonic() - began))
    trainer.figures.zero_()
    while pace.more():
        way = turn(pace.done, len(sides))
        pool = pools[sides[way]]
        if not pool:
            pool += pictures(AT_ONCE * batch, device, sides[way]).split(batch)
        trainer.images[sides[way]].copy_(pool.pop())
        now = pace.rate(rate, warmup=200, decay=0.6)
        if trainer.cuda:
            trainer.rate.fill_(now)
        else:
            trainer.optimizer.param_groups[0]["lr"] = now
        trainer.move.fill_(1 - pace.keep())
        if not graphed:
            trainer.optimizer.zero_grad()
        runs[way]()
        if pace.report():
            square, divergence = (trainer.figures / pace.since()).tolist()
            pace.say(f"psnr {DECIBELS * square + PEAK:.2f} kl {divergence:.2f}")
            trainer.figures.zero_()
    with torch.no_grad():
        for parameter, mean in zip(trainer.parameters, trainer.average, strict=True):
            parameter.copy_(mean)
    vae.eval()
    if any(parameter.requires_grad for parameter in vae.encoder.parameters()):
        normalise(vae, seed, sides[0])
    return decibels(vae, seed, sides)


@contextmanager
def _in_bf16(vae: AutoencoderKL | AutoencoderKLFlux2) -> Iterator[None]:
    """Its weights cast to bf16 for the time of the block; gradients come to the weights themselves."""
    modules = [(module, dict(module._parameters)) for module in vae.modules() if module._parameters]
    try:
        for module, own in modules:
            cast = {name: value if value is None else value.bfloat16() for name, value in own.items()}
            # not as a parameter, which would lose where it came from
            module._parameters = cast
        yield
    finally:
        for module, own in modules:
            module._parameters = own


def _moments(vae: AutoencoderKL | AutoencoderKLFlux2, image: Tensor) -> tuple[Tensor, Tensor]:
    moments = vae.encoder(image)
    if vae.quant_conv is not None:
        moments = vae.quant_conv(moments)
    mean, log_variance = moments.float().chunk(2, 1)
    return mean, log_variance


def _decoded(vae: AutoencoderKL | AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    if vae.post_quant_conv is not None:
        latents = vae.post_quant_conv(latents)
    picture: Tensor = vae.decoder(latents).float()
    return picture


def _unseen(seed: int, device: torch.device) -> list[world.Scene]:
    rng = random.Random(f"vae {seed}")
    return [world.sample_scene(rng) for _ in range(256 if device.type == "cuda" else 8)]


def normalise(vae: AutoencoderKL | AutoencoderKLFlux2, seed: int, side: int = world.SIZE) -> None:
    """One scale and shift for all channels (FLUX.1), or running figures of every packed channel (FLUX.2)."""
    scenes = _unseen(seed, vae.device)
    with torch.no_grad():
        image = world.paint(world.canvas(scenes, device=vae.device), side) * 2 - 1
        latents = torch.cat([vae.encode(part).latent_dist.sample() for part in image.split(32)])
        if isinstance(vae, AutoencoderKLFlux2):
            packed = torch.nn.functional.pixel_unshuffle(latents, 2)
            vae.bn.running_mean.copy_(packed.mean((0, 2, 3)))
            vae.bn.running_var.copy_(packed.var((0, 2, 3)))
        else:
            vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


def decibels(
    vae: AutoencoderKL | AutoencoderKLFlux2, seed: int, sides: Sequence[int] = (world.SIZE,)
) -> dict[str, float]:
    """Mean PSNR in dB, with weights as they are stored, of unseen scenes in each style, of a broad mix, and of plain
    scenes at the further sizes."""
    stored, scenes = copy.deepcopy(vae).to(torch.bfloat16).float(), _unseen(seed, vae.device)
    torch.manual_seed(seed)
    sets = {style: world.paint(world.canvas(scenes, style, vae.device), sides[0]) * 2 - 1 for style in world.STYLES}
    sets["broad"] = pictures(len(scenes), vae.device, sides[0])
    sets |= {
        f"plain at {side}": world.paint(world.canvas(scenes, device=vae.device), side) * 2 - 1 for side in sides[1:]
    }
    with torch.no_grad():
        return {name: round(fmean(_psnr(stored, part) for part in images.split(8)), 2) for name, images in sets.items()}


def _psnr(vae: AutoencoderKL | AutoencoderKLFlux2, image: Tensor) -> float:
    """Mean over pictures of each one's decibels."""
    output = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
    return float(-10 * torch.log10((output - image).square().mean((1, 2, 3)) / 4).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="whose decoder is trained further")
    parser.add_argument("--out", type=Path, required=True, help="folder of the autoencoder alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--sides", type=int, nargs="+", default=[world.SIZE], help="of the pictures, the first mostly")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    flux2 = json.loads((args.model / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKLFlux2"
    vae = parts.loaded(AutoencoderKLFlux2 if flux2 else AutoencoderKL, args.model / "vae").to(device)
    vae.encoder.requires_grad_(False)
    print(f"PSNR before, dB: {decibels(vae, args.seed, args.sides)}", flush=True)
    after = train(vae, args.steps, args.batch, args.rate, args.seed, device, args.seconds, sides=args.sides)
    print(f"PSNR after, dB: {after}", flush=True)
    copy.deepcopy(vae).to(torch.bfloat16).save_pretrained(args.out)


if __name__ == "__main__":
    main()
