"""What a file's own rounding costs, said when its weights are rounded once more.

How much a kind of storage rounds is known of each kind: the figures are of weights as they are, and
tests/infer/single_file/test_rounding.py measures them on the bundled model. The two roundings are independent, so their
errors add up by squares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import hypot

from infer.quantize.precision import Precision

ROUNDED = {"e4m3": 2.7, "e5m2": 5.3, "Q8_0": 0.55, "Q5_1": 3.7, "Q5_0": 4.4, "Q4_1": 7.6, "Q4_0": 8.9}
"""Relative error of the weights in percent (root of the mean square), by the kind in which they are stored."""
LIKE = {"Q5_K": "Q5_1", "Q4_K": "Q4_1"}
"""Kinds with as many bits and as long blocks, for which the gguf package has no quantizer to measure."""
TO = {"nf4": 9.2, "fp4": 11.8, "int8": 0.75}
"""The same of what is made here of bf16 weights."""
UNROUNDED = ("bf16", "fp16", "fp32")


def rounded_twice(name: str, kinds: Iterable[str], precision: Precision) -> str | None:
    """A note for the user; None if a file's linear weights are of 16 bits or more.

    name: the file's. kinds: how each of the transformer's weights is stored.
    """
    counted = Counter(kinds)
    kind, count = max(((k, n) for k, n in counted.items() if k not in UNROUNDED), key=lambda x: x[1], default=("", 0))
    if not count:
        return None
    said = f"{name} stores {count} of {counted.total()} weights as {kind}"
    own = ROUNDED.get(LIKE.get(kind, kind))
    if own is None:
        return f"{said}, which has rounded them already: what that cost is not known; a bf16 file has lost nothing"
    said += f", which has rounded them by about {own:g} % already"
    then = TO.get(precision.kind)
    if then is None:
        return f"{said}; a bf16 file has lost nothing"
    return (
        f"{said}: as {precision.kind} they are about {hypot(own, then):.1f} % from the original ones, where "
        f"{precision.kind} of a bf16 file is {then:g} %"
    )
