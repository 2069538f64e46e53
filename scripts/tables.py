"""Measure the bundled model again and write the tables of the docs that name it.

    python scripts/tables.py                    # all of them, an hour or more on two cores
    python scripts/tables.py captions gap       # some

Each table stands in its page between `<!-- NAME -->` and `<!-- /NAME -->` and is replaced there, with the date, the
device and the versions that it was measured with. The programs are the toolkit's own, their files in runs/tables. Those
of docs/methods.md are over a hundred trainings: runs that are in runs/tables/methods.jsonl, which a GPU does sooner
(`python scripts/tiny/methods.py runs/tables/methods.jsonl --workers 8`), are not done again.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.program.atomic import replace_file
from infer.program.errors import explained
from infer.program.paths import ROOT
from infer.report.markdown import plain_table
from scripts.bench_rows import read_lines
from scripts.tiny import world
from scripts.tiny.make_edits import make_edits
from scripts.tiny.make_style import make_style
from scripts.tiny.method_table import table

PRECISIONS = ("bf16", "int8", "fp4", "nf4")
LAYERS = 6  # of the sensitivity's table: those that suffer most
METHODS = ("preservation", "adapters")  # sets of scripts/tiny/methods.py
VERSIONS = ("torch", "diffusers", "transformers", "bitsandbytes")
PROMPTS = 20  # of the table of the demo's style, two seeds each


def program(*command: str) -> None:
    """One of the toolkit's programs; what it prints is seen."""
    print("python " + " ".join(command), flush=True)
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if code:
        raise SystemExit(code)  # it has said why


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def right_of(name: str, precision: str, *options: str) -> dict[str, str]:
    """Held-out captions that a bundled model draws right, by their kind."""
    file = ROOT / "runs" / "tables" / f"captions-{name}-{precision}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    program(
        "scripts/tiny/check.py", "--model", f"scripts/tiny/{name}", "--count", "400", "--precision", precision,
        "--json", str(file), *options,
    )  # fmt: skip
    return {kind: f"{right} of {of} ({right / of:.1%})" for kind, (right, of) in read(file)["right"].items()}


def captions() -> str:
    """Held-out captions drawn right, by precision."""
    found = {precision: right_of("model", precision, "--steps", "20") for precision in PRECISIONS}
    return plain_table([["precision", *found["bf16"]], *([name, *row.values()] for name, row in found.items())])


def klein() -> str:
    """The same of the bundled FLUX.2, both drawn as their checkpoints say."""
    lines = []
    for name in ("klein", "klein_distilled"):
        found = {precision: right_of(name, precision) for precision in PRECISIONS}
        lines += [[name, precision, *row.values()] for precision, row in found.items()]
    return plain_table([["model", "precision", *found["bf16"]], *lines])


def reader() -> str:
    """How often the reader is right on what was painted, by style."""
    file = ROOT / "runs" / "tables" / "reader.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    program("scripts/tiny/check.py", "--reader", "--count", "1000", "--json", str(file))
    styles = read(file)
    parts = list(next(iter(styles.values())))  # inked things' textures are not read
    return plain_table(
        [
            ["style", *parts],
            *([name, *(f"{of[p]:.1%}" if p in of else "" for p in parts)] for name, of in styles.items()),
        ]
    )


def gap() -> str:
    """The demo's style at each precision and at three mixtures."""
    style()
    program(
        "train/gap.py", "run=tables", "data.path=runs/demo-pictures", f"data.resolution={world.SIZE}",
        "data.trigger='zelk style'", "data.validation=0", "data.batch_size=4", "pictures=12",
        "only=[bf16,nf4,equal,ends,six]", "+precision@precisions.equal=auto",
        "precisions.equal.budget_gib=0.0048837662", "precisions.equal.double_quant=true",
        "+precision@precisions.six=auto", "precisions.six.budget_gib=0.006", "+precision@precisions.ends=nf4",
        "++precisions.ends.layers={x_embedder:bf16,proj_out:bf16}",
    )  # fmt: skip
    summary = [row for row in read(ROOT / "runs" / "tables" / "gap" / "gap.json")["summary"] if row["level"] is None]
    lines = [
        [
            row["precision"],
            f"{row['transformer_bytes'] / 2**20:.2f}",
            within(row["error"], 100, ".2f"),
            within(row["loss"], 1, ".4f"),
            within(row["cost"], 1, "+.4f"),
        ]
        for row in summary
    ]
    return plain_table([["precision", "transformer MiB", "velocity error %", "loss", "loss above bf16"], *lines])


def within(estimate: dict[str, float], times: float, form: str) -> str:
    """A mean with its limits."""
    mean, low, high = (format(times * estimate[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def sensitivity() -> str:
    """The layers that suffer most."""
    program("infer/sensitivity.py", "budget_gib=0.006", "out=runs/tables/six.yaml", "run=tables")
    groups = read(ROOT / "runs" / "tables" / "sensitivity.json")["groups"]
    groups.sort(key=lambda group: -group["errors"]["nf4"])
    lines = [
        [
            ", ".join([group["layers"][0], *(name.rpartition(".")[2] for name in group["layers"][1:])]),
            *(f"{100 * group['errors'][kind] ** 0.5:.2f}" for kind in ("nf4", "int8")),  # they are kept as squares
            f"{group['bytes']['nf4'] / 1024:.0f}",
        ]
        for group in groups[:LAYERS]
    ]
    return plain_table([["layers", "error %, alone NF4", "alone int8", "KiB as NF4"], *lines])


def transfer() -> str:
    """Adapters trained at one precision and run at another; five seeds, the longest of all."""
    style()
    program("train/transfer.py", "experiment=tiny_transfer")
    return (ROOT / "runs" / "transfer" / "transfer.md").read_text()


def edit() -> str:
    """The edit demo."""
    make_edits(ROOT / "runs" / "edit-pictures", 160, 6, 0)
    program("train/train.py", "experiment=edit")
    program("infer/compare.py", "experiment=edit_compare")
    rows = read(ROOT / "runs" / "edit" / "compare" / "results.json")["rows"]
    lines = []
    for precision in PRECISIONS:
        of = {bool(adapted): [r for r in rows if r["precision"] == precision and bool(r["adapter"]) == adapted]
              for adapted in (False, True)}  # fmt: skip
        cells = [f"{sum(r['scores']['right'] for r in own):.0f} of {len(own)}" for own in of.values()]
        for name in ("kept_psnr", "target_psnr"):
            cells.append(", ".join(f"{fmean(r['scores'][name] for r in own):.1f}" for own in of.values()))
        lines.append([precision, *cells])
    return plain_table(
        [
            [
                "precision",
                "right: base",
                "adapter",
                *(f"{name}, dB: base, adapter" for name in ("kept_psnr", "target_psnr")),
            ],
            *lines,
        ]
    )


def demo() -> str:
    """The demo: its own six prompts, and the README's picture."""
    style()
    program("train/train.py", "experiment=demo")
    program("infer/compare.py", "experiment=demo_compare")
    shutil.copy(ROOT / "runs" / "demo" / "compare" / "comparison.png", ROOT / "docs" / "comparison.png")
    lines = []
    for row in read(ROOT / "runs" / "demo" / "compare" / "results.json")["summary"]:
        scores, psnr = row["scores"], row["scores"]["psnr_bf16"]
        lines.append([
            row["precision"], row["adapter"] or "none", f"{row['weights_bytes'] / 2**20:.2f}", f"{row['seconds']:.3f}",
            "" if psnr is None else f"{psnr:.1f}", f"{scores['right']:.2f}", f"{scores['inked']:.2f}",
        ])  # fmt: skip
    titles = ["precision", "adapter", "weights MiB", "s/image", "PSNR to bf16", "things right", "in the style"]
    return plain_table([titles, *lines])


def style_prompts() -> list[str]:
    """Different captions of plain things, each with a pair of shape and colour that the model never saw."""
    rng, found = random.Random("style of many"), dict[str, None]()
    while len(found) < PROMPTS:
        scene = world.sample_scene(rng, held=True)
        plain = replace(scene, things=tuple(replace(thing, texture="plain") for thing in scene.things))
        found[f"zelk style, {world.describe(plain)}"] = None
    return list(found)


def style_of_many() -> str:
    """The demo's adapter on more prompts, of pairs of shape and colour that the model never saw."""
    prompts = json.dumps(style_prompts())
    program(
        "infer/compare.py", "experiment=demo_compare", "run=tables-style", f"prompts={prompts}", "seeds=[0,1]",
        "unrelated=[]",
    )  # fmt: skip
    summary = read(ROOT / "runs" / "tables-style" / "compare" / "results.json")["summary"]
    lines = [
        [row["precision"], row["adapter"] or "none", str(row["images"])]
        + [f"{row['scores'][name]:.3f}" for name in ("right", "inked")]
        for row in summary
    ]
    return plain_table([["precision", "adapter", "pictures", "things right", "in the style"], *lines])


def methods(name: str) -> str:
    """A set of scripts/tiny/methods.py, with what its runs were on."""
    file = ROOT / "runs" / "tables" / "methods.jsonl"
    program("scripts/tiny/methods.py", str(file), "--sets", name)
    rows = read_lines(file)
    own = [row for row in rows if row["set"] == name]
    places = dict.fromkeys(said(row["date"], row["card"], row["versions"]) for row in own)
    return f"{table(rows, name)}\n({'; '.join(places)}; {len(own)} runs)"


def style() -> None:
    make_style(ROOT / "runs" / "demo-pictures", 40, 0)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "reader": ("docs/bundled-model.md", reader),
    "captions": ("docs/bundled-model.md", captions),
    "klein": ("docs/bundled-model.md", klein),
    "demo": ("docs/bundled-model.md", demo),
    "style": ("docs/bundled-model.md", style_of_many),
    "sensitivity": ("docs/measurement.md", sensitivity),
    "gap": ("docs/measurement.md", gap),
    "edit": ("docs/edit-training.md", edit),
    "transfer": ("docs/measurement.md", transfer),
    **{name: ("docs/methods.md", partial(methods, name)) for name in METHODS},
}


def machine(seconds: float) -> str:
    """When, on what and with which versions a table was measured."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = {name: version(name) for name in VERSIONS}
    return f"({said(str(date.today()), device, versions)}, {seconds:.0f} s)"


def said(day: str, device: str, versions: dict[str, str]) -> str:
    return ", ".join([day, device, *(f"{name} {versions[name]}" for name in VERSIONS)])


def placed(page: str, name: str, text: str) -> str:
    """A page with what stands between the marks of `name` replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"the page has no {begin.strip()} with a {end.strip()} below it; put them around the table")
    return page[: page.index(begin) + len(begin)] + f"{text.strip()}\n" + page[page.index(end) :]


def _write(content: str, path: Path) -> None:
    path.write_text(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(TABLES)}; none: all")
    names = parser.parse_args().names or list(TABLES)
    if unknown := set(names) - set(TABLES):
        raise ValueError(f"there is no table {sorted(unknown)}; choose from {', '.join(TABLES)}")
    for name in names:
        page, measure = TABLES[name]
        placed((ROOT / page).read_text(), name, "")  # before an hour is spent
        began = time.monotonic()
        text = measure().strip()
        if name not in METHODS:  # which say for each of their runs where it was
            text += f"\n\n{machine(time.monotonic() - began)}"
        content = placed((ROOT / page).read_text(), name, text)
        replace_file(ROOT / page, partial(_write, content))
        print(f"{name}: {page}", flush=True)


if __name__ == "__main__":
    with explained():
        main()
