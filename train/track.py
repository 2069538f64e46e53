"""Tell a run's tracker what was compared after the training, with infer/compare.py.

python train/track.py run=mine track=wandb
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from train.trackers.options import Told, tell_comparison

if __name__ == "__main__":
    run_command("track", Told, tell_comparison)
