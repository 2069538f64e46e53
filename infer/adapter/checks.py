"""What settings ask of a checkpoint and of adapter files, compared before anything is loaded: by configs and headers.

What loading itself finds (a layer stored otherwise than asked, a shape that does not fit) is checked there again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from infer.adapter.factors import Factors
from infer.adapter.fit import check_alone, check_same_factors, fitting_adapter, fitting_factors, fitting_pairs
from infer.adapter.lora import FROM_ERROR, Adapter
from infer.adapter.selection import Trained
from infer.adapter.sizes import match_adapter
from infer.checkpoint.checks import check_stored
from infer.checkpoint.family import family_of, unguided
from infer.checkpoint.files import read_config
from infer.checkpoint.layers import linear_shapes
from infer.checkpoint.load import load_scheduler
from infer.checkpoint.model import Model
from infer.family.family import Linear
from infer.fast.memory import Memory, refuse_plain
from infer.quantize.eight_bit_products import check_card
from infer.quantize.precision import Precision, check_layer_names, kind_asked

if TYPE_CHECKING:
    import torch

SIDE = 128  # infer/fast/unpack_8bit.py


def check_precision(model: Model, precision: Precision, layers: Collection[str]) -> None:
    """Raises:
    ValueError: the precision names layers that there are not, or the checkpoint is quantized otherwise.
    """
    check_layer_names(precision, layers)
    if not model.random:
        large = [encoder.part for encoder in family_of(model).ENCODERS if encoder.large]
        for part, asked in (("transformer", precision), *((part, precision.for_t5()) for part in large)):
            stored = read_config(model, part).get("quantization_config")
            if stored:
                check_stored(model.path, stored, asked, part)


def check_guidance(model: Model, guidance: float | None, name: str = "sampling.guidance") -> None:
    """Refuse guidance in drawing of a model that takes none. guidance: as it was asked for, None where it was not.

    Raises:
        ValueError: it has no effect.
    """
    reason = unguided(model)
    if guidance is not None and reason is not None:
        raise ValueError(f"{name} is {guidance:g}, which has no effect on {model.path}: {reason}; leave it at null")


def check_trained_guidance(model: Model, guidance: float, default: float) -> None:
    """Refuse a guidance embedding in training of a model that has none.

    Raises:
        ValueError: it is not the default, and has no effect.
    """
    if guidance != default and not read_config(model, "transformer").get("guidance_embeds"):
        raise ValueError(
            f"flow.guidance is {guidance:g}, which has no effect on {model.path}: its transformer has no guidance "
            f"embedding; leave it at {default:g}"
        )


def shift_of(model: Model) -> float | None:
    """The fixed shift of a checkpoint's sampler (1 for schnell: none); None where it depends on the picture's size as
    FLUX.1-dev's does.

    Raises:
        ValueError: it depends on the size in another way.
    """
    config = load_scheduler(model).config
    if not config.use_dynamic_shifting:
        return float(config.shift)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift", "time_shift_type")
    values = tuple(config[name] for name in names)
    if values != (256, 4096, 0.5, 1.15, "exponential"):
        raise ValueError(
            f"flow.density=shifted follows FLUX.1-dev's sampler, and that of {model.path} has "
            f"{', '.join(f'{name}={value}' for name, value in zip(names, values, strict=True))}; "
            "set flow.density=logit_normal and flow.logit_mean"
        )
    if abs(family_of(model).mu(config, 4096, 28) - 1.15) > 1e-6:
        raise ValueError(
            f"flow.density=shifted follows FLUX.1-dev's sampler, and that of {model.path} shifts by another rule; set "
            "flow.density=logit_normal and flow.logit_mean"
        )
    return None


def check_path(
    memory: Memory, precision: Precision, device: torch.device, layers: Mapping[str, Linear], reason: str | None = None
) -> Memory:
    """The memory settings as they can be met; `reason`: why the adapters cannot run on the fast path, if so.

    Raises:
        ValueError: a setting needs a GPU, or the fast path, and there is none.
    """
    blocks = {tuple(layer.split(".")[:2]) for layer in layers if "blocks." in layer}
    if memory.keep_all > len(blocks):
        raise ValueError(
            f"memory.keep_all is {memory.keep_all}, but the transformer has {len(blocks)} blocks; set "
            f"memory.keep_all={len(blocks)} or less, or memory=fast"
        )
    if memory.unpacked and (not precision.quantized or precision.products != "bf16"):
        reason = (
            f"precision.products={precision.products} reads packed ones" if precision.quantized else "none are packed"
        )
        raise ValueError(
            f"memory.unpacked=true keeps copies of unpacked weights, but {reason}; set memory.unpacked=false"
        )
    if memory.graph and device.type != "cuda":
        raise ValueError(f"memory.graph=true captures CUDA steps, but the device is {device}; set it to false or null")
    if not memory.fused:
        reason = "memory.fused is false"
    elif precision.llm_int8:
        reason = "LLM.int8 multiplies by its own kernels"
    else:
        from infer.fast.weights import split_kinds

        reason = reason or split_kinds({layer: kind_asked(precision, layer) for layer in layers})
    check_card(precision.products, device)
    if precision.products != "bf16":
        check_sides(precision.products, layers)
    return refuse_plain(memory, device, reason, precision.products)


def check_sides(products: str, layers: Mapping[str, Linear]) -> None:
    """See that the blocks' layers can be cut into the tiles of products in 8 bits.

    Raises:
        ValueError: a layer cannot.
    """
    for name, layer in layers.items():
        if "blocks." in name and (layer.rows % SIDE or layer.columns % SIDE):
            raise ValueError(
                f"precision.products={products} needs layers whose sides are multiples of {SIDE}, and {name} is "
                f"{layer.rows} x {layer.columns}; set precision.products=bf16"
            )


def undecided(precision: Precision) -> Precision | None:
    """What is known of kind auto before its layers have been measured: most of them are NF4. None for other kinds."""
    return replace(precision, kind="nf4", budget_gib=None) if precision.kind == "auto" else None


def check_training(
    model: Model, precision: Precision, adapter: Adapter, memory: Memory, device: torch.device
) -> Memory:
    """See that an adapter can be trained on a checkpoint at a precision; returns the memory settings as they can be
    met. Of kind auto, whose mixture is not known yet, what depends on that is left to a second call.

    Raises:
        ValueError: it cannot, for any reason that can be known before something is loaded.
    """
    from infer.adapter.attach import check_recovery, check_start
    from infer.adapter.error_init import minus, nothing_quantized, read_start
    from infer.checkpoint.originals import check_unquantized

    if early := undecided(precision):
        precision, adapter = early, replace(adapter, recovery=None, start=None)
    layers = linear_shapes(read_config(model, "transformer"))
    check_precision(model, precision, layers)
    targets = match_adapter(layers, adapter)
    asked = partial(kind_asked, precision)
    if adapter.init in FROM_ERROR:
        check_unquantized(model)
        if not any(map(asked, targets)):
            raise ValueError(nothing_quantized(adapter.init))
    if adapter.recovery is not None:
        check_recovery(adapter.recovery, model, precision, layers)
        fitting_pairs(adapter.recovery, layers)
    if adapter.kind != "lora" and adapter.start is not None:
        # sizes are compared where the layers are made
        check_same_factors(fitting_factors(adapter.start, layers), dict.fromkeys(targets), adapter)
    elif adapter.start is not None:
        pairs = fitting_pairs(adapter.start, layers)
        start = read_start(adapter.start, asked)
        if start is not None and start.here and adapter.recovery is None:
            check_unquantized(model)
            pairs = minus(pairs, start.elsewhere)
        elif start is not None:
            pairs = minus(pairs, start.here | start.elsewhere)
        check_start(pairs, adapter, targets)
    reason = None
    if adapter.kind != "lora":
        reason = f"it has no adapters of kind {adapter.kind}"
    elif adapter.dropout > 0:
        reason = "adapter.dropout is above 0"
    elif adapter.dora and adapter.recovery is not None:
        reason = "DoRA beside another adapter"
    return check_path(memory, precision, device, layers, reason)


def check_running(
    model: Model,
    precision: Precision,
    chosen: Trained,
    recovery: str | None,
    memory: Memory,
    device: torch.device,
) -> Memory:
    """See that adapters can be run on a checkpoint at a precision; returns the memory settings with which all of it,
    without the adapters too, takes one path. For kind auto see `check_training`.

    Raises:
        ValueError: they cannot, for any reason that can be known before something is loaded.
    """
    from infer.adapter.attach import check_recovery
    from infer.adapter.error_init import read_start
    from infer.checkpoint.originals import check_unquantized

    if early := undecided(precision):
        precision, recovery = early, None
    layers = linear_shapes(read_config(model, "transformer"))
    check_precision(model, precision, layers)
    on = chosen.all()
    found = [fitting_adapter(one.path, layers) for one in on]
    for one, adapter in zip(on, found, strict=True):
        if isinstance(adapter, Factors):
            check_alone(one.path, adapter, len(on) + (recovery is not None), one.weight)
            return check_path(memory, precision, device, layers, f"it has no adapters of kind {adapter.kind}")
    read = [adapter for adapter in found if not isinstance(adapter, Factors)]
    first = True
    for one in on:
        start = read_start(one.path, partial(kind_asked, precision))
        if start is None or not start.here or one.weight != 1.0 or recovery is not None or not first:
            continue
        first = False
        if start.init == "loftq":
            check_unquantized(model)
            if precision.products != "bf16":
                raise ValueError(
                    f"{one.path} is of adapter.init=loftq, around which layers are rounded again, and the scales of "
                    f"precision.products={precision.products} are found before; set precision.products=bf16"
                )
            if memory.budget_gib is not None or memory.unpacked:
                name, none = ("unpacked", "false") if memory.unpacked else ("budget_gib", "null")
                raise ValueError(
                    f"{one.path} is of adapter.init=loftq, around which layers are rounded again, and "
                    f"memory.{name} holds copies of them; set memory.{name}={none}"
                )
    if recovery is not None:
        check_recovery(recovery, model, precision, layers)
        read.append(fitting_pairs(recovery, layers))
    dora = any(pair.magnitude is not None for pairs in read for pair in pairs.values())
    return check_path(
        memory, precision, device, layers, "DoRA beside another adapter" if dora and len(read) > 1 else None
    )
