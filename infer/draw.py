"""Draw pictures from prompts, with or without an adapter, each with its settings inside.

    python infer/draw.py model=dev adapter.path=runs/mine/adapter prompt="sks, a cup on a table" 'seeds=[0,1]'
    python infer/draw.py model=dev adapter.path=runs/mine/adapter prompts=@prompts.txt 'weights=[0,0.5,1]' out=strengths
    python infer/draw.py like=pictures/sks-a-cup-on-a-table-0.png 'seeds=[3]'
    python infer/draw.py resident=true prompt="a cup"         # by a process that keeps the model: infer/serve.py

Writes PNGs and, of several, the contact sheet sheet.png to `out`. Precisions are compared by infer/compare.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.drawing.record import like_arguments
from infer.drawing.settings import Draw, check_draw, check_named, plan_pictures, sheet_file
from infer.program.command import run_command
from infer.program.errors import explained
from infer.program.quiet import ready


def draw(options: Draw) -> list[Path]:
    """Draw all; returns the files, the contact sheet last where there are several pictures.

    Raises:
        ValueError: something is absent, a file's name is taken, or pictures are not finite.
    """
    if options.resident:
        from infer.resident.ask import ask

        check_named(options)
        ask("draw", options)
        sheet = sheet_file(options)
        return [*(one.file for one in plan_pictures(options)), *([] if sheet is None else [sheet])]
    device = check_draw(options)
    ready()
    from infer.drawing.draw import draw_pictures

    return draw_pictures(options, device)


if __name__ == "__main__":
    with explained():
        sys.argv[1:] = like_arguments(sys.argv[1:])
    run_command("draw", Draw, draw)
