"""Kill training, cache builds and comparisons at random moments, and see that nothing is lost.

    nice python scripts/soak.py --kills 200
    python scripts/soak.py --kills 3 --seed 1            # a quick look

One process imports the libraries once and forks a child for every start, so that a restart costs a fork and not the
ten seconds of imports; all else is as in a process of its own. A child runs the real command on the bundled model and
gets SIGKILL after a random time, evenly drawn from its start to about the time that a run takes; then the same
command starts again, until it ends by itself. Half of the kills are of training (from the first byte of the cache to
the last of the adapter), a quarter of cache builds, a quarter of comparisons. After every kill what is there must be
whole, and at the end everything must equal the undisturbed run's: the adapter bit for bit, every encoding, every
picture. The last line is one JSON object.
"""

import argparse
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

from scripts.bad.case import inside
from scripts.fault.jobs import Job, clear, jobs, prepare, start, wait

COUNTED = ("kills", "finished", "lost", "differing", "broken", "left")


class Soak:
    """The kills of one job."""

    def __init__(self, job: Job, kills: int, rng: random.Random) -> None:
        self.job, self.kills, self.rng = job, kills, rng
        self.counts = Counter[str]()
        self.wrong: list[str] = []

    def undisturbed(self) -> dict[str, str]:
        """The result of a run that nobody kills; it also says how long one takes."""
        began = time.monotonic()
        code = wait(start(self.job))
        assert code == 0, f"{self.job.name} ended with {code} undisturbed: {Path('log.txt').read_text()[-2000:]}"
        self.seconds = time.monotonic() - began
        return self.job.result()

    def run(self) -> None:
        with inside(Path(self.job.name)):
            expected = self.undisturbed()
            clear()
            while self.counts["kills"] < self.kills:
                began = time.monotonic()
                code = wait(start(self.job), self.rng.uniform(0, self.seconds))
                # other work on the machine comes and goes: follow it, so that about half are killed in time
                took = time.monotonic() - began
                self.seconds = 1.1 * self.seconds if code is None else (self.seconds + took) / 2
                if code is None:
                    self.counts["kills"] += 1
                    if self.counts["kills"] % 10 == 0:
                        print(f"{self.job.name}: {self.counts['kills']} kills", flush=True)
                    self.look("after a kill", self.job.check)
                else:
                    self.finish(code, expected)
            self.finish(wait(start(self.job)) or 0, expected)

    def finish(self, code: int, expected: dict[str, str]) -> None:
        """A run came to its end: compare it with the undisturbed one, and begin another."""
        self.counts["finished"] += 1
        if code != 0:
            self.counts["lost"] += 1
            self.wrong.append(f"{self.job.name} ended with {code}: {Path('log.txt').read_text()[-600:]}")
        else:
            self.look("at the end", self.job.check)
            made = self.job.result()
            if made != expected:
                self.counts["differing"] += 1
                other = [name for name in expected.keys() | made.keys() if made.get(name) != expected.get(name)]
                self.wrong.append(f"{self.job.name}: {len(other)} results differ, such as {other[0]}")
            left = [str(path) for path in Path().rglob("*.partial")]
            self.counts["left"] += len(left)
            self.wrong += [f"{self.job.name}: {path} is left over" for path in left]
        clear()

    def look(self, when: str, check: Callable[[], str | None]) -> None:
        try:
            said = check()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        if said:
            self.counts["broken"] += 1
            self.wrong.append(f"{self.job.name} {when}: {said}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="train,cache,compare")
    args = parser.parse_args()
    began, figures, wrong = time.monotonic(), Counter[str](), []
    gc.freeze()  # a child's collections need not look at what the imports made
    chosen = [job for job in jobs() if job.name in args.only.split(",")]
    shares = sum(job.share for job in chosen)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, inside(Path(folder)):
        for job in chosen:
            prepare(Path(job.name))
            kills = max(1, round(args.kills * job.share / shares))
            soak = Soak(job, kills, random.Random(f"{args.seed} {job.name}"))
            soak.run()
            figures.update(soak.counts)
            figures[f"{job.name}_kills"] = soak.counts["kills"]
            wrong += soak.wrong
            counts = ", ".join(f"{soak.counts[name]} {name}" for name in COUNTED)
            print(f"{job.name}: {counts}", flush=True)
    for line in wrong:
        print(f"WRONG {line}")
    names = [*COUNTED, *(f"{job.name}_kills" for job in chosen)]
    print(json.dumps({name: figures[name] for name in names} | {"seconds": round(time.monotonic() - began, 1)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
