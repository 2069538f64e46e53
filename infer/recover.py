"""Make a recovery adapter: a small LoRA that gives back what quantization took, and stays on beside the user's own.

    python infer/recover.py model=dev precision=nf4 run=recover-nf4 'prompts=[...]' 'held_out=[...]'
    python train/train.py ... precision=nf4 adapter.recovery=runs/recover-nf4/adapter
    python infer/compare.py ... +recovery.nf4=runs/recover-nf4/adapter

Layer by layer: each one's error W - Q, W read from its shard and dropped again, is approximated as the velocity feels
it (infer/rounding/lowrank.py), and ranks go where a byte gains most. Nothing needs more memory than the quantized
transformer in training, so FLUX.1-dev fits a 24 GB card. `polish` steps then teach all layers together the bf16 model's
own velocity.

Writes runs/<run>/adapter/ and runs/<run>/recovery.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from infer.program.quiet import ready
from infer.rounding.settings import Recover, check_recover


def recover(options: Recover) -> Path:
    """Make and measure the adapter; returns its folder.

    Raises:
        ValueError: no layer is quantized, the run exists, or the checkpoint has no unquantized weights.
    """
    device = check_recover(options)
    ready()
    from infer.rounding.recovering import make_recovery

    return make_recovery(options, device)


if __name__ == "__main__":
    run_command("recover", Recover, recover)
