"""Spikes: losses far above the run's last ones.

A flow-matching loss varies by factors (noise levels, small batches), so its logarithm is compared with the median of
the last ones, in units of 1.4826 times their median absolute deviation. That equals the standard deviation of normal
values, and spikes themselves do not move it (Rousseeuw and Croux 1993).
"""

import math
import statistics

WINDOW = 100  # the last losses that are remembered
LEAST = 20  # with fewer losses there is no threshold
FLOOR = 0.05  # the least deviation of the logarithm: among nearly equal losses, 10 % more is no spike


def threshold(losses: list[float], deviations: float) -> float | None:
    """The loss above which a loss is a spike: so many deviations above the median. None if there are too few losses."""
    if len(losses) < LEAST or not deviations > 0:
        return None
    logs = [math.log(max(loss, 1e-30)) for loss in losses]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    return math.exp(middle + deviations * max(spread, FLOOR))


def remember(losses: list[float], loss: float) -> list[float]:
    """The last losses, this one included."""
    return [*losses, loss][-WINDOW:]
