"""Products in fp16 (infer/fast/half.py) on a newer card that is taken for one without bf16: gradients, losses, memory.

    python scripts/check_half.py             # FLUX.1-dev's full size with random NF4 weights, then the bundled model
    python scripts/check_half.py --tiny      # the bundled model alone, on a CPU too

Loss curves of the bundled model go beside the rows, into half-curves.jsonl.

Every operation is looked at while a step runs uncompiled, and every graph that is compiled: none may hold a bf16
tensor. Kernels are those that a T4 has: memory-efficient attention, and products of cuBLAS. Activations beyond fp16's
range are put in on purpose, by the norms' scales.
"""

import argparse
import sys
import time
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from accelerate import Accelerator

from infer.device.allocator import prepare
from infer.device.device import release
from scripts import bench_rows
from scripts.bench_rows import Row, make_row
from scripts.check.half_gradients import full_size, parts, streamed
from scripts.check.half_runs import bundled


def main() -> None:
    prepare()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("runs/bench/half.jsonl"))
    options = parser.parse_args()
    accelerator = Accelerator(mixed_precision="no")
    device = accelerator.device
    if not options.tiny and device.type != "cuda":
        sys.exit("error: the full size needs a GPU, and torch sees none; give --tiny")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    source: Row = bench_rows.circumstances(device)
    curves = options.out.with_name(f"{options.out.stem}-curves.jsonl")
    curves.unlink(missing_ok=True)
    missed = []

    def row(name: str, unit: str, measured: float, target: str | None) -> None:
        one = make_row(name, unit, measured, target, source)
        bench_rows.append(options.out, one)
        print(bench_rows.table([one]).splitlines()[-1], flush=True)
        if bench_rows.met(one) == "no":
            missed.append(name)

    begun = time.perf_counter()
    if options.tiny:
        bundled(row, device, options.steps, curves)
    else:
        for part in (
            lambda: full_size(row, accelerator),
            lambda: parts(row, device),
            lambda: bundled(row, device, options.steps, curves),
            lambda: streamed(row, accelerator),
        ):
            try:
                part()
            except Exception:  # the other parts are to be seen too
                traceback.print_exc()
                missed.append("a part")
            release(device)
            print(f"   {time.perf_counter() - begun:.0f} s", flush=True)
    if missed:
        sys.exit(4)


if __name__ == "__main__":
    main()
