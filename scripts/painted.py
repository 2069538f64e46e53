"""Painted pictures for benchmarks: as many as asked for, with captions, JPEG and PNG in turn."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infer.program.atomic import replace_file

CAPTIONS = 200  # distinct ones, which the pictures share


def paint(seed: int, side: int) -> Image.Image:
    """Noise at every scale, which files keep about as badly as photographs."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side, 3), np.float32)
    for cells, weight in ((4, 60.0), (16, 30.0), (64, 12.0), (side, 3.0)):
        coarse = (rng.standard_normal((cells, cells, 3)) * 40 + 128).clip(0, 255).astype(np.uint8)
        fine = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        total += weight / 40 * (np.asarray(fine, dtype=np.float32) - 128)
    return Image.fromarray((total + 128).clip(0, 255).astype(np.uint8))


def paint_folder(folder: Path, count: int, side: int) -> None:
    """Pictures with captions, unless they are there; one paint serves 16 with another corner of it brighter."""
    wanted = {"count": count, "side": side}
    mark = folder / ".painted.json"
    if mark.is_file() and json.loads(mark.read_text()) == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    lines = []
    for i in range(count):
        if i % 16 == 0:
            base = paint(i, side)
        picture = base.copy()
        picture.paste(
            Image.new("RGB", (side // 4, side // 4), (i % 256, i // 256 % 256, 99)), (side // 16 * (i % 8), 0)
        )
        name = f"{i // 1000:03d}/{i:06d}.{'jpg' if i % 2 else 'png'}"
        options: dict[str, Any] = {"quality": 92} if i % 2 else {"compress_level": 1}
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name, **options)
        lines.append(json.dumps({"file_name": name, "text": f"a painted noise of the kind number {i % CAPTIONS}"}))
    replace_file(folder / "metadata.jsonl", lambda path: path.write_text("\n".join(lines) + "\n"))
    mark.write_text(json.dumps(wanted))


def part_of(folder: Path, whole: Path, count: int) -> None:
    """The first pictures of a folder once more, as hard links."""
    shutil.rmtree(folder, ignore_errors=True)
    lines = (whole / "metadata.jsonl").read_text().splitlines()[:count]
    for name in (json.loads(line)["file_name"] for line in lines):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(whole / name, folder / name)
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
