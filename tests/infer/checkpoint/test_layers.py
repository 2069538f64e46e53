"""The layers that a config gives, against diffusers' own model; and a checkpoint's files against its config."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from infer.checkpoint.files import read_config
from infer.checkpoint.headers import SINGLE, check_model, shards_of
from infer.checkpoint.layers import linear_shapes, norm_sizes
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_config
from infer.family.find import SIZES, of_config

TINY = Model("scripts/tiny/model")
CONFIGS = {path: shape_config(path, "transformer") for path in SIZES} | {"tiny": read_config(TINY, "transformer")}
CONFIGS["fill"] = CONFIGS["tiny"] | {"in_channels": 384, "out_channels": 64}  # as FLUX.1-Fill has them


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_are_those_of_diffusers(name: str) -> None:
    config = CONFIGS[name]
    family = of_config(config)
    with torch.device("meta"):
        cls = getattr(diffusers, family.TRANSFORMER)
        model = cls(**{key: value for key, value in config.items() if not key.startswith("_")})
    linear = {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linear_shapes(config) == linear
    rest = sum(p.numel() for p in model.parameters()) - sum(
        rows * (columns + family.BIAS) for rows, columns in linear.values()
    )
    assert sum(norm_sizes(config).values()) == rest
    assert all(model.get_parameter(f"{norm}.weight").shape == (size,) for norm, size in norm_sizes(config).items())


def _config(change: dict[str, Any]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        config = folder / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | change))

    return spoil


def _tensor(name: str, value: torch.Tensor | None) -> Callable[[Path], object]:
    """Put another tensor in a tensor's place, or take it out."""

    def spoil(folder: Path) -> None:
        for file in shards_of(folder):
            state = load_file(file)
            if state.pop(name, None) is not None:
                save_file(state if value is None else state | {name: value}, file, {"format": "pt"})

    return spoil


def _cut(folder: Path) -> None:
    file = shards_of(folder)[0]
    file.write_bytes(file.read_bytes()[:-100])


SPOILT = {
    "a layer more": (_config({"num_layers": 3}), "lack 32 tensors"),
    "another width": (_config({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}), "is of size"),
    "other axes": (_config({"axes_dims_rope": [8, 28, 30]}), "axes_dims_rope"),
    "a number that is none": (_config({"num_layers": "two"}), "is not that of a FLUX.1 transformer"),
    "cut off": (_cut, "cannot load the transformer"),
    "a bias less": (_tensor("proj_out.bias", None), "lack 1 tensors \\(proj_out.bias"),
    "a norm less": (_tensor("transformer_blocks.1.attn.norm_q.weight", None), "lack 1 tensors"),
    "another size": (_tensor("x_embedder.weight", torch.zeros(3, 4)), "x_embedder.weight is of size \\(3, 4\\)"),
    "a shard less": (lambda folder: shards_of(folder)[-1].unlink(), "cannot load the transformer"),
    "a broken index": (lambda folder: (folder / f"{SINGLE}.index.json").write_text("[]"), "does not say which file"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_transformer_is_refused_by_its_headers(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(TINY.path, folder)
    check_model(Model(str(folder)))
    spoil, said = SPOILT[name]
    spoil(folder / "transformer")
    with pytest.raises(ValueError, match=said):
        check_model(Model(str(folder)))
