"""Load FLUX at a precision, attach an adapter, draw and measure."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("hydra") is None:  # before any other import fails with a name that says nothing to a newcomer
    there = (Path(__file__).resolve().parents[1] / ".venv" / "bin" / "activate").is_file()
    mend = (
        "activate the environment: source .venv/bin/activate"
        if there
        else "make the environment: bash scripts/setup.sh"
    )
    print(f"error: {sys.executable} has not what flux-lora needs; {mend}", file=sys.stderr)
    raise SystemExit(2)
