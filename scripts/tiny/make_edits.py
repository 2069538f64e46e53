"""Paint the edit demo's training set: pairs of the small world, before and after a thing changed its colour.

    python scripts/tiny/make_edits.py runs/edit-pictures

Writes after/ with captions such as "make it a blue star", before/ with pictures of the same names, and held/ with pairs
that are not trained: before-N.png, after-N.png and mask-N.png, white where they differ and a little around it. What the
caption does not say, place, size and ground, is in the picture before alone.
"""

import argparse
import json
import random
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from infer.program.atomic import replace_file
from infer.program.errors import explained
from scripts.tiny import world

AROUND = 9  # pixels of the square that a mask is widened by


def sample_pair(rng: random.Random) -> tuple[world.Scene, world.Scene]:
    """A single plain thing, and the same in another colour; the bundled model knows both."""
    while True:
        scene = world.sample_scene(rng)
        (thing, *others) = scene.things
        colour = rng.choice(list(world.COLOURS))
        if scene.kind != "single" or others or colour == thing.colour or world.held_out(thing.shape, colour):
            continue
        before = replace(thing, texture="plain")
        after = replace(before, colour=colour)
        return replace(scene, things=(before,)), replace(scene, things=(after,))


def picture_of(scene: world.Scene) -> Image.Image:
    pixels = world.paint(world.canvas([scene]))[0]
    return Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())


def mask_of(before: Image.Image, after: Image.Image) -> Image.Image:
    """White where two pictures differ, and a little around it."""
    changed = ImageChops.difference(before, after).convert("L").point(lambda value: 255 if value > 2 else 0)
    return changed.filter(ImageFilter.MaxFilter(AROUND))


def instruction(scene: world.Scene) -> str:
    """What makes a picture of a single thing into this one."""
    thing = scene.things[0]
    return f"make it {'an' if thing.colour[0] in 'aeiou' else 'a'} {thing.colour} {thing.shape}"


def make_edits(folder: Path, count: int, held: int, seed: int) -> None:
    """Write the pairs; the same bytes every time."""
    rng = random.Random(f"edits {seed}")

    def write(name: str, picture: Image.Image) -> None:
        replace_file(folder / name, partial(picture.save, format="PNG"))

    lines = []
    for i in range(count):
        before, after = sample_pair(rng)
        write(f"before/{i:03d}.png", picture_of(before))
        write(f"after/{i:03d}.png", picture_of(after))
        lines.append(json.dumps({"file_name": f"{i:03d}.png", "text": instruction(after)}))
    replace_file(folder / "after" / "metadata.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))
    for i in range(held):
        before, after = sample_pair(rng)
        pictures = picture_of(before), picture_of(after)
        for name, picture in zip(("before", "after", "mask"), (*pictures, mask_of(*pictures)), strict=True):
            write(f"held/{name}-{i}.png", picture)
        print(f"held/before-{i}.png: {instruction(after)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--held", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make_edits(args.folder, args.count, args.held, args.seed)
    print(f"{args.count} pairs in {args.folder}/before and {args.folder}/after, {args.held} more in {args.folder}/held")


if __name__ == "__main__":
    with explained():
        main()
