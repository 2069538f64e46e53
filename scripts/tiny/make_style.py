"""Paint the demo's training set: a style that the bundled model cannot draw, in a few dozen captioned PNGs.

    python scripts/tiny/make_style.py runs/demo-pictures

Inked: a black line around every edge. Captions name what is drawn, not the style: the trigger word does.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from infer.program.atomic import replace_file
from infer.program.errors import explained
from scripts.tiny import world


def make_style(folder: Path, count: int, seed: int) -> None:
    """Write `count` pictures with metadata.jsonl; the same bytes every time."""
    rng = random.Random(f"style {seed}")
    lines = []
    for i in range(count):
        scene = world.sample_scene(rng)
        scene = replace(scene, things=tuple(replace(thing, texture="plain") for thing in scene.things))
        pixels = world.paint(world.canvas([scene], "inked"))[0]
        name = f"inked-{i:03d}.png"
        picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
        replace_file(folder / name, partial(picture.save, format="PNG"))
        lines.append(json.dumps({"file_name": name, "text": world.describe(scene)}))
    replace_file(folder / "metadata.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_style(args.folder, args.count, args.seed)
    print(f"{args.count} pictures with captions in {args.folder}")


if __name__ == "__main__":
    with explained():
        main()
