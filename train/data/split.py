"""Which pictures are trained on, and which are held out for validation."""

import hashlib
from collections import defaultdict


def split(keys: list[str], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices for training and for validation. Depends on each sample's key and the seed, not on the order.

    Samples of the same key stay together, so that nothing that is trained is held out; so the share is met within the
    largest group of them.

    Raises:
        ValueError: all have the same key.
    """
    if share == 0:
        return list(range(len(keys))), []
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    if len(groups) < 2:
        raise ValueError(f"all {len(keys)} pictures are the same, so none can be held out; set data.validation=0")
    order = sorted(groups, key=lambda key: hashlib.sha256(f"{seed}/{key}".encode()).digest())
    wanted = max(1, round(share * len(keys)))
    held: list[int] = []
    for key in order[:-1]:  # the last is trained on in any case
        if len(held) + len(groups[key]) <= wanted:
            held += groups[key]
    held = held or min((groups[key] for key in order), key=len)
    there = set(held)
    return [i for i in range(len(keys)) if i not in there], sorted(held)
