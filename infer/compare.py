"""Draw the same prompts and seeds at several precisions, without and with an adapter, and say what each one costs.

The experiment of the Hugging Face guide "Quantize Your Diffusion Models with diffusers", measured stage by stage:

    python infer/compare.py model=tiny
    python infer/compare.py model=dev adapter.path=runs/mine/adapter run=mine 'only=[bf16,nf4]'

Writes results.json, comparison.png, report.md and report.html to runs/<run>/compare/, and with sampling.model=... those
of the second checkpoint to runs/<run>/compare-<its name>/.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.comparison.settings import Compare, check_compare, on_second
from infer.program.command import run_command
from infer.program.quiet import ready


def compare(options: Compare) -> Path:
    """Run the comparison, and then that of sampling.model; returns the first one's folder. Each appears whole or not at
    all."""
    device = check_compare(options)
    ready()
    from infer.comparison.draw import draw_all, memory_of, names_of

    second = on_second(options)
    if second is not None:
        for name in names_of(options):  # before an hour of drawing, not after it
            memory_of(second[1], name, device)
    folder = draw_all(options, device)
    if second is not None:
        draw_all(second[1], device, second[0])
    return folder


if __name__ == "__main__":
    run_command("compare", Compare, compare)
