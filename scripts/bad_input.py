"""Bad inputs of every kind through the real commands: each must end in a clear error or a named skip.

    python scripts/bad_input.py               # all cases
    python scripts/bad_input.py --only picture,caption --quick 3

Each case is made in a folder of its own and met by the command in this process: train.py, cache.py, look.py,
compare.py, save.py or the report. Right is exit code 2 with one paragraph that names what is wrong; a sample among good
ones is also met with data.on_error=skip, which must name it and go on. Wrong are a traceback, exit code 1, an input
that was changed, and a file half-written. The last line is one JSON object.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[variable] = "1"
os.environ["WANDB_MODE"] = "offline"

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from infer.program.command import run_command
from infer.program.errors import explained
from scripts.bad.case import Case, Work, judge

KINDS = ("picture", "caption", "table", "mask", "setting", "adapter", "checkpoint", "model", "report")


def cases(kind: str) -> Iterator[Case]:
    """All of a kind."""
    module: Any = importlib.import_module(f"scripts.bad.{kind}s")
    found: Iterator[Case] = module.cases()
    return found


def commands() -> dict[str, Work]:
    """Each command as a function of its arguments."""
    from infer import compare, save
    from train import cache, look, train
    from train.run import config

    def entry(name: str, schema: type[Any], work: Any, arguments: list[str]) -> None:
        sys.argv = [f"{name}.py", *arguments]
        run_command(name, schema, work)

    return {
        "train": partial(entry, "train", config.Train, train.train),
        "cache": partial(entry, "cache", cache.Fill, cache.fill),
        "look": partial(entry, "look", look.Look, look.look),
        "compare": partial(entry, "compare", compare.Compare, compare.compare),
        "save": partial(entry, "save", save.Save, save.save),
        "report": _report,
    }


def _report(arguments: list[str]) -> None:
    from infer.report import write as report

    with explained():
        report.main(arguments)


def spread(all_cases: list[Case], count: int | None) -> list[Case]:
    """Some of the cases, evenly from first to last; all if there is no count."""
    if count is None or count >= len(all_cases):
        return all_cases
    return list(islice(all_cases, 0, None, max(1, len(all_cases) // count)))[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(KINDS), help="kinds, separated by commas")
    parser.add_argument("--quick", type=int, help="so many cases of each kind")
    parser.add_argument("--name", default="", help="cases whose name holds this")
    args = parser.parse_args()
    works, start = commands(), time.monotonic()
    met, failed = Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="bad-cache-") as cache:
        for kind in args.only.split(","):
            chosen = [case for case in cases(kind) if args.name in case.name]
            assert len({case.name for case in chosen}) == len(chosen), f"two cases of {kind} have one name"
            for case in spread(chosen, args.quick):
                met[kind] += 1
                for wrong in judge(case, works[case.command], Path(cache)):
                    failed.append(f"{kind}: {case.name}: {wrong}")
                    print(f"WRONG {failed[-1]}", flush=True)
            print(f"{kind}: {met[kind]} cases", flush=True)
    figures = {"cases": met.total(), **met, "wrong": len(failed), "seconds": round(time.monotonic() - start, 1)}
    print(json.dumps(figures))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
