"""Find a run's best checkpoint: a grid of checkpoint, prompt and strength at one seed, scores, and the one to take.

    python infer/choose.py run=mine                          # all checkpoints that the run has kept
    python infer/choose.py run=mine 'weights=[0.7,1]' networks=hub
    python infer/choose.py run=mine take=best                # write it to runs/mine/chosen

Writes runs/<run>/choose/choice.json with its pictures, which train/page.py shows. Train with keep=5 or keep_best=3 to
have checkpoints to choose from.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.choosing.run import RESULT
from infer.choosing.settings import Choose, check_choose, check_named
from infer.program.command import run_command
from infer.program.quiet import ready
from infer.report.cells import number, text_table


def choose(options: Choose) -> Path:
    """Draw and score, or take; returns the file that was written.

    Raises:
        ValueError: something is absent or damaged.
    """
    if options.take is not None:
        files = check_named(options)
        ready()
        from infer.choosing.take import best_of, write_taken

        name, reason = options.take, ""
        if name == "best":
            name, reason, files = best_of(files, options.average)
        taken = write_taken(files, name, reason or None)
        what = f"the averaged weights of {name} are" if files.average else f"{name} is"
        print(f"{what} {taken}{f': {reason}' if reason else ''}")
        return taken
    if options.resident:
        from infer.resident.ask import ask

        files = check_named(options)
        ask("choose", options)
        said = json.loads((files.folder / "choose" / RESULT).read_bytes())
    else:
        files, device = check_choose(options)
        ready()
        from infer.choosing.draw import draw_choice

        said = draw_choice(options, files, device)
    titles = {
        "validation": "held-out loss",
        "drift": "drift",
        "change": "change",
        "nearest": "nearest",
        "likeness": "likeness",
    }
    lines = [["checkpoint", "strength", *titles.values()]]
    for entry in said["entries"]:
        figures = [entry[key] for key in titles]
        lines.append([entry["name"], f"{entry['weight']:g}", *("" if x is None else number(x) for x in figures)])
    print(text_table(lines))
    if said["average"]:
        print("drawn and judged are the averaged weights of each; average=false takes the weights themselves")
    best = said["best"]
    strength = "" if best["weight"] == 1 else f" at {best['weight']:g}"
    print(
        f"best: {best['name']}{strength}, {best['reason']}\ntake it: python infer/choose.py run={options.run} take=best"
    )
    return files.folder / "choose" / RESULT


if __name__ == "__main__":
    run_command("choose", Choose, choose)
