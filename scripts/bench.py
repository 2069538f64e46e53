"""Everything that is asked of this project at full size, measured on one GPU: a table with target and measured.

    python scripts/bench.py                             # half an hour on an H100; rows into runs/bench
    python scripts/bench.py --report docs/benchmarks    # the table of rows that were measured before; no GPU is needed

Training and sampling against the libraries' own recipes, streamed blocks, the fast path against plain layers, and the
plan against the peak memory of many configs.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from infer.program.paths import ROOT
from scripts.bench_grid import job_of
from scripts.bench_rows import Row, make_row, read_lines, table, write_rows
from train.estimate.memory import footprint

GIB = 2**30
PARTS = ("train", "infer", "check", "plan")
MORE = ("ranks", "compile", "kernels")  # by bench_ranks.py, of several GPUs, and bench_compile.py; seen in one process


def plan_rows(seen: list[Row]) -> list[Row]:
    """The plan's largest errors over configs whose peaks were measured (bench_grid's lines)."""
    seen = [line for line in seen if "error" not in line]
    plans = {line["name"]: footprint(job_of(line["config"])) for line in seen}
    groups = {"configs": seen, "configs that nothing was fitted to": [line for line in seen if not line["fitted"]]}
    rows = []
    for name, key in (("allocated", "allocated_gib"), ("held by the allocator", "held_gib")):
        holes = key == "held_gib"
        for kind, some in groups.items():
            errors = {}
            for line in (line for line in some if line.get(key) is not None):
                taken = plans[line["name"]]
                planned = taken.allocated + holes * taken.allocator
                errors[line["name"]] = 100 * (planned / GIB / line[key] - 1)
            if errors:
                worst = max(map(abs, errors.values()))
                label = f"plan: largest error of {len(errors)} {kind}, {name}"
                rows.append(make_row(label, "%", worst, "<= 5", some[0], errors=errors))
    return rows


def measure(folder: Path, gib: float) -> None:
    """Run the benchmarks one after another; each writes its rows into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    both = ["--together", f"{gib:g}"]
    files = {part: ["--seen", f"{folder}/{part}-seen.jsonl", "--rows", f"{folder}/{part}.jsonl"] for part in PARTS}
    commands = {
        "train": ["bench_train.py", *both, *files["train"]],
        "infer": ["bench_infer.py", *both, *files["infer"]],
        "check": ["check_fast.py", "--gradients", "--shapes", "--curves", "--out", f"{folder}/check.jsonl"],
        "plan": ["bench_grid.py", "--card-gib", f"{gib:g}", "--out", f"{folder}/grid.jsonl"],
    }
    for stale in ("check", "grid"):  # these are appended to
        (folder / f"{stale}.jsonl").unlink(missing_ok=True)
    for part, (script, *arguments) in commands.items():
        code = subprocess.run([sys.executable, str(ROOT / "scripts" / script), *arguments], check=False).returncode
        if code:
            print(f"{part}: {script} ended with code {code}", file=sys.stderr)
    if (folder / "grid.jsonl").is_file():
        # nothing was fitted to these: the constants stand since before
        seen = [
            {**line, "name": line["variant"], "fitted": False, "held_gib": line.get("reserved_gib")}
            for line in read_lines(folder / "grid.jsonl")
        ]
        write_rows(plan_rows(seen), folder / "plan.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print the rows of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    folder = options.report or options.out
    if options.report is None:
        if not torch.cuda.is_available():
            sys.exit("error: this measures a GPU, and torch sees none")
        measure(folder, torch.cuda.get_device_properties(0).total_memory / GIB - 1)
    files = [file for part in PARTS + MORE if (file := folder / f"{part}.jsonl").is_file()]
    if not files:
        sys.exit(f"error: {folder} holds none of {', '.join(f'{part}.jsonl' for part in PARTS)}")
    print(table(json.loads(line) for file in files for line in file.read_text().splitlines()))


if __name__ == "__main__":
    main()
