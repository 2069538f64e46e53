"""Host memory of loading a single file: its peak beyond what a process has before, against the file's largest tensor.

    python scripts/bench_files.py --double 2 --single 4 --kinds bf16 fp8 Q8_0 --out files.jsonl
    python scripts/bench_files.py --double 19 --single 38 --kinds bf16          # FLUX.1-dev's size: 24 GB on the disk

The files have random weights and the layers of FLUX.1-dev at its own width; they are made on the spot and removed. Each
is loaded as NF4 by a process of its own, on the GPU if there is one, else on the CPU, where the quantized weights lie
in host memory too. What counts is memory that nobody else can have (RssAnon): pages of the mapped file can be dropped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.device.device import pick_device
from infer.family.find import of_config
from infer.family.flux1_sizes import DEV
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from infer.quantize.storage import stored_bytes

GIB = 2**30
TINY = ROOT / "scripts" / "tiny" / "model"


def weights(double: int, single: int) -> dict[str, Tensor]:
    """Random weights in bf16 by diffusers' names, which single files may have."""
    config = DEV["transformer"] | {"num_layers": double, "num_single_layers": single}
    family, own = of_config(config), torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in family.norm_sizes(config).items()}
    for name, layer in family.linear_shapes(config).items():
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = tuple(layer), (layer.rows,)
    once = torch.randn(2**20, generator=own, dtype=torch.bfloat16) * 0.02
    return {name: once.repeat(-(-torch.Size(size).numel() // len(once)))[: torch.Size(size).numel()].view(size)
            for name, size in shapes.items()}  # fmt: skip


def write(file: Path, found: dict[str, Tensor], kind: str) -> None:
    """bf16, fp8 (e4m3, as it is) or a GGUF's kind."""
    from safetensors.torch import save_file

    if kind == "bf16":
        save_file(found, file)
    elif kind == "fp8":
        save_file({k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in found.items()}, file)
    else:
        import gguf

        writer, wanted = gguf.GGUFWriter(file, "flux", use_temp_file=True), gguf.GGMLQuantizationType[kind]
        for name, value in found.items():
            whole = value.float().numpy()
            if whole.ndim == 2 and whole.shape[1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0:
                writer.add_tensor(name, gguf.quants.quantize(whole, wanted), raw_dtype=wanted)
            else:
                writer.add_tensor(name, whole)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()


def make_parts(folder: Path) -> Path:
    """The bundled model's folder with FLUX.1-dev's config of the transformer, which sizes alone do not tell."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("transformer"))
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(DEV["transformer"]))
    return folder


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def load(file: str, parts: str, device: torch.device) -> dict[str, float]:
    """Load a file as NF4; GiB that the process had before, at its peak and after, and seconds."""
    if device.type == "cuda":
        torch.zeros(1, device=device)
    load_transformer(Model(str(TINY)), Precision("nf4"), device)  # libraries and kernels are there
    before, most, done = anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.002):
            most = max(most, anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    began = time.monotonic()
    transformer = load_transformer(Model(file, parts=parts), Precision("nf4"), device)
    seconds = time.monotonic() - began
    done.set()
    thread.join()
    return {
        "before_gib": before / GIB,
        "peak_gib": most / GIB,
        "after_gib": anonymous() / GIB,
        "weights_gib": stored_bytes(transformer) / GIB,
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["bf16", "fp8", "Q8_0"])
    parser.add_argument("--out", type=Path, help="a JSON line a file")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load", nargs=2, help="load this file with these parts, and print its figures")
    args = parser.parse_args()
    if args.load:
        print(json.dumps(load(args.load[0], args.load[1], pick_device(args.device))))
        return
    found = weights(args.double, args.single)
    largest = max(value.numel() for value in found.values())
    with tempfile.TemporaryDirectory() as folder:
        parts = make_parts(Path(folder, "parts"))
        for kind in args.kinds:
            file = Path(folder, "base.gguf" if kind[0] == "Q" else "base.safetensors")
            write(file, found, kind)
            command = [sys.executable, __file__, "--load", str(file), str(parts), "--device", args.device]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ, text=True)
            row: dict[str, Any] = {
                "kind": kind, "device": pick_device(args.device).type, "file_gib": file.stat().st_size / GIB,
                "largest_tensor": largest, **json.loads(told.stdout.splitlines()[-1]),
            }  # fmt: skip
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            if args.out is not None:
                with args.out.open("a") as lines:
                    lines.write(json.dumps(row) + "\n")
            file.unlink()


if __name__ == "__main__":
    main()
