"""Make the bundled FLUX.2 from FLUX.1's autoencoder and a seed: klein's base, and a distilled one of 4 steps from it.

    python scripts/tiny/make_klein.py --vae scripts/tiny/model --base scripts/tiny/klein-base --out scripts/tiny/klein

The text encoder is taught by make_text's labels and kept as it is. The base learns flow matching with one caption in
ten left empty, so that it is drawn with two calls a step. The distilled one learns where the base's guided path of
so many small steps stands after each of 4 large ones (progressive distillation, Salimans & Ho 2022).
"""

import argparse
import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor, nn
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import klein_parts, make_vae, world
from scripts.tiny.klein_text import chat, draw_captions, embed, teach_text
from scripts.tiny.make_flow import CAPTIONS, CHUNK
from scripts.tiny.pace import Pace, captured, move_average

FEW, FINE = 4, 4  # large steps of the distilled model, and small ones within each
GUIDANCE = 3.0  # of the paths that the distilled model learns


@dataclass
class Encoded:
    """The training set in memory."""

    x0: Tensor  # [samples, tokens, 128] bf16, packed and normalised
    texts: Tensor  # [captions, TEXT_TOKENS, 3 * WIDTH] bf16, CAPTIONS for each sample


def pack(vae: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """[batch, 32, h, w] -> [batch, h w / 4, 128], normalised as the pipeline does."""
    packed = Flux2KleinPipeline._patchify_latents(latents)
    mean, deviation = (value.view(1, -1, 1, 1) for value in (vae.bn.running_mean, vae.bn.running_var))
    normalised = (packed - mean) / (deviation + vae.config.batch_norm_eps).sqrt()
    tokens: Tensor = Flux2KleinPipeline._pack_latents(normalised)
    return tokens


class Flow(nn.Module):
    """The transformer with the places of its tokens: packed latents and text states in, velocity out."""

    def __init__(self, transformer: Flux2Transformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        side = world.SIZE // 16
        self.register_buffer("img_ids", Flux2KleinPipeline._prepare_latent_ids(torch.zeros(1, 1, side, side))[0])
        text = torch.zeros(1, klein_parts.TEXT_TOKENS, 1)
        self.register_buffer("txt_ids", Flux2KleinPipeline._prepare_text_ids(text)[0])

    def forward(self, x: Tensor, texts: Tensor, sigma: Tensor) -> Tensor:
        """x [batch, tokens, 128], texts [batch, TEXT_TOKENS, 3 * WIDTH], sigma [batch] -> like x."""
        velocity: Tensor = self.transformer(
            hidden_states=x,
            encoder_hidden_states=texts,
            timestep=sigma,
            guidance=None,
            img_ids=self.img_ids,
            txt_ids=self.txt_ids,
            return_dict=False,
        )[0]
        return velocity

    def compile_blocks(self) -> None:
        for block in [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]:
            block.compile()


def train(
    name: str,
    flow: Flow,
    batch: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]],
    steps: int,
    rate: float,
    decay: float,
    seconds: float,
) -> Flow:
    """Regress the velocity that `batch` gives as x, texts, sigma, target; returns the average."""
    began = time.monotonic()
    parameters: list[Tensor] = list(flow.parameters())
    device = parameters[0].device
    cuda = device.type == "cuda"
    now, move, total = (torch.zeros((), device=device) for _ in range(3))
    optimizer = torch.optim.AdamW(
        parameters, lr=now if cuda else rate, betas=(0.9, 0.98), weight_decay=0.01, fused=cuda, capturable=cuda
    )
    average = copy.deepcopy(flow).eval().requires_grad_(False)

    def step() -> None:
        x, texts, sigma, target = batch()
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            velocity = flow(x, texts, sigma)
        loss = (velocity.float() - target).square().mean()
        loss.backward()
        total.add_(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            move_average(list(average.parameters()), parameters, move)

    run = captured(step, optimizer)
    pace = Pace(name, steps, seconds - (time.monotonic() - began))
    total.zero_()
    while pace.more():
        move.fill_(1 - pace.keep())
        now.fill_(pace.rate(rate, warmup=300, decay=decay))
        if not cuda:
            optimizer.zero_grad()
        run()
        if pace.report():
            pace.say(f"loss {total.item() / pace.since():.4f}")
            total.zero_()
    return average


def sigmas(tokens: int, steps: int) -> list[float]:
    """The pipeline's noise levels, with the 0 that ends them."""
    scheduler = klein_parts.scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps))
    return [float(value) for value in scheduler.sigmas]


def paths(flow: Flow, texts: Tensor, empty: Tensor, batch: int, shape: tuple[int, int]) -> Tensor:
    """Where the guided path of each text stands before and after each large step: [texts, FEW + 1, *shape] bf16."""
    levels = sigmas(shape[0], FEW)
    kept = []
    with torch.no_grad(), torch.autocast(texts.device.type, torch.bfloat16):
        for part in texts.split(batch):
            x = torch.randn(len(part), *shape, device=texts.device)
            stands = [x.bfloat16()]
            both = torch.cat([part, empty.expand(len(part), -1, -1)])
            for high, low in pairwise(levels):
                fine = torch.linspace(high, low, FINE + 1).tolist()
                for a, b in pairwise(fine):
                    sigma = torch.full((2 * len(part),), a, device=x.device)
                    with_text, without = flow(torch.cat([x, x]), both, sigma).float().chunk(2)
                    x = x + (b - a) * (without + GUIDANCE * (with_text - without))
                stands.append(x.bfloat16())
            kept.append(torch.stack(stands, 1))
    return torch.cat(kept)


def save(
    folder: Path, flow: Flow, vae: AutoencoderKLFlux2, encoder: Qwen3ForCausalLM, reader: Qwen2Tokenizer, few: bool
) -> None:
    """Write a checkpoint in bf16; what is being trained stays as it is."""
    Flux2KleinPipeline(
        scheduler=klein_parts.scheduler(),
        vae=copy.deepcopy(vae).to(torch.bfloat16),
        text_encoder=copy.deepcopy(encoder).to(torch.bfloat16),
        tokenizer=reader,
        transformer=copy.deepcopy(flow.transformer).to(torch.bfloat16),
        is_distilled=few,
    ).save_pretrained(folder, max_shard_size="10MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", type=Path, required=True, help="the FLUX.1 whose autoencoder is widened")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the distilled one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=160_000)
    parser.add_argument("--pairs", type=float, default=0.6, help="share of pictures with two different things")
    parser.add_argument("--vae-steps", type=int, default=4000)
    parser.add_argument("--vae-seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--text-steps", type=int, default=1500)
    parser.add_argument("--flow-steps", type=int, default=20_000)
    parser.add_argument("--flow-until", type=float, default=float("inf"), help="seconds after the start of all")
    parser.add_argument("--paths", type=int, default=60_000, help="of the base, that the distilled one learns from")
    parser.add_argument("--few-steps", type=int, default=6000)
    parser.add_argument("--few-until", type=float, default=float("inf"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    vae_batch, text_batch = 24, 1024
    if args.smoke:
        args.samples, args.vae_steps, args.text_steps, args.flow_steps, args.few_steps = 32, 2, 3, 3, 3
        args.batch, vae_batch, text_batch, args.paths = 4, 2, 32, 8
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    start = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {text}", flush=True)

    spans = [
        (first, min(first + CHUNK, args.samples), args.seed, args.pairs) for first in range(0, args.samples, CHUNK)
    ]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        drawn = pool.map(draw_captions, spans)
    report(f"{args.samples} scenes and captions drawn")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    reader = klein_parts.tokenizer()
    ids, mask, wanted = (torch.from_numpy(np.concatenate([each[i] for _, each in drawn])).to(device) for i in range(3))
    encoder = klein_parts.text_encoder(reader).to(device)
    teach_text(encoder, reader, ids, mask, wanted, args.text_steps, text_batch)
    encoder.eval().requires_grad_(False)
    report("text encoder taught")
    vae = klein_parts.vae(AutoencoderKL.from_pretrained(args.vae / "vae").float())
    vae.bn.requires_grad_(False)
    decibels = make_vae.train(vae, args.vae_steps, vae_batch, 5e-4, args.seed, device, args.vae_seconds)
    report(f"autoencoder, PSNR on unseen pictures: { {name: round(value, 2) for name, value in decibels.items()} }")
    empty_ids, empty_mask = (torch.from_numpy(value).to(device) for value in chat(reader, [""]))
    # what is drawn with is the encoder in bf16, so that is what is trained with
    stored = copy.deepcopy(encoder).to(torch.bfloat16)
    kept, texts = [], []
    with torch.no_grad():
        for scenes, _ in drawn:
            with torch.autocast(device.type, torch.bfloat16):
                image = world.paint(world.canvas(scenes, device=device)) * 2 - 1
                latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in image.split(256)])
            kept.append(pack(vae, latents).bfloat16())
        for part in zip(ids.split(4096), mask.split(4096), strict=True):
            texts.append(embed(stored, *part).bfloat16())
        empty = embed(stored, empty_ids, empty_mask).bfloat16()
    data = Encoded(torch.cat(kept), torch.cat(texts))
    report(f"encoded, latents' deviation {data.x0.float().std():.3f}, texts' {data.texts[:999].float().std():.3f}")
    count, shape = len(data.x0), tuple(data.x0.shape[1:])

    def plain() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = (torch.rand(args.batch, device=device) * count).long()
        caption = index * CAPTIONS + (torch.rand(args.batch, device=device) * CAPTIONS).long()
        drop = (torch.rand(args.batch, device=device) < 0.1)[:, None, None]
        x0 = data.x0[index].float()
        noise = torch.randn_like(x0)
        sigma = torch.sigmoid(torch.randn(args.batch, device=device) + 0.3)
        x = (1 - sigma[:, None, None]) * x0 + sigma[:, None, None] * noise
        return x, torch.where(drop, empty, data.texts[caption]), sigma, noise - x0

    torch.manual_seed(args.seed + 1)
    flow = Flow(klein_parts.transformer()).to(device)
    if args.compile:
        flow.compile_blocks()
    base = train(
        "flow", flow, plain, args.flow_steps, 1e-3, 0.4, args.flow_until - (time.monotonic() - start)
    )  # fmt: skip
    save(args.base, base, vae, encoder, reader, few=False)
    report("base trained")
    if args.compile:
        base.compile_blocks()
    chosen = torch.randperm(len(data.texts), device=device)[: args.paths]
    stands = paths(base, data.texts[chosen], empty, args.batch // 2, (shape[0], shape[1]))
    report(f"{len(stands)} paths of {FEW * FINE} steps at guidance {GUIDANCE} drawn")
    levels = torch.tensor(sigmas(shape[0], FEW), device=device)

    def few() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        index = (torch.rand(args.batch, device=device) * len(stands)).long()
        step = (torch.rand(args.batch, device=device) * FEW).long()
        before, after = stands[index, step].float(), stands[index, step + 1].float()
        target = (after - before) / (levels[step + 1] - levels[step])[:, None, None]
        return before, data.texts[chosen[index]], levels[step], target

    student = copy.deepcopy(base).requires_grad_(True).train()
    if args.compile:
        student.compile_blocks()
    student = train("few", student, few, args.few_steps, 5e-4, 0.8, args.few_until - (time.monotonic() - start))
    save(args.out, student, vae, encoder, reader, few=True)
    report("distilled")


if __name__ == "__main__":
    main()
