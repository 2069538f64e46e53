"""A local page over runs/: watch runs, draw with them, choose a checkpoint, start and stop them.

    python train/page.py                       # prints an address with a token, and opens it
    python train/page.py 'folders=[my_pictures]' port=8000 open=false

It is there for this machine alone (from another one: ssh -L 7878:127.0.0.1:7878 that-machine). Everything it does is a
command that it shows; closing it stops nothing. It needs the extra `page`: pip install -e '.[page]'.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.command import run_command
from train.watch.settings import Page


def page(options: Page) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        ValueError: its packages are not installed, a folder is not there, or the port is taken.
    """
    for folder in options.folders:
        if not Path(folder).is_dir():
            raise ValueError(f"folders names {folder!r}, which is no folder; give folders of pictures")
    if find_spec("starlette") is None or find_spec("uvicorn") is None:
        raise ValueError("the page needs starlette and uvicorn: pip install -e '.[page]'")
    from train.watch.serve import serve

    serve(options)


if __name__ == "__main__":
    run_command("page", Page, page)
