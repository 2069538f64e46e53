"""Small checkpoints through every path that only a GPU takes, each against a CPU or the plain path.

    python scripts/check_gpu.py                                  # minutes, most of them compiling on the CPU
    python scripts/check_gpu.py --only nf4-streamed-dora spill   # some rows; --list names them
    python scripts/check_gpu.py --cpu --only nf4-fused-lora      # what of it a CPU can do

The bundled FLUX.1 and FLUX.2 klein, and a random klein that is made on the spot for texts of 512 tokens. Of each,
each precision, on the plain, the fused and the streamed path, with LoRA, rsLoRA and DoRA, and products in 8 bits:
gradients, a short training, the same resumed in its middle, its preview, and a comparison's pictures. Then pictures
with references, mixtures, adapters that start from the rounding error or are no LoRA, recovery, scores while training,
merging, the optimizers, several resolutions, memory that runs out, and pytest's GPU tests; with two GPUs and more,
scripts/check_ranks.py too. Rows of one precision share a process, and processes run side by side. What the programs
themselves say goes to a log beside the rows. The last lines are a table; the exit code is 4 if a figure is beyond its
limit or a row failed.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from infer.device.allocator import prepare
from infer.device.device import release
from infer.program.atomic import replace_file
from infer.program.errors import DIFFERS
from scripts import bench_rows
from scripts.bench_rows import Row
from scripts.check.bounds import limited, streamed
from scripts.check.case import DISTILLED, KLEIN
from scripts.check.rows import ALONE, SECONDS, WORK, groups, possible
from scripts.check.table import row_of, table, tell
from scripts.tiny.make_style import make_style
from tests.tiny_klein import make_klein


def check(name: str, device: torch.device) -> Row:
    """One row's figures and seconds."""
    start = time.perf_counter()
    with limited(SECONDS if device.type == "cuda" else 0), streamed(None):
        figures = WORK[name](device)
    release(device)
    return {"figures": {key: list(value) for key, value in figures.items()}, "seconds": time.perf_counter() - start}


def worker(names: list[str], out: Path, device: torch.device) -> None:
    folder = out.parent
    os.chdir(folder)
    table_of = os.fdopen(os.dup(1), "w")
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in names:
        print(f"\n==== {name}", flush=True)
        fit = bench_rows.attempt(name, out, device, partial(check, name, device))
        tell(name, out, table_of)
        if not fit:
            sys.exit(1)


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(WORK), metavar="ROW", help="these rows; --list names them")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--cpu", action="store_true", help="what of it a CPU can do")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench/check-gpu.jsonl"), help="where the rows go")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.out, torch.device("cpu" if options.cpu else "cuda"))
        return
    names = [name for name in WORK if possible(name, options.cpu) and (options.only is None or name in options.only)]
    if options.list:
        print("\n".join(names))
        return
    if not options.cpu and not torch.cuda.is_available():
        sys.exit("error: this checks a GPU, and torch sees none; --cpu does what a CPU can")
    start, folder = time.perf_counter(), Path(tempfile.mkdtemp(prefix="check-gpu-"))
    seen, log = folder / "seen.jsonl", folder / "log"
    seen.touch()
    log.touch()
    make_style(folder / "pictures", 12, 0)
    if any(name.startswith(KLEIN) for name in names):
        make_klein(folder / KLEIN)
        make_klein(folder / DISTILLED, distilled=True)
    os.environ |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4", "HF_HUB_OFFLINE": "1"}
    flags = ["--cpu"] if options.cpu else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was seen is still told
    try:
        side = groups([name for name in names if name not in ALONE])
        run = partial(bench_rows.run_workers, Path(__file__).resolve(), out=seen, seconds=600, flags=flags)
        if side:  # a process compiles with few threads, and waits for the device
            run(side, needs=[1.0] * len(side), space=1.5 * len(os.sched_getaffinity(0)))
        for name in (name for name in names if name in ALONE):
            device = torch.device("cuda")
            bench_rows.attempt(name, seen, device, partial(check, name, device))
            tell(name, seen)
    finally:
        rows = finish(names, seen, log, options.rows)
        shutil.rmtree(folder, ignore_errors=True)
        print(f"{time.perf_counter() - start:.0f} s; {options.rows}")
    sys.exit(DIFFERS if any(bench_rows.met(row) != "yes" for row in rows) else 0)


def finish(names: list[str], seen: Path, log: Path, file: Path) -> list[Row]:
    """Keep the rows and the log, and print the table."""
    found = {line["variant"]: line for line in bench_rows.read_lines(seen)}
    absent = {"error": "the check ended before this row", **bench_rows.circumstances(torch.device("cpu"))}
    rows = [row_of(found.get(name, {"variant": name, **absent})) for name in names]
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(log, file.with_suffix(".log"))
    replace_file(file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    right = sum(bench_rows.met(row) == "yes" for row in rows)
    print(f"\n{table(rows)}\n{right} of {len(rows)} rows hold")
    return rows


if __name__ == "__main__":
    main()
