"""Several GPUs against one: the same adapter from twice the batch, weights shared by FSDP 2, and the death of a rank.

    python scripts/check_ranks.py                  # two GPUs, about a minute; --cpu tries it with two CPU processes

Trains the bundled model for a few steps in each way, once by one process and once by two with half the batch each, and
prints one JSON object a line: `difference` is that of the adapters over what was learned, `limit` what rounding
explains. The exit code is 1 if any is beyond its limit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)
RANKS = 2

# name: precision, optimizer, memory, whether weights are shared, and how much of what is learned may differ:
# Adam divides by small second moments, so that bf16 in batches of other sizes is seen
CHECKS: dict[str, tuple[str, str, dict[str, Any], bool, float]] = {
    "replicas fp32": ("fp32", "adamw", {}, False, 1e-3),
    "replicas nf4": ("nf4", "adamw", {}, False, 0.1),
    "replicas nf4, CUDA graph": ("nf4", "adamw", {"graph": True}, False, 0.1),
    "replicas int8": ("int8", "adamw", {}, False, 0.1),
    "replicas nf4, adamw8bit": ("nf4", "adamw8bit", {}, False, 0.2),
    "fsdp2 nf4": ("nf4", "adamw", {}, True, 0.1),
    "fsdp2 bf16": ("bf16", "adamw", {}, True, 0.1),
}


def job_of(name: str, processes: int, cpu: bool) -> Any:
    """The run of one check."""
    from infer.adapters import Adapter
    from infer.fast import Memory
    from infer.flux import Model
    from infer.quantize import Precision
    from train.config import Train
    from train.data import Data
    from train.optim import Optim

    kind, optimizer, memory, _, _ = CHECKS[name]
    compute = "fp32" if kind == "fp32" else "bf16"
    return Train(
        model=Model(str(ROOT / "scripts/tiny/model")),
        precision=Precision(kind, compute_dtype=compute),
        adapter=Adapter(rank=32 if optimizer == "adamw8bit" else 4),  # it leaves tensors below 4,096 values in fp32
        data=Data("pictures", 128, 4 // processes, validation=0.2, cache="cache"),
        optim=Optim(optimizer, lr=1e-3),
        memory=Memory(**{"compile": False, "graph": False} | memory),  # compilation takes longer than all the rest
        run=f"{name.replace(', ', '-').replace(' ', '-')}-{processes}",
        steps=4,
        accumulation=2,
        save_every=0,
        validate_every=0,
        validation_levels=2,
        device="cpu" if cpu else "cuda",
    )


def share_weights(on: bool) -> None:
    """As `accelerate launch` does for a config file with fsdp_version: 2."""
    os.environ |= {"ACCELERATE_USE_FSDP": str(on).lower(), "FSDP_VERSION": "2"}


def train_all(cpu: bool) -> None:
    """What each process of a launch does: every check, one after another."""
    from infer.quiet import quieten

    quieten()
    from accelerate import Accelerator

    from train.train import train

    setattr(Accelerator, "end_training", lambda self: None)  # noqa: B010 - the next check needs the process group
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    for name, (_, _, memory, shared, _) in CHECKS.items():
        if cpu and memory:
            continue
        job = job_of(name, processes, cpu)
        if shared and processes == 1:
            job.memory.fused = False  # as FSDP has it
        share_weights(shared and processes > 1)
        train(job)
    if processes == 1:
        return
    share_weights(False)
    loop: Any = sys.modules["train.loop"]

    def dies(*_: Any) -> None:
        if os.environ["RANK"] == "1":
            Path("died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)

    loop.training_batch = dies
    job = job_of("replicas nf4", processes, cpu)
    job.run = "death"
    train(job)


def compare(name: str) -> dict[str, Any]:
    """The two adapters of a check."""
    from safetensors.torch import load_file

    runs = [Path("runs", job_of(name, processes, True).run) for processes in (1, RANKS)]
    one, two = (load_file(run / "adapter/pytorch_lora_weights.safetensors") for run in runs)
    moved = sum(float(value.square().sum()) for key, value in one.items() if "lora_B" in key) ** 0.5
    difference = sum(float((one[key] - two[key]).square().sum()) for key in one) ** 0.5 / moved
    events = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs]
    last = [[event for event in of_run if "seconds" in event][-1] for of_run in events]
    limit = CHECKS[name][4]
    return {
        "check": name,
        "difference": difference,
        "limit": limit,
        "ok": difference < limit,
        "seconds_one_and_two": [round(event["seconds"], 4) for event in last],
        "gib_one_and_two": [round(event["memory_gib"], 3) for event in last],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="two CPU processes over gloo")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        train_all(options.cpu)
        return
    from infer.quiet import quieten

    quieten()
    from scripts.tiny.make_style import make_style

    own = [str(Path(__file__).resolve()), "--worker", *(["--cpu"] if options.cpu else [])]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment |= {"ACCELERATE_USE_CPU": "true"} if options.cpu else {}
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        make_style(Path("pictures"), 12, seed=1)
        launched = {
            1: [sys.executable, *own],
            RANKS: [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}", *own],
        }
        logs = {}
        for processes, command in launched.items():
            with Path(f"{processes}.log").open("w") as log:
                code = subprocess.run(command, env=environment, stdout=log, stderr=log).returncode
            logs[processes] = Path(f"{processes}.log").read_text()
            if processes == 1 and code:
                sys.exit(f"one process failed:\n{logs[1][-4000:]}")
        ended = time.time()
        results = []
        for check, (_, _, memory, _, _) in CHECKS.items():
            if options.cpu and memory:
                continue
            try:
                results.append(compare(check))
            except OSError as error:
                results.append({"check": check, "ok": False, "error": str(error)})
        told = logs[RANKS].count("rank 1 of 2 has ended before the work was done")
        if Path("died").is_file():
            seconds = round(ended - float(Path("died").read_text()), 1)
            results.append({"check": "death of a rank", "seconds": seconds, "told": told, "ok": told == 1})
        for result in results:
            print(json.dumps(result))
        if not all(result["ok"] for result in results):
            sys.exit(f"two processes said:\n{logs[RANKS][-6000:]}")


if __name__ == "__main__":
    main()
