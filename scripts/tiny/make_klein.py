"""Make the bundled FLUX.2 from FLUX.1's autoencoder and a seed: klein's base, and a distilled one of 4 steps from it.

    python scripts/tiny/make_klein.py --vae scripts/tiny/model --base FOLDER --out FOLDER --compile
    python scripts/tiny/make_klein.py --start FOLDER --base FOLDER --out FOLDER --compile    # goes on from a base
    python scripts/tiny/make_klein.py --start scripts/tiny/klein --vae-steps 20000 --text-steps 1500 \\
        --base FOLDER --out FOLDER --compile --seconds 470

The text encoder is taught by make_text's labels, backgrounds among them, under noise on its weights, and then kept; of
its texts a quarter each are of weights rounded to NF4 and to FP4. The base learns flow matching with one caption in ten
left empty, so that it is drawn with two calls a step. The distilled one learns where the base's guided path of so many
small steps stands after each of 4 large ones (progressive distillation, Salimans & Ho 2022). At the end both draw
held-out captions; the right ones are counted, and some are laid out on a sheet.
"""

import argparse
import copy
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from torch import Tensor
from transformers import Qwen2Tokenizer, Qwen3ForCausalLM

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import check, count, klein_parts, make_flow, make_vae, parts, rounded, world
from scripts.tiny.klein_flow import FEW, FINE, GUIDANCE, Batch, Flow, along, noised, paths, train
from scripts.tiny.klein_text import chat, draw_captions, embed, stored, teach_text
from scripts.tiny.make_flow import Drawn
from scripts.tiny.pace import Clock, turn

STORED = ("bf16", "nf4", "bf16", "fp4")  # precisions of the text encoder, in turn
# of --seconds, after which share each stage ends
SHARES = {"vae": 0.28, "text": 0.35, "encode": 0.42, "flow": 0.74, "paths": 0.83, "few": 0.92}
STEPS, DRAWN_AT = 28, 4.0  # steps and guidance of the base's pictures that are counted


@dataclass
class Encoded:
    """The pictures of one size in memory."""

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


def parts_of(start: Path | None, reader: Qwen2Tokenizer) -> tuple[Qwen3ForCausalLM, Flux2Transformer2DModel]:
    """The text encoder and transformer of a checkpoint, or new ones; words that it has not met begin untrained."""
    encoder = klein_parts.text_encoder(reader)
    if start is None:
        return encoder, klein_parts.transformer()
    old = Qwen3ForCausalLM.from_pretrained(start / "text_encoder", dtype=torch.float32)
    known = Qwen2Tokenizer.from_pretrained(start / "tokenizer").get_vocab()
    transformer = parts.loaded(Flux2Transformer2DModel, start / "transformer")
    return parts.regrown(encoder, old, reader.get_vocab(), known), transformer


def encode(
    vae: AutoencoderKLFlux2,
    encoder: Qwen3ForCausalLM,
    drawn: Iterable[Drawn],
    sides: Sequence[int] = (world.SIZE,),
    seconds: float = float("inf"),
) -> list[Encoded]:
    """Paint and encode what `draw_captions` made, each chunk at the size whose turn it is: for each size, its pictures.
    Texts are by the encoder as it is drawn with, a part of them rounded.

    seconds: so many chunks as they suffice for, but one of each size.
    """
    device, began = vae.device, time.monotonic()
    encoders = [stored(encoder, kind) for kind in STORED]
    small = copy.deepcopy(vae).to(torch.bfloat16).eval()
    kept: list[list[Tensor]] = [[] for _ in sides]
    texts: list[list[Tensor]] = [[] for _ in sides]
    with torch.no_grad():
        for k, each in enumerate(drawn):
            way = turn(k, len(sides)) if k >= len(sides) else k
            image = each.paint(sides[way], device).bfloat16()
            latents = torch.cat([small.encode(part).latent_dist.mode().float() for part in image.split(256)])
            kept[way].append(pack(vae, latents).bfloat16())
            ids, mask = (torch.from_numpy(array).flatten(0, 1).to(device) for array in each.arrays[:2])
            texts[way].append(embed(encoders[len(texts[way]) % len(encoders)], ids, mask).bfloat16())
            if time.monotonic() - began > seconds and all(kept):
                break
            if k % 8 == 7 and device.type == "cuda":
                torch.cuda.synchronize()  # the clock is the device's
    return [Encoded(torch.cat(x0), torch.cat(text)) for x0, text in zip(kept, texts, strict=True)]


def pictures(
    flow: Flow,
    vae: AutoencoderKLFlux2,
    encoder: Qwen3ForCausalLM,
    reader: Qwen2Tokenizer,
    captions: list[str],
    side: int,
    kind: str,
    few: bool,
    steps: int | None = None,
) -> np.ndarray:
    """Captions drawn at a precision, by the base with guidance or in few steps: [captions, side, side, 3] of bytes."""
    device = vae.device
    drawing = Flow(rounded.stored(flow.transformer, kind), [side]).to(device).eval()
    writer = stored(encoder, kind).eval()
    steps = steps or (FEW if few else STEPS)
    with torch.no_grad():
        texts, empty = (
            embed(writer, *(torch.from_numpy(value).to(device) for value in chat(reader, words)))
            for words in (captions, [""])
        )

        def velocity(x: Tensor, sigma: Tensor, chosen: slice) -> Tensor:
            with_text: Tensor = drawing(x, texts[chosen], sigma)
            if few:
                return with_text
            without: Tensor = drawing(x, empty.expand(len(x), -1, -1), sigma)
            return without + DRAWN_AT * (with_text - without)

        mu = compute_empirical_mu((side // 16) ** 2, steps)
        latents = count.path(
            velocity, klein_parts.scheduler(), mu, steps, len(captions), side, vae.config.latent_channels, device
        )
        return count.decoded(copy.deepcopy(vae).to(torch.bfloat16).eval(), latents, side)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--vae", type=Path, help="the FLUX.1 whose autoencoder is widened")
    start.add_argument("--start", type=Path, help="go on from this base")
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the distilled one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=160_000)
    parser.add_argument("--pairs", type=float, default=0.75, help="share of pictures with two different things")
    parser.add_argument("--hard", type=float, default=0.0, help="share of the single things that are of a hard shape")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[world.SIZE], help="pixels; three steps of four are for the first"
    )
    parser.add_argument("--vae-steps", type=int, help="8000, and none with --start: its autoencoder is kept")
    parser.add_argument("--vae-rate", type=float, default=1e-3)
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
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of everything, shared out to the stages")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rounded", type=float, default=make_flow.ROUNDED, help="share of the steps in NF4")
    parser.add_argument("--count", type=int, default=400, help="held-out captions that are drawn at the end")
    parser.add_argument("--figures", type=Path, help="where the sheets and what was counted go, else beside --out")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    clock, sides, workers = Clock(args.seconds, SHARES), args.sides, len(os.sched_getaffinity(0))
    if args.text_steps is None:
        args.text_steps = 0 if args.start else 1500
    if args.vae_steps is None:
        args.vae_steps = 0 if args.start else 8000
    vae_batch, text_batch, chunk = 24, 512, make_flow.CHUNK
    if args.smoke:
        args.samples, args.vae_steps, args.text_steps, args.flow_steps, args.few_steps = (
            32,
            min(args.vae_steps, 3),
            3,
            5,
            5,
        )
        args.batch, vae_batch, text_batch, args.paths, chunk, args.count = 4, 2, 32, 8, 4, 4
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    pool = make_flow.workers(workers)
    mix = make_flow.Mix(args.pairs, args.hard)
    spans = make_flow.spans(args.samples, args.seed, mix, chunk)
    drawing = pool.imap(draw_captions, spans)  # goes on while the autoencoder learns
    clock.report("start", f"{workers} processes draw {args.samples} scenes and captions")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    reader = klein_parts.tokenizer()
    if args.start:
        vae = parts.loaded(AutoencoderKLFlux2, args.start / "vae").to(device)
    else:
        vae = klein_parts.vae(parts.loaded(AutoencoderKL, args.vae / "vae")).to(device)
    decibels: dict[str, float] = {}
    if args.vae_steps:
        vae.bn.requires_grad_(False)
        seconds = min(args.vae_seconds, clock.left("vae"))
        decibels = make_vae.train(
            vae, args.vae_steps, vae_batch, args.vae_rate, args.seed, device, seconds, not args.eager, sides
        )
        clock.report("vae", f"autoencoder, PSNR on unseen pictures: {decibels}")
        copy.deepcopy(vae).to(torch.bfloat16).save_pretrained(args.base / "vae")
    encoder, transformer = parts_of(args.start, reader)
    encoder.to(device)
    drawn = list(drawing)
    if args.text_steps:
        ids, mask, wanted, grounds = (
            torch.from_numpy(np.concatenate([each.arrays[i] for each in drawn])).flatten(0, 1).to(device)
            for i in range(4)
        )
        seconds = min(args.text_seconds, clock.left("text"))
        teach_text(encoder, reader, ids, mask, wanted, grounds, args.text_steps, text_batch, seconds, not args.eager)
        clock.report("text", "text encoder taught")
    encoder.eval().requires_grad_(False)
    data = encode(vae, encoder, drawn, sides, clock.left("encode", least=0.05))
    empty_ids, empty_mask = (torch.from_numpy(value).to(device) for value in chat(reader, [""]))
    with torch.no_grad():
        empty = embed(stored(encoder, "bf16"), empty_ids, empty_mask)
    clock.report(
        "encode",
        f"{[len(each.x0) for each in data]} samples of {sides} pixels encoded, latents' deviation "
        f"{data[0].x0.float().std():.3f}, texts' {data[0].texts[:999].float().std():.3f}",
    )

    def write(folder: Path, few: bool) -> Callable[[Flow], None]:
        return lambda flow: save(folder, flow, vae, encoder, reader, few)

    torch.manual_seed(args.seed + 1)
    flow = Flow(transformer, sides).to(device)
    if args.compile:
        flow.compile_blocks()
    left = clock.left("flow", args.flow_until)
    plain = [noised(each.x0, each.texts, empty, args.batch) for each in data]
    keep = write(args.base, False)
    base = train("flow", flow, plain, args.flow_steps, args.rate, args.decay, left, not args.eager, keep, args.rounded)
    keep(base)
    clock.report("flow", "base trained")
    if args.compile:
        base.compile_blocks()
    half = args.batch // 2  # with and without the text make a batch
    few: list[Callable[[], Batch]] = []
    seconds = clock.left("paths")
    for way, each in enumerate(data):
        share = 1.0 if len(data) == 1 else 0.75 if way == 0 else 0.25 / (len(data) - 1)
        wanted_paths = max(half, int(args.paths * share) // half * half)
        chosen = torch.randperm(len(each.texts), device=device)[:wanted_paths]
        shape = (each.x0.shape[1], each.x0.shape[2])
        stands = paths(base, each.texts[chosen], empty, half, shape, seconds * share)
        few.append(along(stands, each.texts, chosen, args.batch))
        print(f"{len(stands)} paths of {sum(FINE)} steps at guidance {GUIDANCE}, {sides[way]} pixels", flush=True)
    clock.report("paths", "paths drawn")
    student = copy.deepcopy(base).requires_grad_(True).train()
    if args.compile:
        student.compile_blocks()
    keep, left = write(args.out, True), clock.left("few", args.few_until)
    student = train("few", student, few, args.few_steps, 5e-4, 0.8, left, not args.eager, keep, args.rounded)
    keep(student)
    clock.report("few", "distilled")
    figures, right = args.figures or args.out.with_name(f"{args.out.name}-figures"), dict[str, Any]()
    for kind, side in [("bf16", sides[0]), ("nf4", sides[0]), *(("bf16", side) for side in sides[1:])]:
        captions = check.held_out_captions(args.count)
        for name, model in (("base", base), ("distilled", student)) if captions else ():
            seen = pictures(
                model, vae, encoder, reader, captions, side, kind, model is student, 2 if args.smoke else None
            )
            if kind == "bf16" and side == sides[0]:
                count.lay_out(seen, figures / f"sheet-{name}.png")
            which = f"{name}, {kind} at {side}"
            right[which] = count.counted(captions, seen, pool)
            clock.report(
                which, f"right of the held-out captions, {which}: {right[which]['all']} {right[which]['shares']}"
            )
            count.tell(figures / "figures.json", clock, decibels=decibels, right=right)
    pool.terminate()


if __name__ == "__main__":
    main()
