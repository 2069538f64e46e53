"""The fast path in the place of a transformer's blocks: fused operators, or code compiled once for each kind of block.

What the backward pass needs is computed again, block by block, except for what `keep` names.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from torch import nn

from infer.fast import flux1_blocks, flux2_blocks
from infer.fast.buffer import buffer_bytes, copy_into, use_buffer
from infer.fast.compiled import call_compiled, run_of
from infer.fast.eight_bit import eight_of
from infer.fast.form import Form, Outside
from infer.fast.fused_again import KEEPS, fused
from infer.fast.group import Group
from infer.fast.memory import Memory, refuse_plain
from infer.fast.offload import Offload
from infer.fast.precomputed import Precomputed
from infer.fast.ready_kernels import wait
from infer.fast.weights import obstacle, unpacked
from infer.quantize.compute import compute_dtype_of, in_half
from infer.quantize.precision import Precision, kind_of

BACKEND = "inductor"
FAMILIES: dict[type[nn.Module], tuple[tuple[Form, ...], Outside]] = {
    FluxTransformer2DModel: (flux1_blocks.FORMS, flux1_blocks.OUTSIDE),
    Flux2Transformer2DModel: (flux2_blocks.FORMS, flux2_blocks.OUTSIDE),
}


def install(
    transformer: Any,
    memory: Memory,
    device: torch.device,
    keep: str | None = None,
    repeatable: bool = False,
    products: str = "bf16",
    kernels: bool | None = None,
) -> Offload | None:
    """Replace every block's forward; returns the offload of its blocks where a budget asks for one.

    repeatable: with an attention whose gradient is the same every time (infer/fast/attention.py); products: bf16, or
    fp8 or int8 for products of frozen weights in 8 bits (infer/fast/eight_bit.py); kernels: blocks of fused operators
    (infer/fast/fused_blocks.py) where they can be; None: on a GPU where memory.compile leaves the choice.

    Raises:
        ValueError: the layers cannot be stacked.
    """
    keep = keep or memory.without_auto().keep
    wait()
    heads, compiles = transformer.config.num_attention_heads, memory.compiles(device)
    modules = list(_blocks(transformer))
    whole = len(modules) - memory.keep_all  # from here on
    keeps = [keep if i < whole else "everything" for i in range(len(modules))]
    built = []
    for (form, module), kept in zip(modules, keeps, strict=True):
        built.append(form.read(module, kept == "nothing"))
        if memory.budget_gib is None:
            _gather(built[-1][0], device)
    # one a shape, a form of adapter, and a mixture of kinds
    mixtures = {tuple(group.frozen.kind for group in groups) for groups, _ in built}
    torch._dynamo.config.recompile_limit = limit = 64 * len(mixtures)
    torch._dynamo.config.accumulated_recompile_limit = max(4 * limit, 256)
    half = in_half(transformer)
    kernels = (memory.kernels(device) if kernels is None else kernels) and not half
    for kept, group in ((kept, group) for kept, (groups, _) in zip(keeps, built, strict=True) for group in groups):
        if memory.unpacked and not group.modulates():  # which read theirs packed
            group.frozen = unpacked(group.frozen, torch.float16 if half else compute_dtype_of(transformer))
        eight = None if products == "bf16" else eight_of(group.frozen, products, device)
        # where nothing is recomputed, a copy that is shared would be one of all weights, kept from forward to backward
        shared = kept in ("attention", "products") or group.frozen.kind not in ("nf4", "fp4")
        shared = shared and eight is None  # the gradient takes another layout
        # a product that is kept has to stay as it is; not compiled, what adds in place takes longer than it saves
        in_place = kept != "products" and compiles and not half
        group.holds = compiles and not kernels and group.learns()
        group.frozen = group.frozen._replace(shared=shared, in_place=in_place, half=half, eight=eight)
    offload = None
    if memory.budget_gib is not None:
        offload = Offload([groups for groups, _ in built], device)
        _move_rest(transformer, device)

    def forward_of(i: int) -> Callable[..., Any]:
        form, (groups, parts) = modules[i][0], built[i]
        run = run_of(form, keeps[i], BACKEND if compiles else None)

        def forward(*args: Any, **kwargs: Any) -> Any:
            streams, rest = form.arguments(*args, **kwargs)
            if torch.is_grad_enabled():
                # the first block's inputs too, though nobody reads their gradient: one form for all, compiled once
                streams = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in streams)
            if offload is not None:
                streams = offload.before(i, *streams)
            block = parts(heads)._replace(repeatable=repeatable)
            if kernels and keeps[i] in KEEPS:
                streams = form.compute(partial(fused, keeps[i]), block, *streams, *rest)
            elif compiles:
                streams = call_compiled(run, groups, block, streams, rest)
            else:
                streams = run(block, *streams, *rest)
            if offload is not None:
                streams = offload.after(i, *streams)
            return streams if len(streams) > 1 else streams[0]

        return forward

    for i, (_, module) in enumerate(modules):
        module.forward = forward_of(i)
    # compiled blocks are one function with their modulations, for training and for pictures
    own = not compiles or (kernels and all(kept in KEEPS for kept in keeps))
    outside, groups = _family(transformer)[1], [groups for groups, _ in built]
    transformer.precomputed = Precomputed(outside, groups, offload) if own else None
    return offload


def _family(transformer: nn.Module) -> tuple[tuple[Form, ...], Outside]:
    found = [own for family, own in FAMILIES.items() if isinstance(transformer, family)]
    assert found, f"no blocks are written for a {type(transformer).__name__}"
    return found[0]


def _blocks(transformer: nn.Module) -> Iterator[tuple[Form, Any]]:
    """Every block, in the order in which they are called."""
    for form in _family(transformer)[0]:
        for block in getattr(transformer, form.blocks):
            yield form, block


def _gather(groups: list[Group], device: torch.device) -> None:
    """Copy a block's weights into one buffer."""
    stacks = [group.frozen for group in groups]
    buffer = torch.empty(buffer_bytes(stacks), dtype=torch.uint8, device=stacks[0].stored.device)
    copy_into(buffer, stacks)
    del stacks
    use_buffer(groups, buffer)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what they lay in before: else loading would take twice the memory


def _move_rest(transformer: Any, device: torch.device) -> None:
    """What is not offloaded, to the device: norms, embedders, adapters."""
    nn.Module.to(transformer, device)  # diffusers' own `to` refuses int8
    for module in transformer.modules():
        if kind_of(module) == "int8":  # torch moves their codes, but not the scales
            layer: Any = module
            for holder in (layer.weight, layer.state):
                holder.SCB = None if holder.SCB is None else holder.SCB.to(device)


def hold_of(memory: Memory) -> torch.device | None:
    """Where the transformer is held after loading: on the host where blocks are offloaded."""
    return None if memory.budget_gib is None else torch.device("cpu")


def choose_path(
    transformer: Any,
    memory: Memory,
    precision: Precision,
    device: torch.device,
    say: Callable[[str], object],
    repeatable: bool = False,
) -> tuple[Memory, Offload | None]:
    """Install the fast path, or say why not and prepare the plain one; returns what was done.

    repeatable: the fast path's gradients are the same every time; the plain one's are what torch's flags make them.

    Raises:
        ValueError: a setting that needs the fast path is asked for, and the path cannot be taken.
    """
    reason = obstacle(transformer) if memory.fused else "memory.fused is false"
    if precision.llm_int8:
        reason = "LLM.int8 multiplies by its own kernels"
    plain = refuse_plain(memory, device, reason, precision.products)
    if plain.fused:
        if precision.products != "bf16" and device.type == "cpu":
            say(f"note: precision.products={precision.products} rounds on a CPU as on a GPU, and saves no time there")
        return memory, install(transformer, memory, device, repeatable=repeatable, products=precision.products)
    if memory.fused:
        say(f"note: the fast path is off: {reason}")
    if plain.keep == "nothing":
        transformer.enable_gradient_checkpointing()
    return plain, None


def uninstall(transformer: Any) -> None:
    """diffusers' own blocks again."""
    transformer.precomputed = None
    for _, block in _blocks(transformer):
        block.__dict__.pop("forward", None)
