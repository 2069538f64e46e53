"""Find a run's best checkpoint: a grid of checkpoint, prompt and strength at one seed, scores, and the one to take.

    python infer/choose.py run=mine                          # all checkpoints that the run has kept
    python infer/choose.py run=mine 'weights=[0.7,1]' networks=hub
    python infer/choose.py run=mine take=best                # write it to runs/mine/chosen

Writes runs/<run>/choose/choice.json with its pictures, which train/page.py shows. Train with keep=5 or keep_best=3 to
have checkpoints to choose from.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from infer.choosing.settings import Choose, check_choose
from infer.program.command import run_command
from infer.program.quiet import ready
from infer.report.cells import number, text_table


def choose(options: Choose) -> Path:
    """Draw and score, or take; returns the file that was written.

    Raises:
        ValueError: something is absent or damaged.
    """
    files, device = check_choose(options)
    if options.take is not None:
        ready()
        from infer.choosing.take import best_of, write_taken

        name, reason = best_of(files) if options.take == "best" else (options.take, None)
        taken = write_taken(files, name, reason)
        print(f"{name} is {taken}{f': {reason}' if reason else ''}")
        return taken
    ready()
    from infer.choosing.draw import RESULT, draw_choice

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
    best = said["best"]
    strength = "" if best["weight"] == 1 else f" at {best['weight']:g}"
    print(
        f"best: {best['name']}{strength}, {best['reason']}\ntake it: python infer/choose.py run={options.run} take=best"
    )
    return files.folder / "choose" / RESULT


if __name__ == "__main__":
    run_command("choose", Choose, choose)
