"""Keep a model loaded and draw what is asked for, so that the second picture takes no loading.

    python infer/serve.py idle=600                        # in a terminal of its own, or
    python infer/draw.py resident=true prompt="a cup"     # starts one by itself; so do choose.py and the page

One runs for a folder with runs/. It gives its memory back when a training begins there, when nothing was asked for
within `idle` seconds, and at Ctrl-C or `kill`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from infer.program.quiet import ready
from infer.resident.settings import Serve


def stay(options: Serve) -> None:
    """Take requests until there is a reason to leave.

    Raises:
        ValueError: another drawing process runs in this folder.
    """
    ready()
    from infer.resident.serve import serve

    serve(options)


if __name__ == "__main__":
    run_command("serve", Serve, stay)
