"""Write a sweep's report again: a table, a page with the Pareto front, and the best point as a config.

python train/sweep_report.py runs/mine
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.errors import explained
from train.sweeps.report import conclude

if __name__ == "__main__":
    with explained():
        if len(sys.argv) != 2:
            raise ValueError("give the sweep's folder: python train/sweep_report.py runs/<run>")
        conclude(Path(sys.argv[1]))
