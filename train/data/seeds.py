"""Random numbers that depend on where they are used and on nothing that happened before.

Each draw names its purpose and place, such as ("noise", step, rank): resuming needs no generator state, and one more
draw somewhere changes none elsewhere.
"""

import hashlib

import torch


def derive(seed: int, *place: str | int) -> int:
    """A 63-bit seed for one place."""
    text = "/".join(str(part) for part in (seed, *place))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *place: str | int) -> torch.Generator:
    """A CPU generator for one place: its numbers are the same on every device."""
    return torch.Generator().manual_seed(derive(seed, *place))
