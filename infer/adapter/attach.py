"""Adapters on a quantized transformer: attach one to train, load others, take them off."""

import re
from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import LoraConfig
from torch import nn

from infer.adapter.attached import adapter_state, set_adapter_state, strengths
from infer.adapter.error_init import Start, round_again, settled
from infer.adapter.factors import Factors
from infer.adapter.fit import check_alone, check_same_factors, fitting_adapter, fitting_factors, fitting_pairs, sizes_of
from infer.adapter.lora import INITS, RECOVERY, Adapter
from infer.adapter.read import Pairs, find_adapter, read_notes
from infer.adapter.sizes import match_adapter
from infer.adapter.switch import set_adapters
from infer.adapter.targets import base_layers
from infer.adapter.tuner import attach_tuner, config_of, factors_of, put_factors
from infer.adapter.write import lora_config
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.model import Model
from infer.family.family import Linear
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision, kind_asked

BEGAN = "_began"  # an attribute of a transformer: by adapter, its start from a quantization error
METHODS = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
"""Names that a module within PEFT's dictionaries of modules and parameters cannot have."""


def own_random() -> AbstractContextManager[None]:
    """Within, random numbers can be drawn without changing those that are drawn afterwards, on the CPU and on this
    process's GPU. That GPU is named because torch warns if it has to take all of them."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else [])


def attach(
    transformer: Any, adapter: Adapter, seed: int, name: str = "default", model: Model | None = None
) -> list[nn.Parameter]:
    """Freeze the transformer, add a trainable adapter in fp32 and return its parameters. `model` is the transformer's
    checkpoint, which going on from an adapter of init=loftq needs.

    fp32 because a small update to a bf16 weight rounds to nothing (PEFT starts in bf16 beside 4-bit layers).

    Raises:
        ValueError: the targets match nothing, or what is to be started from does not fit.
    """
    shapes = shapes_of(transformer)
    targets = match_adapter(shapes, adapter)
    transformer.requires_grad_(False)
    if adapter.kind != "lora":
        chosen = {layer: shapes[layer] for layer in targets}
        config = config_of(adapter.kind, adapter.rank, adapter.alpha, adapter.factor, adapter.block, chosen)
        with own_random():
            torch.manual_seed(seed)
            parameters = attach_tuner(transformer, config, name)
        if adapter.start is not None:
            start_from_factors(transformer, adapter, name, shapes)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        init_lora_weights=INITS[adapter.init],
        # as a pattern: PEFT takes each name of a list for an ending, and `proj_out` ends many
        target_modules="|".join(map(re.escape, targets)),
    )
    with own_random():
        torch.manual_seed(seed)
        transformer.add_adapter(config, adapter_name=name)
        if adapter.init == "orthogonal":
            for layer in strengths(transformer, name):
                _make_orthogonal(transformer.get_submodule(layer), name)
    parameters = [p for n, p in transformer.named_parameters() if f".{name}." in n and "lora_" in n]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    attached = len(strengths(transformer, name))
    assert attached == len(targets), f"{attached} layers were adapted instead of {len(targets)}"
    if adapter.start is not None:
        start_from(transformer, adapter, name, model)
    if RECOVERY in transformer.peft_config:
        set_adapters(transformer, {RECOVERY: 1.0, name: 1.0})
        transformer.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def shapes_of(transformer: nn.Module) -> dict[str, Linear]:
    """The sizes of the model's own linear layers."""
    return {name: Linear(layer.out_features, layer.in_features) for name, layer in base_layers(transformer).items()}


def start_from_factors(transformer: nn.Module, adapter: Adapter, name: str, shapes: Mapping[str, Linear]) -> None:
    """Have a new LoKr, LoHa or OFT begin as the one in the file `adapter.start`, whose strength goes into its factors.

    Raises:
        ValueError: it cannot be read, is of another kind, or has layers or sizes that the new one has not.
    """
    assert adapter.start is not None
    begun = fitting_factors(adapter.start, shapes)
    here = factors_of(transformer, name)
    check_same_factors(begun, {layer: sizes_of(parts) for layer, parts in here.layers.items()}, adapter)
    state = adapter_state(transformer, name)
    for layer, parts in begun.layers.items():
        ratio = begun.strengths[layer] / here.strengths[layer]
        for part, value in parts.items():
            first = part in ("lokr_w1", "lokr_w1_a", "hada_w1_a")
            state[f"{layer}.{part}"] = value.float() * ratio if first else value.float()
    set_adapter_state(transformer, state, name)


def _make_orthogonal(module: Any, name: str) -> None:
    """Fill A and B at random over two halves of an orthogonal basis, so that B A is 0 and neither of them is.

    As PEFT's init_lora_weights="orthogonal", which writes them in the dtype of the layer's own weight: packed 4-bit and
    int8 weights it cannot take, and in bf16 the product is not 0.
    """
    rank = module.r[name]
    basis, _ = torch.linalg.qr(torch.randn(rank, rank))
    down = torch.randn(module.in_features, rank // 2) @ basis[0::2] / 10  # [in, rank]
    up = torch.randn(module.out_features, rank // 2) @ basis[1::2] / 10  # [out, rank]
    for holder, value in ((module.lora_A[name], down.T), (module.lora_B[name], up)):
        holder.weight.data = value.contiguous().to(holder.weight.device)


def start_from(transformer: Any, adapter: Adapter, name: str, model: Model | None) -> None:
    """Have a new adapter begin as the one in the file `adapter.start`.

    If that is of init=residual or loftq, it goes on as it is where layers are stored as they were in its training;
    elsewhere, and beside a recovery adapter, what it began with is taken off, for which it needs twice its rank.

    Raises:
        ValueError: it cannot be read, or has layers, ranks or a kind that the new one has not.
    """
    assert adapter.start is not None
    pairs = fitting_pairs(adapter.start, shapes_of(transformer))
    alone = RECOVERY not in transformer.peft_config
    pairs, start = settled(transformer, adapter.start, pairs, model, alone)
    adapted = strengths(transformer, name)
    check_start(pairs, adapter, adapted)
    for layer, pair in pairs.items():
        module: Any = transformer.get_submodule(layer)
        rank = pair.down.shape[0]
        module.lora_A[name].weight.data[:rank] = pair.down
        module.lora_B[name].weight.data.zero_()[:, :rank] = pair.up.float() * (pair.strength / adapted[layer])
        if pair.magnitude is not None:
            module.lora_magnitude_vector[name].weight.data.copy_(pair.magnitude)
    _keep(transformer, name, start)


def check_start(pairs: Pairs, adapter: Adapter, layers: Container[str]) -> None:
    """Compare what is gone on from with the adapter that is to go on; `layers`: those that it is on.

    Raises:
        ValueError: it has layers, ranks or a kind that the new one has not.
    """
    lost = sorted(layer for layer in pairs if layer not in layers)
    if lost:
        raise ValueError(
            f"adapter.start {adapter.start} adapts {len(lost)} layers that adapter.targets={adapter.targets} does not "
            f"({lost[0]}, ...); choose targets that hold them all"
        )
    most = max(pair.down.shape[0] for pair in pairs.values())
    if most > adapter.rank:
        raise ValueError(f"adapter.start {adapter.start} has rank {most}; set adapter.rank={most} or more")
    if adapter.dora != (next(iter(pairs.values())).magnitude is not None):
        raise ValueError(
            f"adapter.start {adapter.start} is {'LoRA' if adapter.dora else 'DoRA'}; set adapter.dora to it"
        )


def began(transformer: nn.Module) -> dict[str, Start]:
    """By adapter, the start from a quantization error that its weights hold, which is saved beside it."""
    found: dict[str, Start] = transformer.__dict__.setdefault(BEGAN, {})
    return found


def _keep(transformer: nn.Module, name: str, start: Start | None) -> None:
    if start is not None:
        began(transformer)[name] = start


def put_pairs(transformer: Any, pairs: Pairs, name: str) -> None:
    """Attach pairs that fit as a frozen adapter in the dtype that the transformer computes in, on and alone; DoRA's
    magnitudes in fp32, since each scales a whole row of a weight."""
    with own_random():
        transformer.add_adapter(lora_config(pairs), adapter_name=name)
    attached = strengths(transformer, name)
    assert attached.keys() == pairs.keys(), f"{len(attached)} of {len(pairs)} layers were attached"
    for layer, pair in pairs.items():
        module: Any = transformer.get_submodule(layer)
        dtype = compute_dtype_of(transformer)
        values = {module.lora_A[name]: pair.down.to(dtype), module.lora_B[name]: pair.up.to(dtype)}
        if pair.magnitude is not None:
            values[module.lora_magnitude_vector[name]] = pair.magnitude.float()
        for holder, value in values.items():
            holder.weight.data = value.to(holder.weight.device)
            holder.weight.requires_grad_(False)


def load_adapter(transformer: Any, path: str, name: str, model: Model | None = None, weight: float = 1.0) -> int:
    """Load an adapter file of any program (infer/adapter/read.py), on and alone; returns its layers. `model` is the
    transformer's checkpoint, which adapters of init=loftq need; `weight` is what it will be on with.

    Of an adapter that starts from a quantization error, all is used where nothing else makes up for that error: at
    weight 1, without a recovery adapter, and of several such adapters the first. Else what it began with is taken off.

    Raises:
        ValueError: the name is taken or cannot be a module's, or the file is unreadable, broken, or does not fit this
            transformer.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"there is an adapter {name!r} already; give this one another name")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name, re.ASCII) or "lora" in name.lower() or name in METHODS:
        raise ValueError(
            f"an adapter cannot be named {name!r}: it is a module's name in the model, made of letters, digits, _ and "
            "-, without lora, and not that of a method of torch's modules such as train; give it another name"
        )
    shapes = shapes_of(transformer)
    pairs = fitting_adapter(path, shapes)
    if isinstance(pairs, Factors):
        check_alone(path, pairs, 1 + len(getattr(transformer, "peft_config", {})), weight)
        put_factors(transformer, pairs, name, compute_dtype_of(transformer))
        return len(pairs.layers)
    alone = weight == 1.0 and not began(transformer) and RECOVERY not in getattr(transformer, "peft_config", {})
    pairs, start = settled(transformer, path, pairs, model, alone)
    put_pairs(transformer, pairs, name)
    _keep(transformer, name, start)
    if RECOVERY in transformer.peft_config and name != RECOVERY:
        set_adapters(transformer, {name: 1.0})
    return len(pairs)


def remove_adapter(transformer: Any, name: str, model: Model) -> None:
    """Take an adapter off again; layers that were rounded around it (init=loftq) are as they were loaded."""
    transformer.delete_adapters(name)
    start = began(transformer).pop(name, None)
    if start is not None:
        round_again(transformer, start, model)


def load_recovery(transformer: Any, path: str, model: Model, precision: Precision) -> int:
    """Load a recovery adapter, to stay on beside every other; returns its layers.

    Raises:
        ValueError: it is none, was made for another checkpoint or another rounding, or does not fit.
    """
    check_recovery(path, model, precision, base_layers(transformer))
    return load_adapter(transformer, path, RECOVERY)


def check_recovery(path: str, model: Model, precision: Precision, layers: Iterable[str]) -> None:
    """See that a recovery adapter belongs to a checkpoint at a precision; `layers`: names of its linear layers.

    Raises:
        ValueError: it is none, or was made for another checkpoint or another rounding.
    """
    notes = read_notes(find_adapter(path))
    made = notes.get("recovers")
    if made is None:
        raise ValueError(f"{path} is no recovery adapter; make one with infer/recover.py")
    # all of its precision, layers of other kinds too
    recovered = Precision(**notes["precision"])
    kinds = {layer: (kind_asked(recovered, layer), kind_asked(precision, layer)) for layer in layers}
    other = [layer for layer, (made_for, asked) in kinds.items() if made_for != asked]
    said = None
    if made["base"] != fingerprint(model, "transformer"):
        said = "another checkpoint"
    elif recovered.kind != precision.kind:
        said = f"kind={recovered.kind}, not {precision.kind}"
    elif other:
        made_for, asked = (kind or "not quantized" for kind in kinds[other[0]])
        said = f"another mixture: {other[0]} was {made_for} and is {asked}, as one of {len(other)} layers"
    elif recovered.double_quant != precision.double_quant:
        said = f"double_quant={recovered.double_quant}, not {precision.double_quant}"
    if said is not None:
        raise ValueError(f"the recovery adapter {path} was made for {said}; make one with infer/recover.py")
