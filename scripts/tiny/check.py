"""Read a picture of the small world back: what is drawn, in which colour, and does it match its caption?

What is drawn is read by scripts/tiny/reader.py.

    python scripts/tiny/check.py --count 200          # held-out captions through the bundled model, bf16
    python scripts/tiny/check.py --precision nf4      # the same at another precision
    python scripts/tiny/check.py --reader             # the reader itself, on 1,000 pictures that were painted
"""

import argparse
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from scripts.tiny import world
from scripts.tiny.reader import LEAST_FIT, Reading, read


@dataclass(frozen=True)
class Wanted:
    """What a caption asks for: shape-colour pairs with their counts, and the rest where it was said."""

    pairs: Counter[tuple[str, str]]
    textures: Counter[tuple[str, str, str]]
    """The same with what each is made of; plain where that is not said."""
    order: tuple[tuple[str, str], ...]
    background: str | None
    place: str | None
    relation: str | None


def parse(caption: str) -> Wanted:
    """Caption -> what it asks for.

    Raises:
        ValueError: the caption names no shape with a colour.
    """
    text = caption.lower()
    singles = {name: name for name in world.SHAPES} | {world.plural(name): name for name in world.SHAPES}
    numbers = {word: count for count, word in world.COUNTS.items()}
    pattern = (
        rf"\b(?:(a|an|{'|'.join(numbers)}) )?(?:(?:{'|'.join(world.SIZES)}) )?(?:({'|'.join(world.TEXTURES)}) )?"
        rf"({'|'.join(world.COLOURS)}) ({'|'.join(sorted(singles, key=len, reverse=True))})\b"
    )
    found = [(numbers.get(m[1] or "", 1), singles[m[4]], m[3], m[2] or "plain") for m in re.finditer(pattern, text)]
    if not found:
        raise ValueError(
            f"caption {caption!r} names nothing of the small world; say a colour of {list(world.COLOURS)} "
            f"and a shape of {list(world.SHAPES)}, as in 'a red star'"
        )
    pairs: Counter[tuple[str, str]] = Counter()
    textures: Counter[tuple[str, str, str]] = Counter()
    for count, shape, colour, texture in found:
        pairs[shape, colour] += count
        textures[shape, colour, texture] += count
    background = re.search(rf"on an? ({'|'.join(world.BACKGROUNDS)}) background", text)
    places = [place for place in sorted(world.PLACES, key=len, reverse=True) if place in text]
    relations = [word for word in ("to the left of", "to the right of", "above", "below") if word in text]
    return Wanted(
        pairs,
        textures,
        tuple((shape, colour) for _, shape, colour, _ in found),
        background[1] if background else None,
        places[0] if places and not relations else None,
        relations[0] if relations else None,
    )


def compare(wanted: Wanted, reading: Reading) -> dict[str, bool]:
    """Which parts of the caption the picture honours; `right` is what counts: every thing's shape and colour."""
    things = [thing for thing in reading.things if thing.fit >= LEAST_FIT]
    seen = Counter((thing.shape, thing.colour) for thing in things)
    result = {
        "right": seen == wanted.pairs and len(things) == len(reading.things),
        "count": len(reading.things) == sum(wanted.pairs.values()),
        "shape": Counter(t.shape for t in things) == _marginal(wanted.pairs, 0),
        "colour": Counter(t.colour for t in things) == _marginal(wanted.pairs, 1),
        "inked": bool(reading.things) and all(thing.inked for thing in reading.things),
    }
    if result["right"] and not any(thing.inked for thing in things):
        result["texture"] = Counter((t.shape, t.colour, t.texture) for t in things) == wanted.textures
    if wanted.background is not None:
        result["background"] = reading.background == wanted.background
    if wanted.place is not None and len(reading.things) == 1:
        x, y = world.PLACES[wanted.place]
        result["place"] = abs(reading.things[0].x - x) < 0.1 and abs(reading.things[0].y - y) < 0.1
    if wanted.relation is not None and result["right"] and len(things) == 2:
        first, second = (next(t for t in things if (t.shape, t.colour) == pair) for pair in wanted.order)
        result["relation"] = {
            "to the left of": first.x < second.x - 0.1,
            "to the right of": first.x > second.x + 0.1,
            "above": first.y < second.y - 0.1,
            "below": first.y > second.y + 0.1,
        }[wanted.relation]
    return result


def _marginal(pairs: Counter[tuple[str, str]], axis: int) -> Counter[str]:
    return Counter(pair[axis] for pair in pairs.elements())


def right(image: Image.Image, prompt: str) -> float:
    """Score for `compare`: 1.0 where every thing of the prompt is drawn in its shape and colour, else 0.0."""
    return float(compare(parse(prompt), read(image))["right"])


def inked(image: Image.Image, prompt: str) -> float:
    """Score for `compare`: the share of things with a black line around them, the style of the demo's pictures."""
    things = read(image).things
    return sum(thing.inked for thing in things) / len(things) if things else 0.0


def tally(results: list[dict[str, bool]]) -> dict[str, float]:
    """Share of pictures that honour each part, over those whose caption says it."""
    keys = dict.fromkeys(key for result in results for key in result)
    return {key: sum(r[key] for r in results if key in r) / sum(key in r for r in results) for key in keys}


def held_out_captions(count: int, seed: int = 0) -> list[str]:
    """Captions with everything said, each with a shape-colour pair that the bundled model never saw."""
    rng = random.Random(f"held out {seed}")
    return [world.describe(world.sample_scene(rng, held=True)) for _ in range(count)]


def check_reader(count: int, style: str) -> dict[str, float]:
    """The reader against pictures whose content is known."""
    rng = random.Random(5)
    scenes = [world.sample_scene(rng, held=i % 2 == 0) for i in range(count)]
    results = []
    for scene in scenes:
        painted = world.paint(world.canvas([scene], style))[0]
        picture = Image.fromarray((painted.permute(1, 2, 0) * 255).round().byte().numpy())
        results.append(compare(parse(world.describe(scene)), read(picture)))
    return tally(results)


def check_model(
    path: Path,
    captions: list[str],
    steps: int | None,
    guidance: float | None,
    sheet: Path | None,
    precision: str = "bf16",
) -> list[dict[str, bool]]:
    """Draw the captions with the model at `path`, seed 0 upwards, and read the pictures back.

    steps, guidance: None takes the checkpoint's own.
    """
    from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
    from infer.checkpoint.model import Model
    from infer.device.device import pick_device
    from infer.quantize.precision import Precision
    from infer.sample.encode import decode, drawn_texts, text_encoder
    from infer.sample.generate import Sampling, draw, settled

    model, kind, device = Model(str(path)), Precision(precision), pick_device("auto")
    sampling, size = settled(Sampling(steps, guidance), model), (world.SIZE, world.SIZE)
    with text_encoder(model, kind, device, None) as encoder:
        texts = drawn_texts(model, encoder, captions)
    transformer, scheduler, vae = load_transformer(model, kind, device), load_scheduler(model), load_vae(model, device)
    tiles = [
        decode(vae, draw(transformer, scheduler, text, seed, sampling, size, device), *size)
        for seed, text in enumerate(texts)
    ]
    results = [compare(parse(caption), read(image)) for caption, image in zip(captions, tiles, strict=True)]
    for caption, result in zip(captions, results, strict=True):
        if not result["right"]:
            print("wrong:", caption, {key for key, value in result.items() if not value and key != "inked"})
    if sheet is not None:
        columns = 20
        board = Image.new("RGB", (columns * world.SIZE, -(-len(tiles) // columns) * world.SIZE))
        for i, tile in enumerate(tiles):
            board.paste(tile, (i % columns * world.SIZE, i // columns * world.SIZE))
        board.save(sheet)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="captions (with --reader: pictures)")
    parser.add_argument("--reader", action="store_true", help="check the reader on painted pictures instead")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model")
    parser.add_argument("--precision", default="bf16", help="bf16, int8, fp4 or nf4")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--steps", type=int, help="else the checkpoint's own")
    parser.add_argument("--guidance", type=float, help="else the checkpoint's own")
    parser.add_argument("--sheet", type=Path, help="write all pictures as one PNG here")
    args: Any = parser.parse_args()
    if args.reader:
        styles = {style: check_reader(args.count, style) for style in ("plain", "inked")}
        for style, shares in styles.items():
            print(style, {key: round(value, 4) for key, value in shares.items()})
        if args.json is not None:
            args.json.write_text(json.dumps(styles) + "\n")
        return
    captions = held_out_captions(args.count)
    results = check_model(args.model, captions, args.steps, args.guidance, args.sheet, args.precision)
    pairs = [parse(caption).relation is not None for caption in captions]
    counts = {}
    for name, kinds in (
        ("all", (True, False)),
        ("one thing, or several of a kind", (False,)),
        ("two different things", (True,)),
    ):
        chosen = [result for result, pair in zip(results, pairs, strict=True) if pair in kinds]
        right = sum(result["right"] for result in chosen)
        counts[name] = [right, len(chosen)]
        print(f"{name}: {right} of {len(chosen)} right", {k: round(v, 3) for k, v in tally(chosen).items()})
    if args.json is not None:
        args.json.write_text(json.dumps({"precision": args.precision, "right": counts}) + "\n")


if __name__ == "__main__":
    main()
