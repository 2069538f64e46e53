"""Notices a GPU driver that moves memory to the host instead of failing: steps then only take longer.

Windows drivers do so by default, and some systems by a setting. torch does not report it, so the clock has to tell.
"""

from collections import deque
from statistics import median

import torch

SLOWER = 4.0  # times the usual step
FULL = 0.92  # of the card's memory held by torch's allocator
USUAL = 20  # the last steps, whose median is the usual time


class Spill:
    """The last steps' seconds on a GPU; on a CPU it notices nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.said = device, False
        self.seconds: deque[float] = deque(maxlen=USUAL)

    def note(self, seconds: float) -> str | None:
        """Call after each step; returns the warning, once. The first steps compile, and steps of another size may take
        longer: it takes three slow steps in a row, on a full card."""
        self.seconds.append(seconds)
        if self.said or self.device.type != "cuda" or len(self.seconds) < USUAL:
            return None
        *before, a, b, c = self.seconds
        usual = median(before)
        total = torch.cuda.get_device_properties(self.device).total_memory
        held = torch.cuda.memory_reserved(self.device) / total
        if min(a, b, c) < SLOWER * usual or held < FULL:
            return None
        self.said = True
        return (
            f"warning: steps take {min(a, b, c):.2f} s where they took {usual:.2f}, with {100 * held:.0f} % of the "
            "card's memory in use: the driver may be moving memory to the host. Turn off its system memory fallback, "
            "and set memory=lean or memory.budget_gib"
        )
