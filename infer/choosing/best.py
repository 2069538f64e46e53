"""Which checkpoint is the best, and why: a rule that is said, not a weighing of scores that nobody can check."""

from __future__ import annotations

from dataclasses import dataclass, field

EQUAL = 0.01  # share of a loss within which two checkpoints count as equal
COPIED = 0.5  # of the usual distance between training pictures: a drawn picture that near was learned by heart


@dataclass
class Entry:
    """A checkpoint at a strength, with its scores."""

    name: str
    step: int
    weight: float
    validation: float | None
    """Loss of the held-out pictures, measured at strength 1."""
    drift: float | None = None
    """Relative change of the latents of unrelated prompts against the base; lower is better."""
    change: float | None = None
    """The same of the prompts themselves."""
    nearest: float | None = None
    """Least distance (RMS at 32 x 32 pixels) of a picture to a training picture."""
    likeness: float | None = None
    """Mean cosine of DINO (or CLIP) to the training pictures; higher is better."""
    images: list[str] = field(default_factory=list)
    """A picture for each prompt, relative to the folder of the choice."""

    @property
    def label(self) -> str:
        return self.name if self.weight == 1 else f"{self.name} at {self.weight:g}"


def choose_best(entries: list[Entry], usual: float | None) -> tuple[Entry, str]:
    """The best of some entries, and the reason in a sentence. usual: median distance of training pictures to the
    nearest other one.

    Among those nearest to strength 1: whoever draws training pictures by heart is out, as long as others are left; then
    the lowest validation loss counts, and among equal ones the least drift, and then the earliest. Without validation
    it is the likeness to the training pictures, and without that the newest.
    """
    assert entries
    nearest = min(abs(one.weight - 1) for one in entries)
    left = [one for one in entries if abs(one.weight - 1) == nearest]
    copied = [one for one in left if usual and one.nearest is not None and one.nearest < COPIED * usual]
    out = ""
    if copied and len(copied) < len(left):
        left = [one for one in left if one not in copied]
        names = ", ".join(one.name for one in copied)
        out = f"; left out as near copies of training pictures: {names}"
    if all(one.validation is not None for one in left):
        lowest = min(one.validation or 0.0 for one in left)
        equal = [one for one in left if (one.validation or 0.0) <= lowest * (1 + EQUAL)]
        best = min(equal, key=lambda one: (one.drift if one.drift is not None else 0.0, one.step))
        why = f"lowest loss of the held-out pictures ({best.validation:.4f})"
        if len(equal) > 1:
            others = ", ".join(f"{one.name} {one.validation:.4f}" for one in equal if one is not best)
            what = f"the least drift ({best.drift:.3f})" if best.drift is not None else "the fewest steps"
            why = f"held-out loss {best.validation:.4f}, within 1 % of the lowest as {others}, and of those {what}"
    elif all(one.likeness is not None for one in left):
        best = max(left, key=lambda one: (one.likeness or 0.0, -one.step))
        why = f"most like the training pictures ({best.likeness:.3f}); no picture was held out to judge by"
    else:
        best = max(left, key=lambda one: one.step)
        why = (
            "the newest: no picture was held out and no network judges likeness (networks=hub), so look at the pictures"
        )
    return best, why + out
