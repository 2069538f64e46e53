"""What every benchmark here does alike: workers in processes of their own, rows as JSON lines, a table for people.

A row has `name`, `unit`, `target`, `measured`, `card`, `date`, `versions` and `command`, and whatever else was seen.
"""

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from infer.device.allocator import prepare
from infer.program.atomic import replace_file
from infer.program.paths import ROOT
from scripts.bench_gang import run_gang

Row = dict[str, Any]
LIBRARIES = ("torch", "triton", "diffusers", "transformers", "bitsandbytes", "peft", "accelerate")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def circumstances(device: torch.device) -> Row:
    """Where and when a figure comes from."""
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT)) if script.is_relative_to(ROOT) else script.name
    command = " ".join(["python", name, *sys.argv[1:]]).split(" --out ")[0]
    return {
        "card": card(device),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
        "command": command,
    }


def make_row(name: str, unit: str, measured: float | None, target: str | None, source: Row, **more: Any) -> Row:
    """target: such as '<= 9.0' or '>= 2.0', None where nothing was set; source: what the figure was taken from."""
    place = {key: source[key] for key in ("card", "date", "versions", "command")}
    return {"name": name, "unit": unit, "target": target, "measured": measured, **place, **more}


def met(row: Row) -> str:
    """yes, no, or nothing where there is no target."""
    if row["target"] is None:
        return ""
    if row["measured"] is None:
        return "no"
    sign, bound = row["target"].split()
    return "yes" if (row["measured"] <= float(bound) if sign == "<=" else row["measured"] >= float(bound)) else "no"


def table(rows: Iterable[Row]) -> str:
    lines = [("name", "measured", "unit", "target", "met")]
    for row in rows:
        value = row.get("error", "failed")[:60] if row["measured"] is None else f"{row['measured']:.4g}"
        lines.append((row["name"], value, row["unit"], row["target"] or "", met(row)))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def run_workers(
    script: Path,
    groups: list[list[str]],
    out: Path,
    seconds: float,
    flags: list[str],
    needs: list[float] | None = None,
    space: float = 1.0,
) -> None:
    """Run each group of variants in a process; each appends its results to `out`, one JSON line a variant.

    needs: of `space`, what each group takes; groups run side by side as far as it lasts. Without it, one after another.
    A process that dies or is late loses the variant it was at, which is recorded, and the rest of its group goes to a
    new process.
    """
    waiting = [(list(group), need) for group, need in zip(groups, needs or [space] * len(groups), strict=True)]
    running: list[tuple[subprocess.Popen[bytes], list[str], float, float]] = []
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
    while waiting or running:
        taken = sum(need for _, _, need, _ in running)
        fitting = [entry for entry in waiting if not running or taken + entry[1] <= space]
        if fitting:
            waiting.remove(fitting[0])
            group, need = fitting[0]
            command = [sys.executable, str(script), *flags, "--out", str(out), "--worker", *group]
            running.append((subprocess.Popen(command), group, need, time.monotonic()))
            continue
        for entry in list(running):
            process, group, need, start = entry
            code = process.poll()
            if code is None and time.monotonic() - start > seconds:
                process.kill()
                code = process.wait()
            if code is None:
                continue
            running.remove(entry)
            done = {line["variant"] for line in read_lines(out)}
            left = [name for name in group if name not in done]
            if left:
                note_lost(out, left[0], code)
                if left[1:]:
                    waiting.insert(0, (left[1:], need))
        time.sleep(0.2)


def run_gangs(
    script: Path,
    names: list[str],
    out: Path,
    seconds: float,
    needs: Callable[[str], float],
    space: float,
) -> None:
    """Run each variant in a process of its own: those that the card holds together load and compile side by side, and
    are then timed one after another.

    needs: GiB of a variant, of `space`. seconds: for loading and compiling; as much again for the timing of all.
    """
    gangs: list[list[str]] = []
    for name in names:
        room = next((gang for gang in gangs if sum(map(needs, [*gang, name])) <= space), None)
        if room is None:
            gangs.append([name])
        else:
            room.append(name)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.touch()
    for gang in gangs:
        with tempfile.TemporaryDirectory() as folder:
            together = ["--together", f"{space:g}"]  # which the rows' command then names
            start = [sys.executable, str(script), *together, "--out", str(out), "--gang", folder, "--worker"]
            running = {name: subprocess.Popen([*start, name]) for name in gang}
            try:
                run_gang(running, Path(folder), seconds)
            finally:
                for process in running.values():
                    process.kill()
                    process.wait()
        done = {line["variant"] for line in read_lines(out)}
        for name, process in running.items():
            if name not in done:
                note_lost(out, name, process.returncode)


def note_lost(out: Path, name: str, code: int) -> None:
    """Record that the process which was to measure a variant ended without saying anything of it."""
    error = f"the process ended with code {code}"
    append(out, {"variant": name, "error": error, **circumstances(torch.device("cpu"))})


def append(file: Path, line: Row) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def read_lines(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def attempt(name: str, out: Path, device: torch.device, work: Callable[[], Row]) -> bool:
    """Append what the work gives, or why it failed; False after an error from which the device may not recover."""
    line: Row = {"variant": name, **circumstances(device)}
    try:
        line |= work()
    except torch.OutOfMemoryError as error:
        line["error"] = f"out of memory: {str(error).split('.')[0]}"
    except Exception as error:  # one variant's defect must not cost the others their turn; the row says it
        traceback.print_exc()
        line["error"] = f"{type(error).__name__}: {error}"
    append(out, line)
    return "CUDA error" not in line.get("error", "")


def write_rows(rows: list[Row], file: Path) -> None:
    """The rows into a file, in place of what it held, and as a table onto the screen."""
    replace_file(file, lambda path: path.write_text("".join(json.dumps(row) + "\n" for row in rows)))
    print(table(rows))


def command(
    script: Path,
    doc: str,
    names: list[str],
    groups: Callable[[list[str]], list[list[str]]],
    worker: Callable[[list[str], Path, Path | None], None],
    rows_of: Callable[[dict[str, Row]], list[Row]],
    needs: Callable[[str], float],
) -> None:
    """A benchmark's command line: measure the variants, or make the rows of what was seen before.

    groups: variants that share a process; worker: measures some within it; rows_of: what was seen, by variant -> rows;
    needs: GiB of a variant.
    """
    prepare()
    kind = script.stem.removeprefix("bench_")
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="VARIANT")
    seen, rows = (Path(f"runs/bench/{kind}{end}.jsonl") for end in ("-seen", ""))
    parser.add_argument("--seen", type=Path, default=seen, help="what was seen, by variant")
    parser.add_argument("--rows", type=Path, default=rows, help="the rows")
    parser.add_argument("--seconds", type=float, default=300, help="for one process")
    together = "variants load and compile side by side as far as so many GiB hold them, and are timed one by one"
    parser.add_argument("--together", type=float, metavar="GIB", help=together)
    parser.add_argument("--report", action="store_true", help="make the rows of what was seen before; no GPU is needed")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--gang", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.out, options.gang)
        return
    if not options.report:
        if not torch.cuda.is_available():
            sys.exit("error: this measures a GPU, and torch sees none")
        options.seen.unlink(missing_ok=True)
        if options.together is None:
            run_workers(script, groups(options.only), options.seen, options.seconds, [])
        else:
            run_gangs(script, options.only, options.seen, options.seconds, needs, options.together)
    write_rows(rows_of({line["variant"]: line for line in read_lines(options.seen)}), options.rows)
