"""When a run ends before its last step: its settings, and whether what was measured so far says so."""

from collections.abc import Mapping
from dataclasses import dataclass

from infer.program.bounds import MANY, check_most

SCORED = ("likeness", "copying", "drift")


@dataclass
class EarlyStop:
    """What ends a run before its last step; each setting by itself."""

    loss: int = 0
    """So many validations in a row without a lower loss of the held-out pictures (of the averaged weights, if there are
    any); 0: never."""
    likeness: int = 0
    """So many scorings in a row without a higher likeness to the training pictures; 0: never."""
    copying: float | None = None
    """This share of the drawn pictures, or more, is a near copy of a training picture; null: never."""
    drift: float | None = None
    """Unrelated prompts are moved this far or more, as a share of their latents; null: never."""

    def __post_init__(self) -> None:
        check_most(self, "stop.", loss=MANY, likeness=MANY, copying=1, drift=1000)
        for name in ("loss", "likeness"):
            if getattr(self, name) < 0:
                raise ValueError(f"stop.{name} is {getattr(self, name)}; it must be 0 (never) or more")
        for name in ("copying", "drift"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"stop.{name} is {value}; it must be above 0, or null for never")


def why_stop(stop: EarlyStop, losses: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]) -> str | None:
    """Why a run ends here, by what was measured at its steps so far (as text); None if it goes on."""
    best, since = _since_best({step: -loss for step, loss in losses.items()})
    if stop.loss and since >= stop.loss:
        return f"{since} validations since the lowest loss of the held-out pictures ({-best[1]:.4f} at step {best[0]})"
    liked = {step: one["likeness"] for step, one in scores.items() if "likeness" in one}
    best, since = _since_best(liked)
    if stop.likeness and since >= stop.likeness:
        return f"{since} scorings since the highest likeness ({best[1]:.3f} at step {best[0]})"
    last = scores[max(scores, key=int)] if scores else {}
    if stop.copying is not None and last.get("copying", 0.0) >= stop.copying:
        return f"{100 * last['copying']:.0f} % of the drawn pictures are near copies of training pictures"
    if stop.drift is not None and last.get("drift", 0.0) >= stop.drift:
        return f"unrelated prompts are moved by {last['drift']:.3f}"
    return None


def _since_best(values: Mapping[str, float]) -> tuple[tuple[str, float], int]:
    """The step and value of the highest, the first of equal ones, and how many came after it."""
    if not values:
        return ("", 0.0), 0
    steps = sorted(values, key=int)
    best = max(steps, key=lambda step: (values[step], -int(step)))
    return (best, values[best]), len(steps) - 1 - steps.index(best)
