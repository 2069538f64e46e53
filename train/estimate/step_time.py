"""Seconds of a training step on a card, estimated from floating-point operations and bytes.

How much of its datasheet's rates an H200 reaches was measured: the shares and passes below are fitted by least squares
to 26 rows of scripts/bench_train.py, of FLUX.1, Kontext and klein, of 1,536 to 12,800 tokens, and differ from them by
4 % at most (2 % root mean square). Other cards are assumed to reach the same shares of theirs.
"""

from dataclasses import dataclass

from infer.adapter.sizes import match_adapter
from infer.checkpoint.files import known_config
from infer.checkpoint.layers import linear_shapes
from train.estimate.flop import RECOMPUTED, attention_flop, linear_flop, token_weights, tokens_of, width_of
from train.estimate.memory import Footprint, largest_pixels, text_tokens
from train.run.config import Train


@dataclass(frozen=True)
class Card:
    """A graphics card."""

    gib: float
    flops: float
    """Operations a second of dense bf16 products with fp32 sums, by the datasheet."""
    bandwidth: float
    """Bytes a second from the card's memory."""
    host: float = 25e9
    """Bytes a second from pinned host memory."""


CARDS = {
    "H200": Card(139.8, 989e12, 4.8e12, 60e9),
    "H100": Card(79.2, 989e12, 3.35e12, 56e9),
    "A100 80GB": Card(79.2, 312e12, 2.04e12),
    "L40S": Card(44.5, 362e12, 0.864e12),
    "RTX 5090": Card(31.4, 209e12, 1.79e12, 50e9),
    "RTX 4090": Card(23.6, 165e12, 1.01e12),
    "RTX 3090": Card(23.6, 71e12, 0.936e12),
    "RTX 4080": Card(15.6, 97e12, 0.717e12),
    "RTX 4060 Ti 16GB": Card(15.6, 44e12, 0.288e12, 12e9),
    "RTX 3060 12GB": Card(11.8, 25e12, 0.360e12),
    "RTX 4060": Card(7.6, 30e12, 0.272e12, 12e9),
}
RATE = 0.8  # share of the datasheet's operations that a large product of random matrices reaches
PRODUCTS = 0.72  # share of that rate that a step's products reach
ATTENTION = 0.75  # share of it that attention over many tokens reaches, and
HALF = 350  # the tokens at which it reaches half of that: short products fill a card less
HOST = 0.0085  # seconds a step in which the device waits for the host
EIGHT = {"bf16": 1.0, "fp8": 1.7, "int8": 1.86}  # how much faster products in 8 bits are than in bf16
ROUNDING = {"bf16": 1.0, "fp8": 1.3, "int8": 5.9}  # rounding rows takes passes too
UNPACKING = {"bf16": 1.0, "fp8": 3.3, "int8": 7.7}  # bytes a second of dequantizing, over those of making 8-bit values
PASSES = 32  # how often a block's fused kernels read or write an activation, and
PASSES_AGAIN = 14  # how often more where the block is computed again
COPY = 0.9  # share of the bandwidth that they reach
# bytes read or written by DoRA's norms and magnitudes for each adapted weight and each number of an output; of two rows
DORA = 21.5


def seconds(job: Train, taken: Footprint, card: Card) -> float:
    """Seconds of one optimizer update on the fast path. The plain path is slower by an amount that the host decides."""
    config = known_config(job.model, "transformer")
    tokens = tokens_of(largest_pixels(job), text_tokens(job))
    batch, width, blocks = job.data.batch_size, width_of(config), taken.blocks
    # shares of the blocks whose products, and whose attention, are computed again
    part = max(0, blocks - job.memory.keep_all) / blocks
    again = part if job.memory.keep in ("nothing", "attention") else 0.0
    attended = part if job.memory.keep == "nothing" else 0.0
    linear = linear_flop(config, tokens) * (2 + RECOMPUTED * again)
    attention = attention_flop(config, tokens) * (3.5 + attended)
    reached = ATTENTION * tokens / (tokens + HALF)
    rate = card.flops * RATE
    products = job.precision.products
    time = batch * (linear / (PRODUCTS * rate * EIGHT[products]) + attention / (reached * rate))
    passes = (PASSES + PASSES_AGAIN * again) * ROUNDING[products]
    time += batch * tokens * width * 2 * passes * blocks / (COPY * card.bandwidth)
    if (job.precision.quantized and not job.memory.unpacked) or products != "bf16":
        weights = token_weights(config)
        stored = {"int8": 1.0, "bf16": 2.0}.get(job.precision.kind, 0.56)
        times, made = 2 + attended, 2
        if products != "bf16":  # forward, again where it is computed again, and the gradient's layout
            times, made = 2 + again, 1
        time += times * weights * (stored + made) * UNPACKING[products] / (COPY * card.bandwidth)
    if job.adapter.dora:
        layers = linear_shapes(config)
        adapted = [layers[name] for name in match_adapter(layers, job.adapter)]
        numbers = sum(layer.rows * (layer.columns + batch * tokens) for layer in adapted)
        time += DORA * numbers / (COPY * card.bandwidth)
    copies = 2.0  # of the weights from the host
    if job.preserve.kind != "none":  # a forward pass of the base's and a training pass more
        time *= 2 + 1 / (2 + again)
        copies = 5
    offloaded = taken.host * (1 - taken.resident / taken.blocks)
    return (max(time, copies * offloaded / card.host) + HOST) * job.accumulation
