"""Several GPUs against one: the same adapter from a larger batch, shared weights and optimizers, a run that one process
goes on with, one that repeats itself, what is said, and the death of a rank.

    python scripts/check_ranks.py                  # two GPUs, a minute; --cpu tries it with two CPU processes
    python scripts/check_ranks.py --ranks 4 --out runs/bench/check_ranks.jsonl

Trains the bundled model for a few steps in each way, by several processes with a part of the batch each and by one, and
prints one JSON object a line: `difference` is that of the adapters over what was learned, `limit` what rounding
explains. The exit code is 4 if any is beyond its limit.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.paths import ROOT
from scripts.check.rank_results import results, row_of
from scripts.check.rank_runs import train_all

ENDING = 15  # seconds that processes have after their time is up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="CPU processes over gloo")
    parser.add_argument("--ranks", type=int, choices=(2, 4), default=2, help="processes, a GPU each")
    parser.add_argument("--out", type=Path, help="append rows to this file of JSON lines")
    parser.add_argument("--logs", type=Path, help="where what the processes say is kept; runs/check_ranks")
    parser.add_argument("--seconds", type=float, default=300, help="for all of it")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_all(options.cpu, options.ranks, options.worker)
        return
    from infer.program.quiet import quieten

    quieten()
    from scripts.bench_rows import append, circumstances
    from scripts.tiny.make_style import make_style

    if not options.cpu and torch.cuda.device_count() < options.ranks:
        sys.exit(
            f"error: {options.ranks} GPUs are needed, and torch sees {torch.cuda.device_count()}; --cpu needs none"
        )
    started = time.time()
    own = [str(Path(__file__).resolve()), "--worker", str(started + options.seconds), "--ranks", str(options.ranks)]
    own += ["--cpu"] if options.cpu else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu"} if options.cpu else {}
    out = options.out.resolve() if options.out else None
    logs = (options.logs or Path("runs/check_ranks")).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make_style(Path("pictures"), 12, seed=1)
        several = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
        running = []
        for log, command in ((logs / "ranks.log", several), (logs / "one.log", [sys.executable])):
            with log.open("w") as stream:
                running.append(subprocess.Popen([*command, *own], env=environment, stdout=stream, stderr=stream))
        for process in running:
            try:
                process.wait(max(1.0, started + options.seconds + ENDING - time.time()))
            except subprocess.TimeoutExpired:
                print(f"the processes have not ended {ENDING} s after {options.seconds:g} s", file=sys.stderr)
                process.terminate()
                process.wait()
            if process is running[0]:
                ended = time.time()
                Path("ended").touch()
        code, told = running[1].returncode, (logs / "ranks.log").read_text()
        if code:
            print(f"one process said:\n{(logs / 'one.log').read_text()[-4000:]}", file=sys.stderr)
        place = circumstances(torch.device("cpu" if options.cpu else "cuda"))
        found = list(results(options.cpu, options.ranks, told, ended))
        for result in found:
            print(json.dumps(result))
            if out is not None:
                append(out, row_of(result, options.ranks, place))
        if code or not all(result["ok"] for result in found):
            print(f"{options.ranks} processes said:\n{told[-6000:]}", file=sys.stderr)
            sys.exit(4)


if __name__ == "__main__":
    main()
