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
from transformers import CLIPTextModel, T5EncoderModel

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import make_flow, make_vae, parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=240_000)
    parser.add_argument("--pairs", type=float, default=4 / 11, help="share of pictures with two different things")
    parser.add_argument(
        "--start", type=Path, help="go on from this model: its autoencoder is kept, the rest trained on"
    )
    parser.add_argument("--vae-steps", type=int, default=7000)
    parser.add_argument("--flow-steps", type=int, default=40_000)
    parser.add_argument("--flow-seconds", type=float, default=float("inf"), help="take fewer steps if these run out")
    parser.add_argument("--guidance-steps", type=int, default=2000)
    parser.add_argument("--guidance-seconds", type=float, default=float("inf"))
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of flow matching")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything")
    args = parser.parse_args()
    vae_batch, workers = 40, os.cpu_count() or 1
    if args.smoke:
        args.samples, args.vae_steps, args.flow_steps, args.guidance_steps = 256, 3, 3, 3
        args.batch, vae_batch = 16, 4
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    start = time.monotonic()

    def report(text: str) -> None:
        print(f"[{time.monotonic() - start:.0f} s] {text}", flush=True)

    drawn = make_flow.draw(args.samples, args.seed, workers, args.pairs, args.start)
    report(f"{args.samples} scenes and captions drawn")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    graphed = device.type == "cuda" and not args.eager
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # its backward reads beyond its bounds under autocast (torch 2.11)
    tokenizers = parts.tokenizers(args.start)
    if args.start:
        vae = AutoencoderKL.from_pretrained(args.start / "vae").to(device)
    else:
        vae = parts.vae()
        decibels = make_vae.train(vae, args.vae_steps, vae_batch, args.seed, device)
        report(f"autoencoder, PSNR on unseen pictures: { {name: round(value, 1) for name, value in decibels.items()} }")
        vae.save_pretrained(args.out / "vae")
        if decibels["world"] < 30 and not args.smoke:
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
            FluxTransformer2DModel.from_pretrained(args.start / "transformer").float(),
            T5EncoderModel.from_pretrained(args.start / "text_encoder_2").float(),
            CLIPTextModel.from_pretrained(args.start / "text_encoder").float(),
        )
    else:
        flow = make_flow.Flow(parts.transformer(), parts.t5(tokenizers[0]), parts.clip(tokenizers[1]))
    flow.to(device)
    teacher = make_flow.train(
        flow, data, empty, args.flow_steps, args.batch, args.rate, args.seed + 1, graphed, seconds=args.flow_seconds
    )
    report("flow matching done")
    student = make_flow.train(
        copy.deepcopy(teacher).requires_grad_(True),
        data,
        empty,
        args.guidance_steps,
        args.batch,
        2e-4,
        args.seed + 2,
        graphed,
        teacher,
        args.guidance_seconds,
    )
    report("guidance distilled")
    FluxPipeline(
        scheduler=parts.scheduler(),
        vae=vae.to(torch.bfloat16),
        text_encoder=student.clip.to(torch.bfloat16),
        tokenizer=tokenizers[1],
        text_encoder_2=student.t5.to(torch.bfloat16),
        tokenizer_2=tokenizers[0],
        transformer=student.transformer.to(torch.bfloat16),
    ).save_pretrained(args.out, max_shard_size="10MB")
    report(f"saved to {args.out}")


if __name__ == "__main__":
    main()
