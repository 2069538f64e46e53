"""What FLUX.1-dev LoRA training costs on many GPUs, with a million pictures, and in sweeps: computed and simulated.

    python scripts/scale.py                                    # the tables of docs/scale.md
    python scripts/scale.py --samples 1000000                  # simulate the start with so many pictures

Seconds of a step are those of docs/benchmarks/train.jsonl (one GPU); links are what their makers name, at 70 % of it.
What a start takes is measured: the toolkit's own sampler, index and shelf on synthetic samples, as many as asked, and
scaled to a million. The last line is one JSON object.
"""

import argparse
import gc
import hashlib
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch

from train.data.batches import BatchSampler, Form, epoch_batches
from train.data.source import Sample
from train.latents.identities import Picture, known_identities, write_identities
from train.latents.shards import ShardIndex, read_item, verify, write_shard

MILLION = 1_000_000
ADAPTER = 16 * 2 * 3072 * (19 * 8 + 38 * 3) * 4  # bytes of rank 16 on attention, fp32
PACKED = 11_901_408_320 // 2  # bytes of 4-bit weights, which FSDP gathers
LINKS = {"NVLink": 450e9, "400 Gb/s": 50e9, "100 Gb/s": 12.5e9, "10 Gb/s": 1.25e9}  # bytes a second, one way
REACHED, LATENCY = 0.7, 20e-6
PIXELS = (1024, 512)


def latent_bytes(side: int) -> int:
    """Mean and deviation of a picture's posterior, 16 channels, bf16."""
    return 2 * 16 * (side // 8) ** 2 * 2


def text_bytes(tokens: int) -> int:
    """T5's states of width 4096, and CLIP's 768, bf16."""
    return (tokens * 4096 + 768) * 2


def step_seconds(file: Path = ROOT / "docs/benchmarks/train.jsonl") -> tuple[dict[int, float], str]:
    """Of NF4, memory=balanced, batch 1, and the card that they were measured on."""
    found, card = {}, ""
    for line in file.read_text().splitlines():
        row = json.loads(line)
        for side in PIXELS:
            if row["name"] == f"train nf4-{side}-balanced":
                found[side], card = row["measured"], row["card"]
    return found, card


def sum_seconds(size: int, ranks: int, link: float) -> float:
    """A ring all-reduce: each rank sends and receives 2 (n - 1) / n of the tensor, in 2 (n - 1) turns."""
    return 2 * (ranks - 1) / ranks * size / (link * REACHED) + 2 * (ranks - 1) * LATENCY


def gather_seconds(size: int, ranks: int, link: float) -> float:
    """All-gathers of a model's blocks, once."""
    return (ranks - 1) / ranks * size / (link * REACHED) + 58 * (ranks - 1) * LATENCY


def steps() -> list[dict[str, Any]]:
    """A step of batch 1 a GPU, an update each step: nothing hides the sum."""
    own, card = step_seconds()
    print(f"\na step on {card}s, NF4, batch 1 a GPU, rank 16 on attention ({ADAPTER / 1e6:.0f} MB of gradients)\n")
    print("| pictures | GPUs | link | gradients ms | of the step | pictures/s | reads MB/s | FSDP 2 gathers ms |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for side in PIXELS:
        reads = latent_bytes(side) + text_bytes(512)
        for ranks, link in ((1, "NVLink"), (8, "NVLink"), (64, "400 Gb/s"), (64, "100 Gb/s"), (256, "400 Gb/s"),
                            (16, "10 Gb/s")):  # fmt: skip
            exchange = sum_seconds(ADAPTER, ranks, LINKS[link])
            gathers = 2 * gather_seconds(PACKED, ranks, LINKS[link])  # forward, and again with the backward pass
            whole = own[side] + exchange
            rate = ranks / whole
            rows.append({"side": side, "gpus": ranks, "link": link, "exchange_s": exchange, "pictures_per_s": rate})
            print(
                f"| {side} | {ranks} | {link if ranks > 1 else ''} | {1e3 * exchange:.1f} | {exchange / whole:.1%} | "
                f"{rate:.1f} | {rate * reads / 1e6:.0f} | {1e3 * gathers:.0f} |"
            )
    return rows


def storage() -> None:
    print("\nthe cache of a million pictures with a caption each\n")
    print("| pictures | text tokens | latents TB | texts TB | 64 MiB shards |")
    print("|---|---|---|---|---|")
    for side, tokens in ((1024, 512), (1024, 256), (512, 512), (512, 77)):
        latents, texts = MILLION * latent_bytes(side), MILLION * text_bytes(tokens)
        print(f"| {side} | {tokens} | {latents / 1e12:.2f} | {texts / 1e12:.2f} | {(latents + texts) / 2**26:,.0f} |")


def measured(work: Callable[[], Any]) -> tuple[Any, float, int]:
    """What the work gives, its processor seconds (others may use the machine), and the bytes that Python keeps."""
    begun = time.process_time()
    work()
    seconds = time.process_time() - begun
    gc.collect()
    tracemalloc.start()
    result = work()
    gc.collect()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return result, seconds, kept


def start(samples: int) -> list[dict[str, Any]]:
    """Every part of a start, on so many synthetic samples."""
    rng = np.random.default_rng(0)
    forms: list[list[Form]] = [[((512 + 64 * (i % 9), 512),)] for i in range(samples)]
    rows: list[dict[str, Any]] = []

    def note(what: str, work: Callable[[], Any], count: int = samples) -> Any:
        result, seconds, kept = measured(work)
        rows.append({"what": what, "us": 1e6 * seconds / count, "bytes": kept / count if count >= 1000 else None})
        return result

    def made() -> list[Sample]:
        return [Sample(f"s/{i:07d}.png", (f"a caption of some length, number {i}",), 0, bytes) for i in range(samples)]

    def indexed(folder: Path) -> ShardIndex:
        index = ShardIndex(folder, print)
        assert not index.refresh() and len(index.table.hashes) == shards * each
        return index

    keep: list[Any] = [note("samples with captions", made)]
    sampler = BatchSampler(0, 8, list(range(samples)), forms, [1.0] * samples)
    keep.append(note("an epoch's batches", lambda: epoch_batches(sampler, 0)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = rng.bytes(64 * samples)
        known = {
            raw[64 * i : 64 * i + 32]: Picture(raw[64 * i + 32 : 64 * i + 64].hex(), 512, 512) for i in range(samples)
        }
        write_identities(folder / "index", known)
        del known
        keep.append(note("what bytes gave which pixels", lambda: known_identities(folder / "index", print)))
        shards, each = max(1, samples // 500), 60
        for shard in range(shards):
            items = {
                f"{shard:032x}{i:032x}": {"mean": torch.zeros(1), "deviation": torch.zeros(1)} for i in range(each)
            }
            write_shard(folder / "pictures", items)
        keep.append(note("where each encoding is", lambda: indexed(folder / "pictures"), shards * each))
        half = latent_bytes(1024) // 4  # numbers of the mean, and of the deviation
        big = {
            f"{i}": {part: torch.zeros(half, dtype=torch.bfloat16) for part in ("mean", "deviation")} for i in range(60)
        }
        file = write_shard(folder, big)
        note("checksums of a picture's latents (1024)", lambda: verify(file, set(big)), 60)
        note(
            "a picture's latents read in a step", lambda: [read_item(file, key, "mean", "deviation") for key in big], 60
        )
    content = rng.bytes(1_500_000)
    note("the hash of a file of 1.5 MB", lambda: [hashlib.sha256(content).digest() for _ in range(40)], 40)
    print(f"\na start, measured on {samples:,} synthetic samples, one thread\n")
    print("| what | microseconds each | bytes each | a million: s | a million: GB |")
    print("|---|---|---|---|---|")
    for row in rows:
        us, size = row["us"], row["bytes"]
        bytes_each, gigabytes = ("", "") if size is None else (f"{size:.0f}", f"{size * MILLION / 1e9:.2f}")
        print(f"| {row['what']} | {us:.1f} | {bytes_each} | {us:.0f} | {gigabytes} |")
    return rows


def sweeps() -> None:
    own, card = step_seconds()
    print(f"\na sweep of runs of 1,000 steps and 12 pictures of 50 steps, one GPU a run, {card}\n")
    print("| pictures | minutes a run | points a night (10 h) on 1 | on 8 | on 64 GPUs |")
    print("|---|---|---|---|---|")
    drawing = 12 * 6.67  # docs/benchmarks/infer.jsonl, NF4, 1024
    for side in PIXELS:
        # reading weights, quantizing, compiling: 60 s taken
        minutes = (60 + 1000 * own[side] + drawing * (side / 1024) ** 2) / 60
        night = 600 / minutes
        print(f"| {side} | {minutes:.1f} | {night:.0f} | {8 * night:.0f} | {64 * night:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000, help="synthetic samples of the start's simulation")
    options = parser.parse_args()
    if options.samples < 1000:
        parser.error(f"--samples is {options.samples}; it must be 1000 or more, or the machine's noise is measured")
    table = steps()
    storage()
    rows = start(options.samples)
    sweeps()
    print(json.dumps({"samples": options.samples, "steps": table, "start": rows}))


if __name__ == "__main__":
    main()
