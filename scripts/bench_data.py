"""How fast and in how much memory the data gets ready: cold, warm, and a hundred thousand samples.

    python scripts/bench_data.py                                                # two cores, the bundled model
    python scripts/bench_data.py --device cuda --model dev --weights random     # a GPU, FLUX.1-dev at full size
    python scripts/bench_data.py --only cold --device cuda --model dev --weights random --side 4096 --pictures 100

Paints pictures, half JPEG and half PNG, builds the cache from nothing and again from what is there, and indexes a
folder of very small pictures. Each part runs in a process of its own, so that its peak memory is its own; seconds count
from after the libraries' import. Prints a table for people, and then a line of JSON for each row of it.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.atomic import replace_file
from scripts.bench_rows import table, versions
from scripts.painted import CAPTIONS, paint_folder, part_of

if TYPE_CHECKING:
    from train.latents.writer import ShardWriter

MODELS = {
    "tiny": str(Path(__file__).parent / "tiny/model"),
    "dev": "black-forest-labs/FLUX.1-dev",
    "schnell": "black-forest-labs/FLUX.1-schnell",
}
SMALL = 32  # pixels a side of the samples that are only indexed
PARTS = ("cold", "warm", "index")
KIB, MIB = 2**10, 2**20


# what a child process measures


def resident() -> int:
    """The peak of this process's memory so far, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage says includes the parent's, from before this program took its place
        return next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM")) * KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * KIB


def build_once(args: argparse.Namespace, pictures: Path, cache: Path) -> dict[str, Any]:
    """Read the samples and have everything encoded; seconds, the phases' seconds, peaks and counts."""
    import torch

    from infer.checkpoint.model import Model
    from infer.device.device import pick_device
    from infer.quantize.precision import Precision
    from train.data.caption import all_texts
    from train.data.dataset import Data
    from train.data.samples import read_samples
    from train.latents.build import build
    from train.latents.settings import Encode

    device = pick_device(args.device)
    model, precision = Model(MODELS.get(args.model, args.model), weights=args.weights), Precision(args.precision)
    data, encode = Data(str(pictures), resolution=args.side, cache=str(cache)), Encode(tile=args.tile)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # its start is no part of the work
    before, start = resident(), time.perf_counter()
    samples, _ = read_samples(data)
    built = build(data, samples, all_texts(samples, data), model, precision, encode, device)
    seconds = time.perf_counter() - start
    found = {"seconds": seconds, "phases": built.seconds, "counts": built.counts, "before": before, "peak": resident()}
    if device.type == "cuda":
        found["device_peak"] = torch.cuda.max_memory_allocated(device)
    return found


def cold(args: argparse.Namespace, pictures: Path, cache: Path) -> dict[str, Any]:
    """From nothing; and how fast the autoencoder is if it has never to wait for pictures."""
    import torch

    from infer.checkpoint.load import load_vae
    from infer.checkpoint.model import Model
    from infer.device.device import pick_device
    from infer.sample.encode import to_posterior
    from train.latents.settings import Encode

    shutil.rmtree(cache, ignore_errors=True)
    found = build_once(args, pictures, cache)
    device, encode = pick_device(args.device), Encode(tile=args.tile)
    vae = load_vae(Model(MODELS.get(args.model, args.model), weights=args.weights), device)
    if encode.tile:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = encode.tile, encode.tile // 8
    batch = encode.batch(args.side, args.side, device)
    given = torch.rand(batch, 3, args.side, args.side, device=device).to(vae.dtype)
    for name, layout in (("plain", torch.contiguous_format), ("channels last", torch.channels_last)):
        vae.to(memory_format=layout)
        pixels = given.contiguous(memory_format=layout)
        to_posterior(vae, pixels)
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < args.alone:
            mean, _ = to_posterior(vae, pixels)
            float(mean[0, 0, 0, 0])  # waits for it
            done += batch
        found[name] = done / (time.perf_counter() - start)
    found["alone"] = found["channels last" if device.type == "cpu" else "plain"]  # as train/latents/encoding.py has it
    return found


class NothingAbsent:
    """In the place of a ShardWriter: as if every view of every picture were in the cache."""

    def claim(self, keys: Collection[str]) -> tuple[set[str], bool]:
        return set(), True


def index(args: argparse.Namespace, pictures: Path, cache: Path) -> dict[str, Any]:
    """What training knows of its samples before the first is encoded: captions, identities, buckets and an epoch."""
    import warnings

    import torch

    from infer.family.family import LatentMap
    from infer.program.remembered import Remembered
    from train.data.batches import epoch_batches
    from train.data.caption import all_texts
    from train.data.dataset import Data
    from train.data.samples import read_samples
    from train.latents.build import admit
    from train.latents.identities import known_identities, write_identities
    from train.latents.keys import Keys
    from train.latents.prepare import make_preparer
    from train.latents.settings import Encode
    from train.latents.store import Cache
    from train.latents.workers import work_ahead
    from train.loop.batch import Samples, batch_sampler

    data, encode = Data(str(pictures), resolution=SMALL, batch_size=4, cache=str(cache)), Encode()
    before, start = resident(), time.perf_counter()
    samples, _ = read_samples(data)
    texts = all_texts(samples, data)
    remembered, writers = Remembered(cache), {"pictures": cast("ShardWriter", NothingAbsent())}
    with Path(os.devnull).open("rb") as nothing:
        store = Cache(data, Keys("", 0, ""), LatentMap(0.0, 1.0), True, True, nothing)
        known = known_identities(cache / "index", warnings.warn)
        prepare = make_preparer(store, samples, writers, remembered, known, encode, torch.bfloat16)
        prepared = list(work_ahead(prepare, range(len(samples)), encode.threads))
        if new := {key: picture for one in prepared for key, picture in one.known.items()}:
            write_identities(cache / "index", new)
        remembered.save()
        admit(store, samples, {one.sample: one.found for one in prepared})
    del prepared, new, known
    every = Samples(samples, list(range(len(samples))), [])
    batches = epoch_batches(batch_sampler(every, store, data, 0, 1), 0)
    assert sum(map(len, batches)) == len(samples) and len(texts) == min(CAPTIONS, len(samples))
    return {"seconds": time.perf_counter() - start, "before": before, "peak": resident()}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"cold": cold, "warm": build_once, "index": index}


def run_part(args: argparse.Namespace, part: str, pictures: Path, cache: Path) -> dict[str, Any]:
    """A part in a process of its own."""
    own = {"device": args.device, "model": args.model, "weights": args.weights, "precision": args.precision}
    own |= {"side": args.side, "tile": args.tile, "alone": args.alone}
    command = [sys.executable, __file__, *(f"--{name}={value}" for name, value in own.items())]
    done = subprocess.run([*command, "--child", part, str(pictures), str(cache)], stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# the rows


def encoding_rows(args: argparse.Namespace, folder: Path) -> list[tuple[str, str, str | None, float]]:
    """Cold and warm. Of each row: name, unit, target, measured."""
    pictures, cache, count = folder / "pictures", folder / "cache", args.pictures
    paint_folder(pictures, count, args.side)
    rows: list[tuple[str, str, str | None, float]] = []
    if "cold" in args.only:
        found = run_part(args, "cold", pictures, cache)
        assert found["counts"]["pictures_misses"] == count and found["counts"]["pictures_hits"] == 0
        rate = count / (found["phases"]["pictures"] - found["phases"]["load"])
        rows += [
            ("cold: all, models loaded and texts encoded too", "pictures/s", None, count / found["seconds"]),
            ("cold: reading, decoding and encoding", "pictures/s", None, rate),
            ("the autoencoder alone, its pictures waiting", "pictures/s", None, found["plain"]),
            ("the same in the layout channels last", "pictures/s", None, found["channels last"]),
            ("cold: share of the autoencoder's own speed", "", ">= 0.9", rate / found["alone"]),
            ("cold: texts", "texts/s", None, min(CAPTIONS, count) / found["phases"]["texts"]),
            ("cold: peak memory", "MiB", None, found["peak"] / MIB),
        ]
        if "device_peak" in found:
            rows.append(("cold: peak memory of the GPU", "MiB", None, found["device_peak"] / MIB))
    if "warm" in args.only:
        some = max(1, count // 4)
        part_of(folder / "some", pictures, some)
        run_part(args, "warm", pictures, cache)  # fills what is not there yet, and the system's own cache of files
        few, found = (run_part(args, "warm", place, cache) for place in (folder / "some", pictures))
        assert found["counts"]["pictures_hits"] == count and found["counts"]["pictures_misses"] == 0
        rows += [
            ("warm: all", "pictures/s", None, count / found["seconds"]),
            ("warm: all", "ms/picture", "<= 1", 1000 * found["seconds"] / count),
            ("warm: peak memory", "MiB", None, found["peak"] / MIB),
            (
                f"warm: memory, {some:,} to {count:,} pictures",
                "KiB/picture",
                "<= 16",
                (found["peak"] - few["peak"]) / max(1, count - some) / KIB,
            ),
        ]
    return rows


def index_rows(args: argparse.Namespace, folder: Path) -> list[tuple[str, str, str | None, float]]:
    """A great many samples."""
    count, some = args.samples, max(1, args.samples // 4)
    small = folder / "small"
    paint_folder(small, count, SMALL)
    part_of(folder / "some", small, some)
    cache = folder / "index"
    shutil.rmtree(cache, ignore_errors=True)
    few = run_part(args, "index", folder / "some", cache / "some")
    first, again = (run_part(args, "index", small, cache / "all") for _ in range(2))
    growth = (first["peak"] - few["peak"]) / max(1, count - some) / KIB
    return [
        (f"index: {count:,} samples at first sight", "s", "<= 60", first["seconds"]),
        (f"index: {count:,} samples again", "s", "<= 60", again["seconds"]),
        (f"index: memory of the first {some:,}", "KiB/sample", None, (few["peak"] - few["before"]) / some / KIB),
        (f"index: memory of the others up to {count:,}", "KiB/sample", "<= 8", growth),
    ]


def machine(device: str) -> str:
    """The processor, and the card if it is used; the load, if others work beside."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        name = next((line.split(":", 1)[1].strip() for line in info.open() if line.startswith("model name")), name)
    said = f"{os.cpu_count()} cores of {name}"
    if device != "cpu":
        import torch

        said += f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = os.getloadavg()[0]
    return f"{said} (load {load:.1f} at the start)" if load > 0.5 else said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-data"))
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512, help="pixels a side of the pictures, and the resolution")
    parser.add_argument("--samples", type=int, default=100_000, help="of the index")
    parser.add_argument("--device", default="cpu", help="cpu, cuda")
    parser.add_argument("--model", default="tiny", help="tiny, dev, schnell, or a path")
    parser.add_argument("--weights", default="checkpoint", choices=("checkpoint", "random"))
    parser.add_argument("--precision", default="bf16", help="of T5")
    parser.add_argument("--tile", type=int, default=2048, help="encode.tile")
    parser.add_argument("--alone", type=float, default=5.0, help="seconds to measure the autoencoder alone")
    parser.add_argument("--out", type=Path, help="a file for the lines of JSON")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        from infer.program.quiet import quieten

        quieten()
        part, pictures, cache = args.child
        print(json.dumps(CHILDREN[part](args, Path(pictures), Path(cache))))
        return
    at = machine(args.device)
    rows = encoding_rows(args, args.folder) if {"cold", "warm"} & set(args.only) else []
    rows += index_rows(args, args.folder) if "index" in args.only else []
    common = {
        "machine": at,
        "date": date.today().isoformat(),
        "versions": versions() | {name: version(name) for name in ("pillow", "safetensors")},
        "command": " ".join(["python", "scripts/bench_data.py", *sys.argv[1:]]).split(" --out")[0],
    }
    lines = [dict(zip(("name", "unit", "target", "measured"), row, strict=True)) | common for row in rows]
    print(f"\n{at}, {common['date']}\n\n{table(lines)}\n")
    for line in lines:
        print(json.dumps(line))
    if args.out is not None:
        replace_file(args.out, lambda path: path.write_text("".join(json.dumps(line) + "\n" for line in lines)))


if __name__ == "__main__":
    main()
