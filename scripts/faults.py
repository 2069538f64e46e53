"""Faults of the disk at every place where something is written: the last good state stays, and the run goes on after.

    nice python scripts/faults.py             # all
    python scripts/faults.py --quick          # some of each

Three parts. Writes: each kind of file (checkpoint, adapter, shards of cache and index, results, config) is written
over a good state while the n-th operation on the disk fails (open, write half-way, fsync, mkdir, rename, unlink), for
every n and five errors (ENOSPC, EDQUOT, EIO, EROFS, EACCES), once or from then on; what is read afterwards must be the
old state or the new one, the error one that a user is told how to mend, and the write after it right. Damage: files are
cut at several places and bits of them flipped; what is read must be a whole state or be refused. Runs: train.py,
cache.py and compare.py meet a fault at operations all over the run; they must end with exit code 2 and one paragraph,
and the same command must then end with the result of a run that met none. The last line is one JSON object.
"""

import argparse
import errno
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from infer.program.errors import MEND, reason
from scripts.bad.case import inside, meet
from scripts.fault.disk import FAULTS, Disk
from scripts.fault.jobs import Job, clear, jobs, prepare
from scripts.fault.things import Thing, things


class Matrix:
    """What was tried, and what was wrong with it."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.counts = Counter[str]()
        self.wrong: list[str] = []

    def report(self, what: str, said: str) -> None:
        self.wrong.append(f"{what}: {said}")

    def writes(self, thing: Thing) -> None:
        """Every operation of a write fails once."""
        states = {state: self.state(thing, state) for state in (1, 2)}
        with tempfile.TemporaryDirectory(prefix="fault-") as name:
            folder = Path(name)
            thing.write(folder, 1)
            with Disk(folder).mounted() as disk:
                thing.write(folder, 2)
        count = len(disk.log)
        for number in (errno.ENOSPC, errno.EIO) if self.quick else FAULTS:
            for lasting in (False, True):
                for at in range(1, count + 1, max(1, count // 4) if self.quick else 1):
                    what = (
                        f"{thing.name}, {errno.errorcode[number]} {'from' if lasting else 'at'} {disk.log[at - 1]} {at}"
                    )
                    self.write(thing, Disk(Path(), number, at, lasting), states, what)

    def state(self, thing: Thing, state: int) -> Any:
        """What is read after a write that meets no fault."""
        with tempfile.TemporaryDirectory(prefix="fault-") as name:
            thing.write(Path(name), state)
            return thing.read(Path(name))

    def write(self, thing: Thing, disk: Disk, states: dict[int, Any], what: str) -> None:
        with tempfile.TemporaryDirectory(prefix="fault-") as name:
            folder = disk.folder = Path(name).resolve()
            thing.write(folder, 1)
            raised = None
            with disk.mounted():
                try:
                    thing.write(folder, 2)
                except Exception as error:
                    raised = error
            if not disk.failed:
                return
            self.counts["faults"] += 1
            if raised is not None and reason(raised) is None:
                self.report(what, f"{type(raised).__name__} is no error for a user: {raised}")
            try:
                found = thing.read(folder)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if found not in states.values():
                self.report(what, f"the state after it is {str(found)[:200]}")
            if raised is None and found != states[2]:
                self.report(what, "it said nothing and kept the old state")
            self.write_again(thing, folder, states, what)

    def write_again(self, thing: Thing, folder: Path, states: dict[int, Any], what: str) -> None:
        """With the fault gone, the newer state is written and read."""
        try:
            try:
                thing.write(folder, 2)
            except ValueError as error:
                if thing.mend is None or thing.mend not in str(error):
                    raise
                for file in thing.files(folder):
                    file.unlink()
                thing.write(folder, 2)
            found = thing.read(folder)
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found != states[2]:
            self.report(what, f"the next write gives {str(found)[:200]}")

    def damage(self, thing: Thing, rng: random.Random) -> None:
        """The newest state's bytes are cut or changed."""
        states = {state: self.state(thing, state) for state in (1, 2)}
        with tempfile.TemporaryDirectory(prefix="fault-") as name:
            folder = Path(name)
            for state in (1, 2):
                thing.write(folder, state)
            whole = {file.relative_to(folder): file.read_bytes() for file in thing.files(folder)}
            saved = folder.with_name(f"{folder.name}-saved")
            shutil.copytree(folder, saved)
            try:
                for file, content in whole.items():
                    size = len(content)
                    cuts = sorted({0, 1, 7, 8, size // 2, size - 1} - {size})
                    flips = sorted(rng.sample(range(size), min(size, 6 if self.quick else 60)))
                    for cut in cuts[:: 2 if self.quick else 1]:
                        self.broken(thing, folder, saved, file, content[:cut], states, f"cut to {cut} of {size}")
                    for place in flips:
                        changed = bytearray(content)
                        changed[place] ^= 1 << rng.randrange(8)
                        self.broken(thing, folder, saved, file, bytes(changed), states, f"bit of byte {place} flipped")
            finally:
                shutil.rmtree(saved)

    def broken(
        self, thing: Thing, folder: Path, saved: Path, file: Path, content: bytes, states: dict[int, Any], how: str
    ) -> None:
        for old in folder.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        (folder / file).write_bytes(content)
        what = f"{thing.name}, {file} {how}"
        self.counts["damages"] += 1
        try:
            found = thing.read(folder)
        except Exception as error:
            found = error
        if isinstance(found, Exception):
            self.counts["refused"] += 1
            if thing.older:
                self.report(what, f"the older state is not taken: {type(found).__name__}: {found}")
        elif found == states[1]:
            self.counts["fell_back"] += 1
        elif found == states[2]:
            self.counts["same"] += 1  # where it does not matter, such as the time of a shard
        elif thing.checked:
            self.report(what, f"it is read as {str(found)[:200]}")
        else:
            self.counts["unnoticed"] += 1
        self.write_again(thing, folder, states, what)

    def runs(self, job: Job, rng: random.Random, count: int) -> None:
        """A command meets a fault somewhere, and then again none."""
        with tempfile.TemporaryDirectory(prefix="fault-") as name, inside(Path(name)):
            prepare(Path(job.name))
            with inside(Path(job.name)):
                with Disk(Path()).mounted() as disk:
                    outcome = meet(lambda _: job.run(), [])
                assert outcome.code == 0, outcome.said
                expected, total = job.result(), len(disk.log)
                # spread over the whole run, another error each time
                places = [rng.randrange(total * i // count, total * (i + 1) // count) + 1 for i in range(count)]
                for i, at in enumerate(places):
                    clear()
                    number = list(FAULTS)[i % len(FAULTS)]
                    broken = Disk(Path(), number, at, lasting=i % 2 == 1)
                    what = f"{job.name}, {errno.errorcode[number]} at operation {at} of {total} ({disk.log[at - 1]})"
                    with broken.mounted():
                        outcome = meet(lambda _: job.run(), [])
                    self.counts["run_faults"] += bool(broken.failed)
                    paragraphs = [line for line in outcome.said.split("\n") if line.startswith("error: ")]
                    if outcome.code != (MEND if broken.failed else 0) and not (outcome.code == 0 and not paragraphs):
                        self.report(what, f"exit code {outcome.code}: {outcome.said[-400:]}")
                    if outcome.code and len(paragraphs) != 1:
                        self.report(what, f"{len(paragraphs)} paragraphs: {outcome.said[-400:]}")
                    said = job.check()
                    if said:
                        self.report(what, said)
                    outcome = meet(lambda _: job.run(), [])
                    if outcome.code != 0:
                        self.report(what, f"then it does not go on: {outcome.said[-400:]}")
                    elif job.result() != expected:
                        self.report(what, "then its result differs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="some of each part")
    parser.add_argument("--runs", type=int, default=20, help="faults in runs of each command")
    parser.add_argument("--only", default="writes,damage,runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, matrix = time.monotonic(), Matrix(args.quick)
    for thing in things():
        if "writes" in args.only:
            matrix.writes(thing)
        if "damage" in args.only:
            matrix.damage(thing, random.Random(f"{args.seed} {thing.name}"))
        print(
            f"{thing.name}: {matrix.counts['faults']} faults and {matrix.counts['damages']} damages so far", flush=True
        )
    for job in jobs() if "runs" in args.only else []:
        matrix.runs(job, random.Random(f"{args.seed} {job.name}"), 2 if args.quick else args.runs)
        print(f"{job.name}: {matrix.counts['run_faults']} faults in runs so far", flush=True)
    for line in matrix.wrong:
        print(f"WRONG {line}")
    names = ("faults", "damages", "fell_back", "refused", "same", "unnoticed", "run_faults")
    figures = {name: matrix.counts[name] for name in names}
    print(json.dumps(figures | {"wrong": len(matrix.wrong), "seconds": round(time.monotonic() - began, 1)}))
    return 1 if matrix.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
