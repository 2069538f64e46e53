"""python -m infer.report runs/compare/compare: writes a comparison's report again from its results.json."""

import sys

from infer.program.errors import explained
from infer.report.write import main

if __name__ == "__main__":
    with explained():
        main(sys.argv[1:])
