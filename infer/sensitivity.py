"""Which layers suffer from quantization: the velocity's error when each alone is quantized, and the mixture of kinds
that a budget of bytes buys.

    python infer/sensitivity.py model=dev budget_gib=8 out=configs/precision/mine.yaml
    python infer/compare.py model=dev +precision@precisions.mine=mine 'only=[bf16,nf4,mine]'

One bf16 transformer draws a few prompts; at the latents that it comes by, each group of layers that read one input has
its weights replaced by their quantized values and put back. Needs no data and no network but FLUX itself. Writes
sensitivity.json and sensitivity.png to runs/<run>/; precision=auto does the same where no measurement is kept yet.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from infer.program.quiet import ready
from infer.rounding.settings import Sensitivity, check_sensitivity


def sensitivity(options: Sensitivity) -> Path:
    """Measure, keep, propose; returns the JSON file."""
    device = check_sensitivity(options)
    ready()
    from infer.rounding.proposal import propose

    return propose(options, device)


if __name__ == "__main__":
    run_command("sensitivity", Sensitivity, sensitivity)
