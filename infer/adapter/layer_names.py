"""What FLUX.1's layers are called: by diffusers, by Black Forest Labs (kohya and ComfyUI follow) and by XLabs.

Black Forest Labs' model has one layer where diffusers has several that read the same input; their rows stand in the
order given here. Sources: black-forest-labs/flux `model.py`, kohya-ss/sd-scripts `networks/convert_flux_lora.py`,
XLabs-AI/x-flux `layers.py`, and diffusers' `convert_flux_transformer_checkpoint_to_diffusers`.
"""

import re

from infer.family import flux1, flux2
from infer.family.family import Table

DOUBLE, SINGLE, OUTSIDE, HALVES_SWAPPED = flux1.NAMES
XLABS_DOUBLE: Table = {
    "processor.qkv_lora1": DOUBLE["img_attn.qkv"],
    "processor.qkv_lora2": DOUBLE["txt_attn.qkv"],
    "processor.proj_lora1": DOUBLE["img_attn.proj"],
    "processor.proj_lora2": DOUBLE["txt_attn.proj"],
}
XLABS_SINGLE: Table = {"processor.qkv_lora": SINGLE["linear1"][:3], "processor.proj_lora": SINGLE["linear2"]}
MLP_RATIO = 4  # rows of proj_mlp for a row of q: in every FLUX.1


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _flattened(*tables: Table) -> Table:
    """Names with underscores for dots, which is how kohya writes them, and each of diffusers' own names as itself."""
    found = {_flat(name): layers for table in tables for name, layers in table.items()}
    parts = {  # OneTrainer numbers the layers that are one in Black Forest Labs' model
        f"{_flat(name)}_{i}": (layer,)
        for table in tables
        for name, layers in table.items()
        for i, layer in enumerate(layers)
        if len(layers) > 1
    }
    return found | parts | {_flat(layer): (layer,) for table in tables for layers in table.values() for layer in layers}


def _own(table: Table) -> Table:
    """diffusers' own names, each as itself."""
    return {_flat(layer): (layer,) for layers in table.values() for layer in layers}


_BLOCK = re.compile(r"(single_transformer_blocks|transformer_blocks|double_blocks|single_blocks)_(\d+)_(.+)")
_DOUBLE = _own(flux2.NAMES.double) | _flattened(DOUBLE, XLABS_DOUBLE)
_SINGLE = _own(flux2.NAMES.single) | _flattened(SINGLE, XLABS_SINGLE)
_OUTSIDE = _own(flux2.NAMES.outside) | _flattened(OUTSIDE)
_OUTSIDE |= {"img_in_proj": OUTSIDE["img_in"]}  # as OneTrainer writes it


def layers_of(name: str) -> tuple[str, ...]:
    """diffusers' names of the layers that anybody's name means, with dots or underscores; () if it means none."""
    match = _BLOCK.fullmatch(_flat(name))
    if match is None:
        return _OUTSIDE.get(_flat(name), ())
    kind, number, rest = match.groups()
    single = kind.startswith("single")
    owner = "single_transformer_blocks" if single else "transformer_blocks"
    return tuple(f"{owner}.{number}.{layer}" for layer in (_SINGLE if single else _DOUBLE).get(rest, ()))


def halves_swapped(name: str) -> bool:
    """Whether a layer's rows stand in two halves that diffusers has the other way round."""
    return _flat(name) == _flat(HALVES_SWAPPED)


def original_name(layer: str) -> tuple[str, tuple[str, ...]]:
    """Black Forest Labs' name of the layer that holds a layer of diffusers', and all of diffusers' layers in it."""
    kind, _, rest = layer.partition(".")
    number, _, inner = rest.partition(".")
    tables = {"transformer_blocks": ("double_blocks", DOUBLE), "single_transformer_blocks": ("single_blocks", SINGLE)}
    if kind not in tables:
        name = next(name for name, layers in OUTSIDE.items() if layer in layers)
        return name, OUTSIDE[name]
    owner, table = tables[kind]
    name = next(name for name, layers in table.items() if inner in layers)
    return f"{owner}.{number}.{name}", tuple(f"{kind}.{number}.{layer}" for layer in table[name])
