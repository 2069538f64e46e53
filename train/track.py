"""Send the comparison that infer/compare.py made of a trained run to the run's tracker.

python train/track.py run=mine track=wandb
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from train.trackers.tracker import SendComparison, send_comparison

if __name__ == "__main__":
    run_command("track", SendComparison, send_comparison)
