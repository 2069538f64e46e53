"""How long each stage may last, how many steps it takes, at which rate, and what it says; a step as a CUDA graph."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

MEASURED = 60  # steps from whose time the number of steps is found


class Clock:
    """Seconds since this process began, Python's own start among them, and when each stage must end.

    seconds: of everything. shares: by stage, the share of them after which it ends.
    """

    def __init__(self, seconds: float = float("inf"), shares: dict[str, float] | None = None) -> None:
        self.seconds, self.shares = seconds, shares or {}
        self.began = time.monotonic() - _age()
        self.ended: dict[str, float] = {}  # by stage, when it was done

    def now(self) -> float:
        return time.monotonic() - self.began

    def left(self, stage: str, until: float = float("inf"), least: float = 0.0) -> float:
        """Seconds until the stage's end, which `until` may set earlier.

        least: of all, the share that the stage gets even where those before it were late: others stand on it.
        """
        left = min(self.seconds * self.shares.get(stage, 1.0), until) - self.now()
        return max(left, self.seconds * least) if least else left

    def report(self, stage: str, text: str) -> None:
        """Say that a stage is done."""
        self.ended[stage] = round(self.now(), 1)
        print(f"[{self.now():.0f} s] {text}", flush=True)

    def stages(self) -> dict[str, float]:
        """Seconds that each stage took."""
        ends = [0.0, *self.ended.values()]
        return {name: round(end - start, 1) for name, start, end in zip(self.ended, ends[:-1], ends[1:], strict=True)}


def _age() -> float:
    """Seconds that this process has lived already, as far as the system says."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        age = float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
    return age if 0 <= age < 600 else 0.0


def turn(done: int, ways: int) -> int:
    """Which of the sizes a step is for: the first in three steps of four, the others share the fourth."""
    return 0 if ways == 1 or done % 4 else 1 + done // 4 % (ways - 1)


class Pace:
    """Counts a stage's steps. Where `seconds` are given, fewer are taken if so many would last longer."""

    def __init__(self, name: str, steps: int, seconds: float) -> None:
        self.name, self.steps, self.seconds = name, steps, seconds
        self.done, self.reported, self.start = 0, 0, time.monotonic()

    def more(self) -> bool:
        """Whether another step is due; it counts as begun."""
        if self.done == MEASURED:
            self._wait()
            self.timed = time.monotonic()
        if self.done == 2 * MEASURED and self.seconds < float("inf"):
            self._wait()
            each = (time.monotonic() - self.timed) / MEASURED
            left = self.seconds - (time.monotonic() - self.start)
            self.steps = min(self.steps, self.done + max(0, int(left / each)))
            self.say(f"{each * 1000:.2f} ms a step, {self.steps} steps")
        self.done += 1
        return self.done <= self.steps

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def rate(self, most: float, warmup: int, decay: float) -> float:
        """Up over `warmup` steps, constant, and down to 0 over the last share `decay` of all."""
        left = (self.steps - self.done + 1) / max(1.0, decay * self.steps)
        return most * min(1.0, self.done / warmup, left)

    def keep(self, most: float = 0.999) -> float:
        """The average's decay."""
        return min(most, self.done / (self.done + 9))

    def report(self) -> bool:
        """Whether to say something now; steps that grew slower are made fewer."""
        due = self.done % 500 == 0 or self.done == self.steps
        if due and 2 * MEASURED < self.done < self.steps and self.seconds < float("inf"):
            self._wait()
            each = (time.monotonic() - self.timed) / (self.done - MEASURED)
            left = self.seconds - (time.monotonic() - self.start)
            self.steps = min(self.steps, self.done + max(1, int(left / each)))
        return due

    def since(self) -> int:
        """Steps since the last call."""
        count, self.reported = self.done - self.reported, self.done
        return count

    def say(self, text: str) -> None:
        print(f"{self.name} {self.done}: {text}, {time.monotonic() - self.start:.0f} s", flush=True)


def captured(step: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """A whole step as one CUDA graph; the warm-up steps that it needs run at the rate that the optimizer holds, 0.

    Without a GPU it is the step itself.
    """
    if not torch.cuda.is_available():
        return step
    optimizer.zero_grad(set_to_none=True)  # another graph's gradients are none of this one's
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
            optimizer.zero_grad(set_to_none=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def move_average(average: list[Tensor], values: list[Tensor], share: Tensor) -> None:
    """Move each average so far towards its value.

    The share is a tensor: a captured graph would keep a number for ever.
    """
    ways = torch._foreach_sub(values, average)
    torch._foreach_mul_(ways, share)
    torch._foreach_add_(average, ways)
