"""How many steps a stage takes, at which rate, and what it says on the way; a step as a CUDA graph."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

MEASURED = 60  # steps from whose time the number of steps is found


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
        return self.done % 500 == 0 or self.done == self.steps

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
