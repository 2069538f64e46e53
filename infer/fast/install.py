"""The fast path of `infer/fast/blocks.py` in the place of a transformer's blocks, compiled once for each kind of block.

What the backward pass needs is computed again, block by block, except for what `keep` names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from infer.fast.blocks import Double, Single, double_block, modulation, single_block
from infer.fast.buffer import buffer_bytes, copy_into, use_buffer
from infer.fast.eight_bit import eight_of
from infer.fast.memory import Memory, refuse_plain
from infer.fast.offload import Offload
from infer.fast.weights import Linear, Stack, adapters_of, obstacle, stack, use_views
from infer.quantize.compute import in_half
from infer.quantize.precision import Precision, kind_of

BACKEND = "inductor"

aten = torch.ops.aten
ATTENTION = [
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.flux_lora.attention.default,  # infer/fast/attention.py, which infer/fast/blocks.py imports
]
PRODUCTS = [
    aten.mm.default,
    aten.addmm.default,
    aten._scaled_mm.default,
    torch.ops.flux_lora.multiply_int8.default,  # infer/fast/int8_kernels.py
]


def _policy(keep: str, context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    if (keep != "nothing" and op in ATTENTION) or (keep == "products" and op in PRODUCTS):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(keep: str) -> Any:
    return create_selective_checkpoint_contexts(partial(_policy, keep))


def _again(keep: str, function: Callable[..., Any], *args: Any) -> Any:
    """The function's value; in a backward pass it is computed again, but for what is kept."""
    if keep == "everything" or not torch.is_grad_enabled():
        return function(*args)
    return checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=partial(_contexts, keep)
    )


def _double(keep: str, block: Double, txt: Tensor, img: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Any:
    condition = functional.silu(temb)
    mods = [modulation(condition, layer) for layer in block.mod]
    return _again(keep, double_block, block, txt, img, *mods, cos, sin)


def _single(keep: str, block: Single, txt: Tensor, img: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Any:
    return _again(keep, single_block, block, txt, img, modulation(functional.silu(temb), block.mod), cos, sin)


class Group:
    """Layers that read one input, by name, and their stacked weights.

    By name, because an adapter that is attached or taken off puts another module in a layer's place.
    """

    def __init__(self, block: nn.Module, *names: str) -> None:
        self.block, self.names = block, names
        self.use(stack(self._layers()))

    def _modules(self) -> list[nn.Module]:
        return [self.block.get_submodule(name) for name in self.names]

    def _layers(self) -> list[Any]:
        return [getattr(module, "base_layer", module) for module in self._modules()]

    def use(self, frozen: Stack) -> None:
        """Take these weights, and have the layers use_views them."""
        self.frozen = frozen
        use_views(self._layers(), frozen)

    def linear(self) -> Linear:
        return Linear(self.frozen, tuple(adapters_of(module) for module in self._modules()))


def _double_parts(block: Any) -> tuple[list[Group], Callable[[int], Double]]:
    attn = block.attn
    mod = Group(block, "norm1_context.linear"), Group(block, "norm1.linear")
    txt_qkv = Group(block, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    qkv = txt_qkv, Group(block, "attn.to_q", "attn.to_k", "attn.to_v")
    out = Group(block, "attn.to_add_out"), Group(block, "attn.to_out.0")
    up = Group(block, "ff_context.net.0.proj"), Group(block, "ff.net.0.proj")
    down = Group(block, "ff_context.net.2"), Group(block, "ff.net.2")
    pairs = mod, qkv, out, up, down

    def parts(heads: int) -> Double:
        norms = attn.norm_added_q.weight, attn.norm_added_k.weight, attn.norm_q.weight, attn.norm_k.weight
        mods, qkvs, outs, ups, downs = ((a.linear(), b.linear()) for a, b in pairs)
        return Double(heads, norms, mods, qkvs, outs, ups, downs)

    return [group for pair in pairs for group in pair], parts


def _single_parts(block: Any, apart: bool) -> tuple[list[Group], Callable[[int], Single]]:
    """apart: one product for q, k and v and one for the MLP; of all weights 5/7 are dequantized at once at most."""
    attn = block.attn
    mod, down = Group(block, "norm.linear"), Group(block, "proj_out")
    qkv, up = ("attn.to_q", "attn.to_k", "attn.to_v"), ("proj_mlp",)
    reads = [Group(block, *qkv), Group(block, *up)] if apart else [Group(block, *qkv, *up)]

    def parts(heads: int) -> Single:
        norms = attn.norm_q.weight, attn.norm_k.weight
        return Single(heads, norms, mod.linear(), tuple(each.linear() for each in reads), down.linear())

    return [mod, *reads, down], parts


def install(
    transformer: FluxTransformer2DModel,
    memory: Memory,
    device: torch.device,
    keep: str | None = None,
    repeatable: bool = False,
    products: str = "bf16",
) -> Offload | None:
    """Replace every block's forward; returns the offload of its blocks where a budget asks for one.

    repeatable: with an attention whose gradient is the same every time (infer/fast/attention.py); products: bf16, or
    fp8 or int8 for products of frozen weights in 8 bits (infer/fast/eight_bit.py).

    Raises:
        ValueError: the layers cannot be stacked.
    """
    keep = keep or memory.keep
    heads = transformer.config.num_attention_heads
    wrap: Any = partial(torch.compile, fullgraph=True, dynamic=False, backend=BACKEND)
    if not memory.compiles(device):
        wrap = _uncompiled
    runs = wrap(partial(_double, keep)), wrap(partial(_single, keep))
    modules = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    doubles = len(transformer.transformer_blocks)
    built = []
    for i, module in enumerate(modules):
        built.append(_double_parts(module) if i < doubles else _single_parts(module, apart=keep == "nothing"))
        if memory.budget_gib is None:
            _gather(built[-1][0], device)
    # one a shape, a form of adapter, and a mixture of kinds
    mixtures = {tuple(group.frozen.kind for group in groups) for groups, _ in built}
    torch._dynamo.config.recompile_limit = limit = 64 * len(mixtures)
    torch._dynamo.config.accumulated_recompile_limit = max(4 * limit, 256)
    half = in_half(transformer)
    for group in (group for groups, _ in built for group in groups):
        eight = None if products == "bf16" else eight_of(group.frozen, products, device)
        # where nothing is recomputed, a copy that is shared would be one of all weights, kept from forward to backward
        shared = keep in ("attention", "products") or group.frozen.kind not in ("nf4", "fp4")
        shared = shared and eight is None  # the gradient takes another layout
        # a product that is kept has to stay as it is; not compiled, what adds in place takes longer than it saves
        in_place = keep != "products" and memory.compiles(device) and not half
        group.frozen = group.frozen._replace(shared=shared, in_place=in_place, half=half, eight=eight)
    offload = None
    if memory.budget_gib is not None:
        offload = Offload([groups for groups, _ in built], device)
        _move_rest(transformer, device)

    def forward_of(i: int) -> Callable[..., Any]:
        run, parts = runs[i >= doubles], built[i][1]

        def forward(
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            temb: Tensor,
            image_rotary_emb: tuple[Tensor, Tensor],
            joint_attention_kwargs: dict[str, Any] | None = None,
        ) -> tuple[Tensor, Tensor]:
            txt, img = encoder_hidden_states, hidden_states
            if torch.is_grad_enabled():
                # the first block's inputs too, though nobody reads their gradient: one form for all, compiled once
                txt, img = (x if x.requires_grad else x.detach().requires_grad_() for x in (txt, img))
            block = parts(heads)._replace(repeatable=repeatable)
            if offload is None:
                return run(block, txt, img, temb, *image_rotary_emb)  # type: ignore[no-any-return]
            txt, img = offload.before(i, txt, img)
            txt, img = run(block, txt, img, temb, *image_rotary_emb)
            return offload.after(i, txt, img)

        return forward

    for i, module in enumerate(modules):
        module.forward = forward_of(i)
    return offload


def _gather(groups: list[Group], device: torch.device) -> None:
    """Copy a block's weights into one buffer."""
    stacks = [group.frozen for group in groups]
    buffer = torch.empty(buffer_bytes(stacks), dtype=torch.uint8, device=stacks[0].stored.device)
    copy_into(buffer, stacks)
    del stacks
    use_buffer(groups, buffer)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what they lay in before: else loading would take twice the memory


def _move_rest(transformer: FluxTransformer2DModel, device: torch.device) -> None:
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
    transformer: FluxTransformer2DModel,
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


def uninstall(transformer: FluxTransformer2DModel) -> None:
    """diffusers' own blocks again."""
    for module in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        module.__dict__.pop("forward", None)


def _uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return function
