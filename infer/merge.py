r"""Merge adapters into a checkpoint and quantize it: a folder that needs no adapter any more.

    python infer/merge.py model=dev precision=nf4 adapter.path=runs/mine/adapter out=models/mine-nf4
    python infer/merge.py model=dev precision=nf4 out=models/both adapter.path=a adapter.weight=0.8 \
        'adapter.also=[{path:b,weight:0.5}]'

Shard by shard from the unquantized checkpoint: W + strength x B A, rounded once. Merging straight into 4-bit weights
rounds twice, and an update smaller than half a step is lost there: that is refused, with the loss measured.
`out` gets merge.md and merge.json, which say for each layer how much of the update is left; with prompts, pictures too.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.merging.settings import Merge, check_merge
from infer.program.command import run_command
from infer.program.quiet import ready


def merge(options: Merge) -> Path:
    """Write the merged checkpoint, whole or not at all; returns its folder.

    Raises:
        ValueError: `out` is empty or exists, an adapter does not fit, or the checkpoint is quantized already.
    """
    device = check_merge(options)
    ready()
    from infer.merging.merge import merge_checkpoint

    return merge_checkpoint(options, device)


if __name__ == "__main__":
    run_command("merge", Merge, merge)
