"""Upper bounds of numeric settings: beyond them libraries overflow, or memory or time runs out."""

from typing import Any

MANY = 10**9
"""For what is only counted, such as steps between checkpoints."""
STEPS = 10**8
SEED = 2**63 - 1
"""A seed has 64 bits; one to which numbers are added is at most half as large."""
GIB = 10**6
TOKENS = 4096
PIXELS = 2**40
SIGNED = ("seed", "seeds", "guidance", "logit_mean", "weight", "weights")


def check_most(holder: Any, within: str, **most: float) -> None:
    """Check that settings do not exceed their limits, those of SIGNED in either direction. Every number of a list is
    checked; None passes.

    within: the prefix of the settings' names, such as `data.`.

    Raises:
        ValueError: a setting exceeds its limit.
    """
    for name, limit in most.items():
        value = getattr(holder, name)
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is None or not (one > limit or (name in SIGNED and one < -limit)):
                continue
            said = f"{limit:,}" if limit < 2**50 else str(limit)
            mend = f"it must be {said} or less" if one > 0 else f"it must be -{said} or more"
            shown = one if abs(one) < 10**40 or isinstance(one, float) else "a number of more than 40 digits"
            raise ValueError(f"{within}{name} is {shown}; {mend}")
