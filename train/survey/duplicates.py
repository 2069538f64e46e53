"""Which pictures are the same, or nearly: shot twice, saved again, scaled, slightly cropped.

The perceptual hash is a grid of average colours. Pictures whose grids are alike at all are laid over each other, each
as a crop of the other, and what then still differs decides. The usual 64 signs of a cosine transform see neither colour
nor anything small. Among 600 scenes of the bundled world they took 1 pair in 40 for the same picture, and missed half
of the copies that had lost a twentieth at their sides.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GRID = 16  # cells a side of a perceptual hash
COARSE = 18.0  # of 255: root mean square difference of the halved grids, up to which a pair is looked at
MEAN = 14.0  # of 255: mean difference of two grids laid over each other, up to which they are near duplicates
LOCAL = 16.0  # of 255: the same for the average colour of any sixteenth of the picture: another thing there is seen
TRIMS = (0.0, 0.025, 0.05, 0.075)  # shares that a side may have lost
BLOCK = 256  # pairs laid over each other at once
Floats = NDArray[np.float32]


def perceptual_hash(picture: Image.Image) -> NDArray[np.uint8]:
    """An RGB picture's average colours, [16, 16, 3]: the same within a few units when it is saved again or scaled."""
    return np.asarray(picture.convert("RGB").resize((GRID, GRID), Image.Resampling.BOX))


def same(keys: Iterable[Hashable | None]) -> list[list[int]]:
    """Groups of the indices of equal keys, each of two or more; None is equal to nothing."""
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        if key is not None:
            groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


@dataclass
class Near:
    """Groups of near duplicates. Each member is a near duplicate of another one of its group."""

    groups: list[list[int]]
    """Indices of hashes, ascending."""
    looked_at: int
    candidates: int
    """Pairs alike enough to be looked at; more than looked_at if there were too many to look at all."""


def near(hashes: Sequence[NDArray[np.uint8]], most: int = 500_000) -> Near:
    """Near duplicates among perceptual hashes.

    Time grows with the square of their number (10,000: seconds), memory with their number.

    most: pairs to lay over each other, which take about 0.1 ms each; what is beyond is counted in `candidates`.
    """
    if not hashes:
        return Near([], 0, 0)
    grids = np.stack(hashes).astype(np.float32)
    leader = list(range(len(grids)))  # a forest: two indices are in one group when they have the same root

    def root(index: int) -> int:
        while leader[index] != index:
            leader[index] = leader[leader[index]]
            index = leader[index]
        return index

    looked_at = candidates = 0
    for pairs in _candidates(grids):
        # what hangs together already need not be looked at: a hundred copies are 99 pairs, not 4,950
        open_pairs = np.array([(i, j) for i, j in pairs if root(i) != root(j)], dtype=np.int64).reshape(-1, 2)
        candidates += len(open_pairs)
        open_pairs = open_pairs[: max(0, most - looked_at)]
        looked_at += len(open_pairs)
        for i, j in open_pairs[_alike(grids[open_pairs[:, 0]], grids[open_pairs[:, 1]])]:
            leader[root(int(j))] = root(int(i))
    groups = same(root(index) for index in range(len(grids)))
    return Near(groups, looked_at, candidates)


def _candidates(grids: Floats) -> Iterable[NDArray[np.int64]]:
    """Pairs (i, j), i < j, of grids [n, 16, 16, 3] that are alike at half the detail, some at a time."""
    half = grids.reshape(len(grids), GRID // 2, 2, GRID // 2, 2, 3).mean(axis=(2, 4)).reshape(len(grids), -1) - 128
    squares = (half**2).sum(axis=1)
    limit = COARSE**2 * half.shape[1]
    rows = max(1, 2**22 // len(half))  # bounds the table of distances to 16 MiB
    for first in range(0, len(half), rows):
        last = min(first + rows, len(half))
        distance = squares[first:last, None] + squares[None, first:] - 2 * half[first:last] @ half[first:].T
        i, j = np.nonzero(np.triu(distance <= limit, 1))
        for start in range(0, len(i), BLOCK):
            yield np.stack([i[start : start + BLOCK] + first, j[start : start + BLOCK] + first], axis=1)


def _alike(a: Floats, b: Floats) -> NDArray[np.bool_]:
    """For grids [pairs, 16, 16, 3]: whether one is nearly a crop of the other, [pairs]."""
    return _is_crop(a, b) | _is_crop(b, a)


def _is_crop(whole: Floats, part: Floats) -> NDArray[np.bool_]:
    """Whether the best window of `whole` is nearly `part`, [pairs]: the sides are searched, then top and bottom."""
    if not len(whole):
        return np.zeros(0, bool)
    windows = np.stack([_window(before, after) for before in TRIMS for after in TRIMS])  # [windows, 16, 16]
    columns, rows = np.zeros(len(whole), np.int64), np.zeros(len(whole), np.int64)  # each pair's; 0 keeps all
    for _ in range(2):  # the second round starts from rows that fit
        tall = windows[rows] @ whole.reshape(len(whole), GRID, -1)
        columns = _best(windows, tall.reshape(whole.shape).transpose(0, 2, 1, 3), part.transpose(0, 2, 1, 3))
        wide = windows[columns] @ whole.transpose(0, 2, 1, 3).reshape(len(whole), GRID, -1)
        rows = _best(windows, wide.reshape(whole.shape).transpose(0, 2, 1, 3), part)
    fitted = windows[rows] @ wide.reshape(whole.shape).transpose(0, 2, 1, 3).reshape(len(whole), GRID, -1)
    rest = fitted.reshape(whole.shape) - part
    local = rest.reshape(len(rest), 4, GRID // 4, 4, GRID // 4, 3).mean(axis=(2, 4))
    near_enough: NDArray[np.bool_] = (np.abs(rest).mean(axis=(1, 2, 3)) <= MEAN) & (
        np.abs(local).max(axis=(1, 2, 3)) <= LOCAL
    )
    return near_enough


def _best(windows: Floats, whole: Floats, part: Floats) -> NDArray[np.int64]:
    """Which window over the first side of `whole` [pairs, 16, 16, 3] is most like `part`, [pairs]."""
    flat = whole.reshape(len(whole), GRID, -1)
    errors = [np.abs(window @ flat - part.reshape(flat.shape)).mean(axis=(1, 2)) for window in windows]
    best: NDArray[np.int64] = np.argmin(errors, axis=0)
    return best


def _window(before: float, after: float) -> Floats:
    """The linear map [16, 16] from a side's cells to those of its part without shares `before` and `after`."""
    edges = np.linspace(before * GRID, (1 - after) * GRID, GRID + 1)
    cells = np.arange(GRID)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    shares = np.clip(overlap, 0, None)
    weights: Floats = (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
    return weights
