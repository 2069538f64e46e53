"""What a training config needs before it runs: peak memory by part, and about how long a step takes on known cards.

    python train/plan.py model=dev precision=nf4 data.resolution=1024 adapter.rank=16
    python train/plan.py model=dev data.resolution=1024 fit_gib=12    # the fastest memory settings that fit

Takes train.py's options. Needs no GPU, no checkpoint and no network for FLUX.1-dev and schnell. json=true prints one
JSON object with `peak_memory_bytes` and its parts as the last line, out=plan.json writes it to a file.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from train.estimate.plan import Plan, plan

if __name__ == "__main__":
    run_command("plan", Plan, plan)
