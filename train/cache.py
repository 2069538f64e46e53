"""Encode ahead of time what training would encode at its start.

    python train/cache.py model=dev precision=nf4 data.path=my_pictures data.resolution=512

fills the cache (train/latents/build.py); several GPUs share the work under `accelerate launch`, and prune=true then
removes all else and says what; force=true what other runs have used too. json=true prints the counts as JSON too.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.checkpoint.fingerprint import MEMORY
from infer.checkpoint.headers import check_model
from infer.checkpoint.model import Model
from infer.device.device import check_device_name, pick_device
from infer.program.command import run_command
from infer.program.no_effect import refuse_idle
from infer.program.quiet import ready
from infer.program.remembered import forget
from infer.quantize.precision import Precision
from train.data.dataset import Data
from train.data.samples import check_left, read_samples
from train.latents.settings import Encode

if TYPE_CHECKING:
    from train.latents.store import Cache


@dataclass
class Fill:
    """What to encode ahead of training, and whether to remove the rest."""

    model: Model = field(default_factory=Model)
    precision: Precision = field(default_factory=Precision)
    data: Data = field(default_factory=Data)
    encode: Encode = field(default_factory=Encode)
    previews: list[str] = field(default_factory=list)
    """Further texts: the prompts of the run's previews."""
    prune: bool = False
    """Remove what this config does not use, while nobody else uses the cache. It is named, and nothing goes that other
    runs have used, without `force`."""
    force: bool = False
    """With prune, remove what other runs have used too: they will encode it again."""
    recheck: bool = False
    """Read all weights, pictures and encodings again, though their files are as they were when they were last read."""
    json: bool = False
    """Print the counts as JSON too, as the last line."""
    device: str = "auto"
    """auto (the GPU if there is one), cpu, cuda or cuda:1."""

    def __post_init__(self) -> None:
        if not self.prune:
            refuse_idle(self, "", ("force",), "prune is false, so nothing is removed")


def summary(cache: Cache) -> list[str]:
    """What was found and what was encoded, for people: a line each."""
    lines = []
    for kind, what in (("pictures", "views of pictures"), ("masks", "views of masks"), ("texts", "texts")):
        hits, misses = cache.counts[f"{kind}_hits"], cache.counts[f"{kind}_misses"]
        if hits + misses:
            took = f" in {cache.seconds[kind]:.1f} s" if kind in cache.seconds else ""
            lines.append(f"{what}: {hits:,} were there, {misses:,} encoded{took}")
    lines.append(f"texts of which the text encoder does not see the end: {len(cache.truncated):,}")
    return lines


def fill(options: Fill) -> dict[str, int]:
    """Build, prune if asked, and print what there is."""
    check_device_name(options.device)
    check_model(options.model)
    data = options.data
    if options.recheck:
        for folder in (MEMORY, Path(data.cache)):
            forget(folder)
    samples, skipped = read_samples(data)
    check_left(data, samples, skipped)
    ready()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from infer.rounding.layer_errors import decide
    from train.data.caption import all_texts
    from train.latents.build import build
    from train.latents.prior import prior_samples
    from train.latents.prune import folders_used, prune_cache

    device = pick_device(options.device)
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1:
        device = state.device
    rank, ranks, main = state.process_index, state.num_processes, state.is_main_process
    precision = decide(options.model, options.precision, device, print) if data.prior.count else options.precision
    samples += prior_samples(data, options.model, precision, device, rank, ranks)
    state.wait_for_everyone()
    texts = [*all_texts(samples, data), *options.previews]
    here = device, rank, ranks, gather_object
    cache = build(data, samples, texts, options.model, options.precision, options.encode, *here)
    skipped += cache.skipped
    check_left(data, [samples[i] for i in cache.kept], skipped)
    counts = dict(cache.counts)
    cache.close()
    state.wait_for_everyone()
    if options.prune and main:
        prune_cache(cache, folders_used(data, options.model, options.precision), options.force, print)
    state.wait_for_everyone()
    figures = {
        "samples": len(cache.kept),
        "image_hits": counts["pictures_hits"],
        "image_misses": counts["pictures_misses"],
        "text_hits": counts["texts_hits"],
        "text_misses": counts["texts_misses"],
        "bytes": sum(file.stat().st_size for file in Path(data.cache).rglob("*") if file.is_file()),
        "skipped": len(skipped),
    }
    if main:
        for one in skipped:
            print(f"skipped: {one.name} {one.reason}")
        for text in cache.truncated:
            print(f"the text encoder does not see the end of {text!r}")
        for line in summary(cache):
            print(line)
        if options.json:
            print(json.dumps(figures))
    state.destroy_process_group()
    return figures


if __name__ == "__main__":
    run_command("cache", Fill, fill)
