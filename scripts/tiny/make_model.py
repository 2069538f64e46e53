"""Make the bundled model from nothing but a seed: autoencoder, text encoders, transformer, guidance.

    python scripts/tiny/make_model.py --out scripts/tiny/model      # one H100 or H200
    python scripts/tiny/check.py --count 200                        # its figure

Every stage is a fixed number of steps; `--smoke` runs all of them in a minute on a CPU (a useless model).
"""

import argparse
import copy
import os
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import make_flow, make_text, make_vae, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=240_000)
    parser.add_argument("--pairs", type=float, default=4 / 11, help="share of pictures with two different things")
    parser.add_argument(
        "--start", type=Path, help="go on from this model: its autoencoder is kept, the rest trained on"
    )
    parser.add_argument("--vae", type=Path, help="keep the autoencoder of this model")
    parser.add_argument("--vae-steps", type=int, default=20_000)
    parser.add_argument("--vae-seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--flow-steps", type=int, default=40_000)
    parser.add_argument(
        "--flow-until",
        type=float,
        default=float("inf"),
        help="take fewer steps than would last beyond so many seconds after the start of all",
    )
    parser.add_argument("--guidance-steps", type=int, default=2000)
    parser.add_argument("--guidance-seconds", type=float, default=float("inf"))
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of flow matching")
    parser.add_argument("--decay", type=float, default=0.3, help="over which last share of the steps the rate falls")
    parser.add_argument("--compile", action="store_true", help="compile the transformer's blocks")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    vae_batch, workers = 24, len(os.sched_getaffinity(0))
    if args.smoke:
        args.samples, args.vae_steps, args.flow_steps, args.guidance_steps = 64, 3, 3, 3
        args.batch, vae_batch = 4, 4
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    start = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {text}", flush=True)

    drawn = make_flow.draw(args.samples, args.seed, workers, args.pairs, args.start)
    report(f"{args.samples} scenes and captions drawn")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    tokenizers = parts.tokenizers(args.start)
    kept = args.start or args.vae
    if kept:
        vae = parts.loaded(AutoencoderKL, kept / "vae").to(device)
    else:
        vae = parts.vae()
        # latents start sharp: at the default a deviation of 1 drowns them for hundreds of steps
        torch.nn.init.constant_(vae.encoder.conv_out.bias[vae.config.latent_channels :], -6.0)
        decibels = make_vae.train(
            vae, args.vae_steps, vae_batch, 1e-3, args.seed, device, args.vae_seconds, not args.eager
        )
        report(f"autoencoder, PSNR on unseen pictures: {decibels}")
        copy.deepcopy(vae).to(torch.bfloat16).save_pretrained(args.out / "vae")
        if decibels["plain"] < 30 and not args.smoke:
            raise SystemExit("the autoencoder is below 30 dB on the small world: nothing good can be built on it")
    data = make_flow.encode(vae, drawn, device)
    report(
        f"{args.samples} samples encoded, latents' standard deviation {data.mean.float().std():.3f}, "
        f"noise {data.deviation.float().mean():.3f}"
    )
    t5_empty, clip_empty = (
        torch.tensor([tokenizer("", padding="max_length", max_length=parts.TEXT_TOKENS).input_ids], device=device)
        for tokenizer in tokenizers
    )
    empty = (t5_empty, clip_empty)
    if args.start:
        flow = make_flow.Flow(
            parts.loaded(FluxTransformer2DModel, args.start / "transformer"),
            T5EncoderModel.from_pretrained(args.start / "text_encoder_2").float(),
            CLIPTextModel.from_pretrained(args.start / "text_encoder").float(),
        )
    else:
        flow = make_flow.Flow(parts.transformer(), parts.t5(tokenizers[0]), parts.clip(tokenizers[1]))
    flow.to(device)
    lesson = make_text.Lesson(flow.t5, flow.clip, tokenizers[0]).to(device)
    if args.compile:
        make_flow.compile_blocks(flow)
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
        seconds=args.flow_until - (time.monotonic() - start),
        graphed=not args.eager,
        kept=lambda average: save(average, vae, tokenizers, args.out),
    )
    report("flow matching done")
    save(teacher, vae, tokenizers, args.out)
    if args.guidance_steps:
        student = copy.deepcopy(teacher).requires_grad_(True)
        if args.compile:
            make_flow.compile_blocks(teacher)
            make_flow.compile_blocks(student)
        student = make_flow.train(
            student, data, empty, args.guidance_steps, args.batch, 2e-4, args.seed + 2, teacher,
            seconds=args.guidance_seconds,
            graphed=not args.eager,
        )  # fmt: skip
        report("guidance distilled")
        save(student, vae, tokenizers, args.out)


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
