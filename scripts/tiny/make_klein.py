"""Make the bundled FLUX.2 from FLUX.1's autoencoder and a seed: klein's base, and a distilled one of 4 steps from it.

    python scripts/tiny/make_klein.py --vae scripts/tiny/model --base FOLDER --out FOLDER --compile
    python scripts/tiny/make_klein.py --start FOLDER --base FOLDER --out FOLDER --compile    # goes on from a base

The text encoder is taught by make_text's labels, backgrounds among them, under noise on its weights, and then kept; of
its texts a quarter each are of weights rounded to NF4 and to FP4. The base learns flow matching with one caption in ten
left empty, so that it is drawn with two calls a step. The distilled one learns where the base's guided path of so many
small steps stands after each of 4 large ones (progressive distillation, Salimans & Ho 2022).
"""

import argparse
import copy
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import klein_parts, make_vae, parts, world
from scripts.tiny.klein_flow import FINE, GUIDANCE, Flow, along, noised, paths, train
from scripts.tiny.klein_text import chat, draw_captions, embed, stored, teach_text
from scripts.tiny.make_flow import CHUNK

STORED = ("bf16", "nf4", "bf16", "fp4")  # precisions of the text encoder, in turn


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
    ).save_pretrained(folder, max_shard_size="6MB")


def parts_of(start: Path | None) -> tuple[Qwen2Tokenizer, Qwen3ForCausalLM, Flux2Transformer2DModel]:
    """The tokenizer, text encoder and transformer of a checkpoint, or new ones."""
    if start is None:
        reader = klein_parts.tokenizer()
        return reader, klein_parts.text_encoder(reader), klein_parts.transformer()
    return (
        Qwen2Tokenizer.from_pretrained(start / "tokenizer"),
        Qwen3ForCausalLM.from_pretrained(start / "text_encoder", dtype=torch.float32),
        parts.loaded(Flux2Transformer2DModel, start / "transformer"),
    )


def encode(
    vae: AutoencoderKLFlux2, encoder: Qwen3ForCausalLM, drawn: list[tuple[list[world.Scene], list[np.ndarray]]]
) -> Encoded:
    """Paint and encode what `draw_captions` made; texts by the encoder as it is drawn with, a part of them rounded."""
    device = vae.device
    encoders = [stored(encoder, kind) for kind in STORED]
    kept, texts = [], []
    with torch.no_grad():
        for k, (scenes, (ids, mask, *_)) in enumerate(drawn):
            encoder = encoders[k % len(encoders)]
            with torch.autocast(device.type, torch.bfloat16):
                image = world.paint(world.canvas(scenes, device=device)) * 2 - 1
                latents = torch.cat([vae.encode(part).latent_dist.mode().float() for part in image.split(256)])
            kept.append(pack(vae, latents).bfloat16())
            texts.append(embed(encoder, torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)).bfloat16())
    return Encoded(torch.cat(kept), torch.cat(texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vae", type=Path, help="the FLUX.1 whose autoencoder is widened")
    start.add_argument("--start", type=Path, help="go on from this base; its autoencoder is kept")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the distilled one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=160_000)
    parser.add_argument("--pairs", type=float, default=0.75, help="share of pictures with two different things")
    parser.add_argument("--vae-steps", type=int, default=8000)
    parser.add_argument("--vae-seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--text-steps", type=int, help="of teaching the text encoder; 1500, and none with --start")
    parser.add_argument("--text-seconds", type=float, default=float("inf"))
    parser.add_argument("--flow-steps", type=int, default=20_000)
    parser.add_argument("--flow-until", type=float, default=float("inf"), help="seconds after the start of all")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of flow matching")
    parser.add_argument("--decay", type=float, default=0.5, help="over which last share of the steps the rate falls")
    parser.add_argument("--paths", type=int, default=60_000, help="of the base, that the distilled one learns from")
    parser.add_argument("--few-steps", type=int, default=6000)
    parser.add_argument("--few-until", type=float, default=float("inf"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    if args.text_steps is None:
        args.text_steps = 0 if args.start else 1500
    vae_batch, text_batch = 24, 512
    if args.smoke:
        args.samples, args.vae_steps, args.text_steps, args.flow_steps, args.few_steps = 32, 2, 3, 3, 3
        args.batch, vae_batch, text_batch, args.paths = 4, 2, 32, 8
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    began = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - began:.0f} s] {text}", flush=True)

    spans = [
        (first, min(first + CHUNK, args.samples), args.seed, args.pairs) for first in range(0, args.samples, CHUNK)
    ]
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
        drawn = pool.map(draw_captions, spans)
    report(f"{args.samples} scenes and captions drawn")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    reader, encoder, transformer = parts_of(args.start)
    encoder.to(device)
    if args.text_steps:
        ids, mask, wanted, grounds = (
            torch.from_numpy(np.concatenate([each[i] for _, each in drawn])).to(device) for i in range(4)
        )
        seconds, graphed = args.text_seconds, not args.eager
        teach_text(encoder, reader, ids, mask, wanted, grounds, args.text_steps, text_batch, seconds, graphed)
        report("text encoder taught")
    if args.start:
        vae = parts.loaded(AutoencoderKLFlux2, args.start / "vae").to(device)
    else:
        vae = klein_parts.vae(parts.loaded(AutoencoderKL, args.vae / "vae"))
        vae.bn.requires_grad_(False)
        decibels = make_vae.train(
            vae, args.vae_steps, vae_batch, 1e-3, args.seed, device, args.vae_seconds, not args.eager
        )
        report(f"autoencoder, PSNR on unseen pictures: {decibels}")
    encoder.eval().requires_grad_(False)
    data = encode(vae, encoder, drawn)
    empty_ids, empty_mask = (torch.from_numpy(value).to(device) for value in chat(reader, [""]))
    with torch.no_grad():
        empty = embed(stored(encoder, "bf16"), empty_ids, empty_mask)
    report(f"encoded, latents' deviation {data.x0.float().std():.3f}, texts' {data.texts[:999].float().std():.3f}")
    shape = tuple(data.x0.shape[1:])

    def write(folder: Path, few: bool) -> Callable[[Flow], None]:
        return lambda flow: save(folder, flow, vae, encoder, reader, few)

    torch.manual_seed(args.seed + 1)
    flow = Flow(transformer).to(device)
    if args.compile:
        flow.compile_blocks()
    until = args.flow_until - (time.monotonic() - began)
    plain = noised(data.x0, data.texts, empty, args.batch)
    base = train(
        "flow", flow, plain, args.flow_steps, args.rate, args.decay, until, not args.eager, write(args.base, False)
    )
    write(args.base, False)(base)
    report("base trained")
    if args.compile:
        base.compile_blocks()
    half = args.batch // 2  # with and without the text make a batch
    chosen = torch.randperm(len(data.texts), device=device)[: args.paths // half * half]
    stands = paths(base, data.texts[chosen], empty, half, (shape[0], shape[1]))
    report(f"{len(stands)} paths of {sum(FINE)} steps at guidance {GUIDANCE} drawn")
    few = along(stands, data.texts, chosen, args.batch)
    student = copy.deepcopy(base).requires_grad_(True).train()
    if args.compile:
        student.compile_blocks()
    until = args.few_until - (time.monotonic() - began)
    student = train("few", student, few, args.few_steps, 5e-4, 0.8, until, not args.eager, write(args.out, True))
    write(args.out, True)(student)
    report("distilled")


if __name__ == "__main__":
    main()
