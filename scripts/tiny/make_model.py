"""Make the bundled model from nothing but a seed: autoencoder, text encoders, transformer, guidance.

    python scripts/tiny/make_model.py --out scripts/tiny/model      # one H100 or H200
    python scripts/tiny/make_model.py --start scripts/tiny/model --vae-steps 20000 --out FOLDER --compile --seconds 470
    python scripts/tiny/check.py --count 200                        # its figure

Every stage is a fixed number of steps, or fewer where `--seconds` run out; `--smoke` runs all of them in a minute on a
CPU (a useless model). At the end it draws held-out captions, counts the right ones and lays some out on a sheet.
"""

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import check, count, make_flow, make_text, make_vae, parts, rounded, world
from scripts.tiny.pace import Clock

# of --seconds, after which share each stage ends
SHARES = {"vae": 0.32, "encode": 0.38, "flow": 0.81, "guidance": 0.92}
STEPS, GUIDANCE = 20, 3.5  # of the pictures that are counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=240_000)
    parser.add_argument("--pairs", type=float, default=4 / 11, help="share of pictures with two different things")
    parser.add_argument("--hard", type=float, default=0.0, help="share of the single things that are of a hard shape")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[world.SIZE], help="pixels; three steps of four are for the first"
    )
    parser.add_argument("--start", type=Path, help="go on from this model")
    parser.add_argument("--vae", type=Path, help="keep the autoencoder of this model")
    parser.add_argument("--vae-steps", type=int, help="20000, and none with --start or --vae: its autoencoder is kept")
    parser.add_argument("--vae-seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--vae-rate", type=float, default=1e-3)
    parser.add_argument("--flow-steps", type=int, default=40_000)
    parser.add_argument(
        "--flow-until",
        type=float,
        default=float("inf"),
        help="take fewer steps than would last beyond so many seconds after the start of all",
    )
    parser.add_argument("--guidance-steps", type=int, default=2000)
    parser.add_argument("--guidance-seconds", type=float, default=float("inf"))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of everything, shared out to the stages")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of flow matching")
    parser.add_argument("--decay", type=float, default=0.3, help="over which last share of the steps the rate falls")
    parser.add_argument("--rounded", type=float, default=make_flow.ROUNDED, help="share of the steps in NF4")
    parser.add_argument("--count", type=int, default=400, help="held-out captions that are drawn at the end")
    parser.add_argument("--figures", type=Path, help="where the sheet and what was counted go, else beside --out")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    clock = Clock(args.seconds, SHARES)
    vae_batch, workers, sides = 24, len(os.sched_getaffinity(0)), args.sides
    kept = args.start or args.vae
    if args.vae_steps is None:
        args.vae_steps = 0 if kept else 20_000
    if args.smoke:
        args.samples, args.vae_steps, args.flow_steps, args.guidance_steps = 64, min(args.vae_steps, 3), 5, 5
        args.batch, vae_batch, args.count = 4, 2, 4
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    pool = make_flow.workers(workers)
    mix = make_flow.Mix(args.pairs, args.hard)
    spans = make_flow.spans(args.samples, args.seed, mix, 16 if args.smoke else make_flow.CHUNK)
    drawn = pool.imap(make_flow.draw, spans)  # goes on while the autoencoder learns
    clock.report("start", f"{workers} processes draw {args.samples} scenes and captions")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    tokenizers = parts.tokenizers()
    if kept:
        vae = parts.loaded(AutoencoderKL, (args.vae or args.start) / "vae").to(device)
    else:
        vae = parts.vae()
        # latents start sharp: at the default a deviation of 1 drowns them for hundreds of steps
        torch.nn.init.constant_(vae.encoder.conv_out.bias[vae.config.latent_channels :], -6.0)
    decibels: dict[str, float] = {}
    if args.vae_steps:
        seconds = min(args.vae_seconds, clock.left("vae"))
        decibels = make_vae.train(
            vae, args.vae_steps, vae_batch, args.vae_rate, args.seed, device, seconds, not args.eager, sides
        )
        clock.report("vae", f"autoencoder, PSNR on unseen pictures: {decibels}")
        copy.deepcopy(vae).to(torch.bfloat16).save_pretrained(args.out / "vae")
        if decibels["plain"] < 30 and not args.smoke:
            raise SystemExit("the autoencoder is below 30 dB on the small world: nothing good can be built on it")
    data = make_flow.encode(vae, drawn, device, sides, clock.left("encode", least=0.04))
    clock.report(
        "encode",
        f"{[len(each.mean) for each in data]} samples of {sides} pixels encoded, latents' standard deviation "
        f"{data[0].mean.float().std():.3f}, noise {data[0].deviation.float().mean():.3f}",
    )
    empty = empty_ids(tokenizers, device)
    flow = started(args.start, tokenizers, sides).to(device)
    lesson = make_text.Lesson(flow.t5, flow.clip, tokenizers[0]).to(device)
    if args.compile:
        make_flow.compile_blocks(flow.transformer)
    teacher = make_flow.train(
        flow,
        data,
        empty,
        args.flow_steps,
        args.batch,
        args.rate,
        args.seed + 1,
        lesson=lesson,
        decay=args.decay,
        seconds=clock.left("flow", args.flow_until),
        graphed=not args.eager,
        kept=lambda average: save(average, vae, tokenizers, args.out),
        rough=args.rounded,
    )
    clock.report("flow", "flow matching done")
    save(teacher, vae, tokenizers, args.out)
    final = teacher
    if args.guidance_steps:
        student = copy.deepcopy(teacher).requires_grad_(True)
        if args.compile:
            make_flow.compile_blocks(teacher.transformer)
            make_flow.compile_blocks(student.transformer)
        final = make_flow.train(
            student, data, empty, args.guidance_steps, args.batch, 2e-4, args.seed + 2, teacher,
            seconds=min(args.guidance_seconds, clock.left("guidance")),
            graphed=not args.eager,
            rough=args.rounded,
        )  # fmt: skip
        clock.report("guidance", "guidance distilled")
        save(final, vae, tokenizers, args.out)
    figures = args.figures or args.out.with_name(f"{args.out.name}-figures")
    captions = check.held_out_captions(args.count)
    right: dict[str, Any] = {}
    for kind, side in [("bf16", sides[0]), ("nf4", sides[0]), *(("bf16", side) for side in sides[1:])]:
        if not captions:
            break
        drawn_pictures = pictures(final, vae, tokenizers, captions, side, kind, 2 if args.smoke else STEPS)
        if not right:
            count.lay_out(drawn_pictures, figures / "sheet.png")
        name = f"{kind} at {side}"
        right[name] = count.counted(captions, drawn_pictures, pool)
        clock.report(name, f"right of the held-out captions, {name}: {right[name]['all']} {right[name]['shares']}")
        count.tell(figures / "figures.json", clock, decibels=decibels, right=right)
    pool.terminate()


def empty_ids(tokenizers: tuple[T5TokenizerFast, CLIPTokenizer], device: torch.device) -> tuple[Tensor, Tensor]:
    """The empty caption's ids for both encoders, [1, tokens] each."""
    t5, clip = (
        torch.tensor([tokenizer("", padding="max_length", max_length=parts.TEXT_TOKENS).input_ids], device=device)
        for tokenizer in tokenizers
    )
    return t5, clip


def started(start: Path | None, tokenizers: tuple[T5TokenizerFast, CLIPTokenizer], sides: list[int]) -> make_flow.Flow:
    """The transformer and text encoders, new or those of a model; words that it has not met begin untrained."""
    t5, clip = parts.t5(tokenizers[0]), parts.clip(tokenizers[1])
    if start is None:
        return make_flow.Flow(parts.transformer(), t5, clip, sides)
    return make_flow.Flow(
        parts.loaded(FluxTransformer2DModel, start / "transformer"),
        parts.regrown(
            t5,
            T5EncoderModel.from_pretrained(start / "text_encoder_2"),
            tokenizers[0].get_vocab(),
            T5TokenizerFast.from_pretrained(start / "tokenizer_2").get_vocab(),
        ),
        parts.regrown(
            clip,
            CLIPTextModel.from_pretrained(start / "text_encoder"),
            tokenizers[1].get_vocab(),
            CLIPTokenizer.from_pretrained(start / "tokenizer").get_vocab(),
        ),
        sides,
    )


def pictures(
    flow: make_flow.Flow,
    vae: AutoencoderKL,
    tokenizers: tuple[T5TokenizerFast, CLIPTokenizer],
    captions: list[str],
    side: int,
    kind: str,
    steps: int = STEPS,
) -> np.ndarray:
    """Captions drawn at a precision: [captions, side, side, 3] of bytes."""
    device = next(flow.parameters()).device
    drawing = make_flow.Flow(
        rounded.stored(flow.transformer, kind),
        rounded.stored(flow.t5, kind, but=("wo",)),  # which transformers keeps
        rounded.stored(flow.clip, "bf16"),
        [side],
    )
    drawing.to(device, torch.bfloat16).eval()
    t5_ids, clip_ids = (
        torch.tensor(each(captions, padding="max_length", max_length=parts.TEXT_TOKENS, truncation=True).input_ids)
        for each in tokenizers
    )
    scheduler = parts.scheduler()
    mu = calculate_shift(
        (side // 16) ** 2,
        *(scheduler.config[k] for k in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")),
    )
    with torch.no_grad():
        states, pooled = drawing.encode(t5_ids.to(device), clip_ids.to(device))

        def velocity(x: Tensor, sigma: Tensor, chosen: slice) -> Tensor:
            guidance = torch.full((len(x),), GUIDANCE, device=device)
            return drawing.velocity(x, (states[chosen], pooled[chosen]), sigma, guidance)

        latents = count.path(velocity, scheduler, mu, steps, len(captions), side, vae.config.latent_channels, device)
        return count.decoded(copy.deepcopy(vae).to(torch.bfloat16).eval(), latents, side)


def save(
    flow: make_flow.Flow, vae: AutoencoderKL, tokenizers: tuple[T5TokenizerFast, CLIPTokenizer], folder: Path
) -> None:
    """Write a checkpoint in bf16; what is being trained stays as it is."""
    FluxPipeline(
        scheduler=parts.scheduler(),
        vae=copy.deepcopy(vae).to(torch.bfloat16),
        text_encoder=copy.deepcopy(flow.clip).to(torch.bfloat16),
        tokenizer=tokenizers[1],
        text_encoder_2=copy.deepcopy(flow.t5).to(torch.bfloat16),
        tokenizer_2=tokenizers[0],
        transformer=copy.deepcopy(flow.transformer).to(torch.bfloat16),
    ).save_pretrained(folder, max_shard_size="10MB")


if __name__ == "__main__":
    main()
