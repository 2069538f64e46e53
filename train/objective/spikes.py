"""Losses far above what the run's last ones were.

A flow-matching loss scatters by factors (noise levels, small batches), so its logarithm is judged: against the median
of the last losses, in units of 1.4826 times their median absolute deviation, which is the standard deviation where they
are normal (Rousseeuw and Croux 1993) and is not moved by the spikes themselves.
"""

import math
import statistics

WINDOW = 100  # losses that are remembered
LEAST = 20  # losses without which nothing is judged
FLOOR = 0.05  # of the deviation, in the logarithm: losses that hardly differ make no spike of 10 %


def threshold(losses: list[float], deviations: float) -> float | None:
    """The loss above which one is a spike, `deviations` of the last losses above their median; None: too few yet."""
    if len(losses) < LEAST or not deviations > 0:
        return None
    logs = [math.log(max(loss, 1e-30)) for loss in losses]
    middle = statistics.median(logs)
    spread = 1.4826 * statistics.median(abs(log - middle) for log in logs)
    return math.exp(middle + deviations * max(spread, FLOOR))


def remember(losses: list[float], loss: float) -> list[float]:
    """The last losses with this one."""
    return [*losses, loss][-WINDOW:]
