"""LoRA adapters on a quantized transformer: attach one to train, load others, switch them on and off."""

import math
import re
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import nn

from infer.attached import adapter_state as adapter_state
from infer.attached import save_adapter as save_adapter
from infer.attached import set_adapter_state as set_adapter_state
from infer.attached import strengths
from infer.attached import update_norm as update_norm
from infer.flux import Model, fingerprint
from infer.formats import FILE as FILE
from infer.formats import Pairs, read_pairs
from infer.formats import find_adapter as find_adapter
from infer.formats import read_notes as read_notes
from infer.formats_write import lora_config
from infer.quantize import Precision, kind_asked
from infer.residual import FROM_ERROR, Start, round_again, settled
from infer.targets import PRESETS, base_layers, match_targets

RECOVERY = "recovery"
"""The name of the adapter that gives back what quantization took; it stays on beside every other."""
INITS = {"default": True, "gaussian": "gaussian", "orthogonal": True, "residual": True, "loftq": True}
BEGAN = "_began"  # an attribute of a transformer: what the adapter began with that makes up for its quantization


@dataclass
class Adapter:
    """A LoRA adapter (Hu et al. 2021) to train."""

    rank: int = 16
    alpha: float = 16.0
    """Strength: the update is alpha / rank x B A."""
    dropout: float = 0.0
    rslora: bool = False
    """Strength alpha / sqrt(rank) (Kalajdzievski 2023), so that high ranks learn as fast."""
    dora: bool = False
    """Learn each weight column's magnitude apart from its direction (Liu et al. 2024); slower."""
    init: str = "default"
    """default (Kaiming-uniform A, zero B), gaussian (normal A, zero B) or orthogonal; or from the quantization error
    (infer/residual.py): residual (its best approximation of this rank) or loftq (quantized again around it)."""
    targets: str = "attention"
    """A preset (attention, attention+mlp, double, single, all) or a regular expression over whole layer names."""
    start: str | None = None
    """A LoRA file of any program to go on from; null starts anew. Of a higher rank or more layers, the rest is new."""
    recovery: str | None = None
    """A recovery adapter (infer/recover.py) that stays on, frozen, beside this one; null uses none."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter.rank is {self.rank}; it must be 1 or more")
        if not self.alpha > 0:
            raise ValueError(f"adapter.alpha is {self.alpha}; it must be above 0 (alpha = rank is strength 1)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter.dropout is {self.dropout}; it must be at least 0 and below 1")
        if self.init not in INITS:
            raise ValueError(f"adapter.init is {self.init!r}; choose one of {', '.join(INITS)}")
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"adapter.rank is {self.rank}; orthogonal initialisation needs an even rank")
        if self.init != "default" and self.start is not None:
            raise ValueError(f"adapter.init is {self.init} and adapter.start is given; choose one of them")
        if self.init in FROM_ERROR and (self.dora or self.recovery is not None):
            other = "adapter.dora" if self.dora else "adapter.recovery"
            raise ValueError(
                f"adapter.init={self.init} is not made for {other}; set adapter.init=default, or leave it out"
            )
        try:
            re.compile(self.targets)
        except re.error as error:
            raise ValueError(
                f"adapter.targets {self.targets!r} is neither a preset ({', '.join(PRESETS)}) nor a regular "
                f"expression: {error}"
            ) from error


def attach(
    transformer: FluxTransformer2DModel, adapter: Adapter, seed: int, name: str = "default", model: Model | None = None
) -> list[nn.Parameter]:
    """Freeze the transformer, add a trainable adapter in fp32 and return its parameters. `model` is the transformer's
    checkpoint, which going on from an adapter of init=loftq needs.

    fp32 because a small update to a bf16 weight rounds to nothing (PEFT starts in bf16 beside 4-bit layers).

    Raises:
        ValueError: the targets match nothing, or what is to be started from does not fit.
    """
    targets = match_targets(transformer, adapter.targets)
    transformer.requires_grad_(False)
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
    with torch.random.fork_rng():
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


def start_from(transformer: FluxTransformer2DModel, adapter: Adapter, name: str, model: Model | None) -> None:
    """Have a new adapter begin as the one in the file `adapter.start`.

    If that is of init=residual or loftq, it goes on as it is where layers are stored as they were in its training;
    elsewhere, and beside a recovery adapter, what it began with is taken off, for which it needs twice its rank.

    Raises:
        ValueError: it has layers, ranks or a kind that the new one has not.
    """
    assert adapter.start is not None
    pairs = read_pairs(adapter.start)
    check_fit(pairs, transformer, adapter.start)
    alone = RECOVERY not in transformer.peft_config
    pairs, start = settled(transformer, adapter.start, pairs, model, alone)
    own = strengths(transformer, name)
    check_start(pairs, adapter, own)
    for layer, pair in pairs.items():
        module: Any = transformer.get_submodule(layer)
        rank = pair.down.shape[0]
        module.lora_A[name].weight.data[:rank] = pair.down
        module.lora_B[name].weight.data.zero_()[:, :rank] = pair.up.float() * (pair.strength / own[layer])
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
    """By adapter, the start from a quantization error that is in its weights now: what has to be kept beside it."""
    found: dict[str, Start] = transformer.__dict__.setdefault(BEGAN, {})
    return found


def _keep(transformer: nn.Module, name: str, start: Start | None) -> None:
    if start is not None:
        began(transformer)[name] = start


def check_fit(pairs: Pairs, transformer: nn.Module, path: str) -> None:
    """Compare pairs with the layers that they are for.

    Raises:
        ValueError: a layer is unknown to the transformer, or has other features.
    """
    layers = base_layers(transformer)
    unknown = [layer for layer in pairs if layer not in layers]
    if unknown:
        raise ValueError(
            f"{path} does not fit this model: {len(unknown)} of {len(pairs)} layers are unknown to it "
            f"({unknown[0]}, ...); choose the adapter's own base model"
        )
    for name, pair in pairs.items():
        wide, narrow = pair.up.shape[0], pair.down.shape[1]
        layer = layers[name]
        if (wide, narrow) != (layer.out_features, layer.in_features):
            raise ValueError(
                f"{path} does not fit this model at {name}: it maps {narrow} to {wide} features where the layer maps "
                f"{layer.in_features} to {layer.out_features}; choose the adapter's own base model"
            )


def put_pairs(transformer: FluxTransformer2DModel, pairs: Pairs, name: str) -> None:
    """Attach pairs that fit as a frozen adapter in the transformer's dtype, on and alone; DoRA's magnitudes in fp32,
    since each scales a whole row of a weight."""
    with torch.random.fork_rng():
        transformer.add_adapter(lora_config(pairs), adapter_name=name)
    attached = strengths(transformer, name)
    assert attached.keys() == pairs.keys(), f"{len(attached)} of {len(pairs)} layers were attached"
    for layer, pair in pairs.items():
        module: Any = transformer.get_submodule(layer)
        dtype = transformer.dtype
        values = {module.lora_A[name]: pair.down.to(dtype), module.lora_B[name]: pair.up.to(dtype)}
        if pair.magnitude is not None:
            values[module.lora_magnitude_vector[name]] = pair.magnitude.float()
        for holder, value in values.items():
            holder.weight.data = value.to(holder.weight.device)
            holder.weight.requires_grad_(False)


def load_adapter(
    transformer: FluxTransformer2DModel, path: str, name: str, model: Model | None = None, weight: float = 1.0
) -> int:
    """Load an adapter file of any program (infer/formats.py), on and alone; returns its layers. `model` is the
    transformer's checkpoint, which adapters of init=loftq need; `weight` is what it will be on with.

    Of an adapter that starts from a quantization error, all is used where nothing else makes up for that error: at
    weight 1, without a recovery adapter, and of several such adapters the first. Else what it began with is taken off.

    Raises:
        ValueError: the name is taken, the file is unreadable or broken, or does not fit this transformer.
    """
    if name in getattr(transformer, "peft_config", {}):
        raise ValueError(f"there is an adapter {name!r} already; give this one another name")
    pairs = read_pairs(path)
    check_fit(pairs, transformer, path)
    alone = weight == 1.0 and not began(transformer) and RECOVERY not in getattr(transformer, "peft_config", {})
    pairs, start = settled(transformer, path, pairs, model, alone)
    put_pairs(transformer, pairs, name)
    _keep(transformer, name, start)
    if RECOVERY in transformer.peft_config and name != RECOVERY:
        set_adapters(transformer, {name: 1.0})
    return len(pairs)


def remove_adapter(transformer: FluxTransformer2DModel, name: str, model: Model) -> None:
    """Take an adapter off again; layers that were rounded around it (init=loftq) are as they were loaded."""
    transformer.delete_adapters(name)
    start = began(transformer).pop(name, None)
    if start is not None:
        round_again(transformer, start, model)


def load_recovery(transformer: FluxTransformer2DModel, path: str, model: Model, precision: Precision) -> int:
    """Load a recovery adapter, to stay on beside every other; returns its layers.

    Raises:
        ValueError: it is none, or was made for another checkpoint or another rounding.
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
    theirs = Precision(**notes["precision"])
    kinds = {layer: (kind_asked(theirs, layer), kind_asked(precision, layer)) for layer in layers}
    other = [layer for layer, (own, asked) in kinds.items() if own != asked]
    said = None
    if made["base"] != fingerprint(model, "transformer"):
        said = "another checkpoint"
    elif theirs.kind != precision.kind:
        said = f"kind={theirs.kind}, not {precision.kind}"
    elif other:
        own, asked = (kind or "not quantized" for kind in kinds[other[0]])
        said = f"another mixture: {other[0]} was {own} and is {asked}, as one of {len(other)} layers"
    elif theirs.double_quant != precision.double_quant:
        said = f"double_quant={theirs.double_quant}, not {precision.double_quant}"
    if said is not None:
        raise ValueError(f"the recovery adapter {path} was made for {said}; make one with infer/recover.py")


def set_adapters(transformer: FluxTransformer2DModel, weights: dict[str, float]) -> None:
    """Have exactly these adapters on, each at its weight times its own strength, and the recovery adapter, if there is
    one, beside them. None restores the base model's output bit for bit.

    Raises:
        ValueError: there is no such adapter (diffusers would draw the base model), or a weight is no number.
    """
    there = getattr(transformer, "peft_config", {})
    for name, weight in weights.items():
        if name not in there:
            loaded = ", ".join(there) or "none"
            raise ValueError(f"there is no adapter {name!r}; loaded are {loaded}")
        if not math.isfinite(weight):
            raise ValueError(f"the weight of adapter {name!r} is {weight}; give a number")
    if not there:
        return
    on = {name: weight for name, weight in ({RECOVERY: 1.0} | weights).items() if weight and name in there}
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    if on:
        transformer.enable_adapters()
        transformer.set_adapters(list(on), list(on.values()))
    else:
        transformer.disable_adapters()
    transformer.requires_grad_(False)  # PEFT has every adapter learn that is on
    for parameter in trained:
        parameter.requires_grad_(True)


def switch(transformer: FluxTransformer2DModel, on: bool) -> None:
    """All adapters on at weight 1, or all but the recovery adapter off, which without one restores the base bit for
    bit."""
    set_adapters(transformer, dict.fromkeys(transformer.peft_config, 1.0) if on else {})
