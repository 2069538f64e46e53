"""How long a mistake takes to be answered, and what a second start reads.

    python scripts/bench_start.py                  # every entry: a mistake, --help; and train/plan.py's own work
    python scripts/bench_start.py --gib 34         # the second start on so large a checkpoint and 10,000 pictures

Prints a table and a line of JSON for each row: seconds of the clock, and of the processor, which other work beside it
does not change. The checkpoint is a sparse file, so nothing but hashing is measured.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.paths import ROOT
from infer.program.remembered import Remembered

PICTURES, PICTURE = 10_000, 100_000  # files, and bytes of each
MISTAKES = {
    "train/train.py": "data.path=/nowhere",
    "train/cache.py": "data.path=/nowhere",
    "train/look.py": "data.path=/nowhere",
    "train/write_captions.py": "data.path=/nowhere",
    "train/page.py": "folders=[/nowhere]",
    "train/plan.py": "model.path=/nowhere",
    "train/selfcheck.py": "data.path=/nowhere",
    "train/gap.py": "adapter.path=/nowhere",
    "train/transfer.py": "data.path=/nowhere",
    "train/track.py": "run=nowhere",
    "train/sweep_report.py": "/nowhere",
    "infer/draw.py": "adapter.path=/nowhere",
    "infer/choose.py": "run=nowhere",
    "infer/compare.py": "adapter.path=/nowhere",
    "infer/save.py": "model.path=/nowhere",
    "infer/merge.py": "adapter.path=/nowhere",
    "infer/convert.py": "adapter.path=/nowhere",
    "infer/recover.py": "device=nothing",
    "infer/sensitivity.py": "run=../nowhere",
}


def run(*words: str) -> tuple[int, float, float]:
    """Exit code, seconds of the clock and of the processor."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True).returncode
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return code, clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock and of the processor."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def show(name: str, clock: float, processor: float) -> None:
    print(f"{name:44} {clock:8.2f} s {processor:8.2f} s of the processor")
    print(json.dumps({"name": name, "seconds": round(clock, 3), "processor_seconds": round(processor, 3)}))


def entries() -> None:
    for entry, mistake in MISTAKES.items():
        for word, expected in ((mistake, 2), ("--help", 0)):
            if entry == "train/sweep_report.py" and word == "--help":
                continue
            code, clock, processor = run(entry, word)
            assert code == expected, f"{entry} {word} ended with {code}"
            show(f"{entry} {word}", clock, processor)
    for words in (["model=dev"], ["model=dev", "fit_gib=12"]):
        code, clock, processor = run("train/plan.py", *words)
        assert code == 0, f"train/plan.py ended with {code}"
        show(f"train/plan.py {' '.join(words)}, its work", clock, processor)


def second_start(gib: float) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "weights.safetensors"
        with weights.open("wb") as stream:
            stream.truncate(int(gib * 2**30))
        pictures = [folder / f"{i:05d}.png" for i in range(PICTURES)]
        for i, file in enumerate(pictures):
            file.write_bytes(i.to_bytes(4) * (PICTURE // 4))
        time.sleep(3)  # what was changed within two seconds is not remembered

        def start(files: list[Path]) -> None:
            remembered = Remembered(folder)
            for file in files:
                remembered.sha256(file)
            remembered.save()

        for what, files in ((f"a checkpoint of {gib:g} GiB", [weights]), (f"{PICTURES:,} pictures", pictures)):
            for which in ("first", "second"):
                show(f"{what}, {which} start", *timed(partial(start, files)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, help="measure the second start instead, on a checkpoint of so many GiB")
    given = parser.parse_args()
    if given.gib is None:
        entries()
    else:
        second_start(given.gib)
