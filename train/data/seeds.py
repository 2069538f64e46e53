"""Random numbers that depend on where they are used and on nothing that happened before.

Each draw has a key that names its purpose and where it is used, such as ("noise", step, rank): resuming needs no
generator state, and one more draw somewhere changes none elsewhere.
"""

import hashlib

import torch


def derive(seed: int, *key: str | int) -> int:
    """A 63-bit seed for one key: from its SHA-256, as numpy's SeedSequence hashes a spawn_key."""
    text = "/".join(str(part) for part in (seed, *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *key: str | int) -> torch.Generator:
    """A CPU generator for one key: its numbers are the same on every device."""
    return torch.Generator().manual_seed(derive(seed, *key))
