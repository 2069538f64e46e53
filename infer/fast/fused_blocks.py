"""The families' blocks from a few operators that each read and write memory once, without a compiler.

What torch.compile makes of infer/fast/flux1_blocks.py and flux2_blocks.py takes most of a minute to make; these kernels
are compiled once for all sizes and batches, few of them anew for a precision or a rank, in about a second each, beside
each other, and kept. The numbers are those of the blocks there, to rounding.
"""

from torch import Tensor

from infer.fast.double_block import Double
from infer.fast.flux1_blocks import Single as Single1
from infer.fast.flux2_blocks import Single as Single2
from infer.fast.fused_activation import activated
from infer.fast.fused_gate import gated
from infer.fast.fused_heads import Heads, Rows, heads_and_rest, heads_of
from infer.fast.fused_linear import fused_linear, spare_columns
from infer.fast.fused_norm import normed
from infer.fast.kept_attention import kept_attention
from infer.fast.weights import Linear, rows_of

Block = Double | Single1 | Single2


def compute(block: Block, tensors: tuple[Tensor, ...], again: bool, once: bool = False) -> tuple[Tensor, ...]:
    """A block's streams; tensors: streams, modulations, cos and sin. again: for their gradients alone, as their values
    are known; once: no gradient is asked for."""
    if isinstance(block, Double):
        return _double(block, again, once, *tensors)
    return _single(block, again, once, tensors[:-3], *tensors[-3:])


def _double(
    block: Double,
    again: bool,
    once: bool,
    txt: Tensor,
    img: Tensor,
    txt_mod: Tensor,
    img_mod: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:
    mods = [mod.chunk(6, dim=-1) for mod in (txt_mod, img_mod)]
    streams, products = [txt, img], []
    for i, mod in enumerate(mods):
        x, streams[i] = normed(mod[0], mod[1], streams[i], spare=spare_columns(block.qkv[i]) if once else 0)
        products.append(fused_linear(x, block.qkv[i], again))
    how = Heads(block.heads, block.norms, cos, sin)
    attended = kept_attention(*heads_of(how, *products), block.repeatable)
    for i, part in enumerate(attended.split([txt.shape[1], img.shape[1]], dim=1)):
        _, _, gate, shift, scale, gate_mlp = mods[i]
        (x,) = gated(gate, fused_linear(part, block.out[i], again), (streams[i],))
        y, x = normed(shift, scale, x)
        hidden = fused_linear(y, block.up[i], again)
        y = activated(_kind(hidden, 0, block.down[i]), hidden)
        value = _value(again, gate_mlp)
        (streams[i],) = gated(gate_mlp, fused_linear(y, block.down[i], again, value), (x,), value)
    return tuple(streams)


def _single(
    block: Single1 | Single2,
    again: bool,
    once: bool,
    streams: tuple[Tensor, ...],
    mod: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, ...]:
    shift, scale, gate = mod.chunk(3, dim=-1)
    reads, width = block.reads if isinstance(block, Single1) else _reads(block), streams[0].shape[-1]
    # of two products that read it, each would need columns of its own
    x, *beside = normed(shift, scale, *streams, spare=spare_columns(reads[0]) if once and len(reads) == 1 else 0)
    how, rows = Heads(block.heads, block.norms, cos, sin), None
    if len(reads) > 1:  # the MLP's part is a product of its own
        product, hidden = (fused_linear(x, each, again) for each in reads)
        q, k, v = heads_of(how, product)
    else:
        rows = Rows()
        q, k, v, hidden = heads_and_rest(how, fused_linear(x, reads[0], again), rows)
    attended = kept_attention(q, k, v, block.repeatable)
    y = activated(_kind(hidden, width, block.down), hidden, attended, rows, 3 * width)
    value = _value(again, gate)
    return gated(gate, fused_linear(y, block.down, again, value), tuple(beside), value)


def _value(again: bool, gate: Tensor) -> bool:
    """Whether the last product's value is read: when it is computed again, by the gradient of a gate that learns."""
    return not again or gate.requires_grad


def _kind(hidden: Tensor, beside: int, down: Linear) -> str:
    """What activation lies between two products, by their sizes: swiglu halves what it is given."""
    return "gelu" if hidden.shape[-1] + beside == down.frozen.shape[1] else "swiglu"


def _reads(block: Single2) -> tuple[Linear, ...]:
    if not block.apart:
        return (block.reads,)
    end = block.reads.frozen.shape[0]
    cut = 3 * block.reads.frozen.shape[1]
    return rows_of(block.reads, 0, cut), rows_of(block.reads, cut, end)
