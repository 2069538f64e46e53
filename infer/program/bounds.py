"""Upper bounds of numeric settings, beyond which nothing is meant: libraries overflow, memory or time runs out."""

from typing import Any

MANY = 10**9
"""Of what is only waited for or counted, such as steps between checkpoints."""
STEPS = 10**8
SEED = 2**63 - 1
"""A seed has 64 bits; those from which others are counted on are half as large."""
GIB = 10**6
TOKENS = 4096
PIXELS = 2**40
SIGNED = ("seed", "seeds", "guidance", "logit_mean", "weight")


def check_most(holder: Any, within: str, **most: float) -> None:
    """See that numbers are not beyond what they may be at most; those of SIGNED below zero too. A list's are all looked
    at, and None is none.

    within: what stands before a setting's name, such as `data.`.

    Raises:
        ValueError: one is.
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
