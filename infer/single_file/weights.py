"""A part's tensors by the names of its library, each read from a single file when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infer.family.family import Family
from infer.single_file.contents import base_in, check_part
from infer.single_file.header import Header, check_stored_kinds, read_header
from infer.single_file.tensors import Tensors
from infer.single_file.transformer import Piece, place_tensors


class Weights(Mapping[str, Tensor]):
    """Tensors of a file by other names than the file's; none is kept."""

    def __init__(self, file: Path, pieces: dict[str, Piece], device: torch.device) -> None:
        """device: on which tensors are dequantized and given."""
        self.pieces, self.tensors = pieces, Tensors(file, device)

    def __getitem__(self, name: str) -> Tensor:
        piece = self.pieces[name]
        value = self.tensors.read(piece.name, piece.start, piece.rows)
        if not piece.swapped:
            return value
        shift, scale = value.chunk(2)
        return torch.cat([scale, shift])

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def rank(self, name: str) -> int:
        """How many dimensions a tensor has."""
        return len(self.tensors.header.tensors[self.pieces[name].name].shape)

    def numel(self, name: str) -> int:
        """Values of a tensor; of one that is rows of another in the file, those of the whole."""
        return math.prod(self.tensors.header.tensors[self.pieces[name].name].shape)

    def kind(self, name: str) -> str:
        """How a tensor is stored."""
        return self.tensors.header.tensors[self.pieces[name].name].kind


class Unread:
    """A tensor that transformers reads by `tensor[...]`, as it does one of a safetensors file."""

    def __init__(self, weights: Weights, name: str) -> None:
        self.weights, self.name = weights, name

    def __getitem__(self, index: Any) -> Tensor:
        return self.weights[self.name][index]


def transformer_weights(file: Path, config: Mapping[str, Any], device: torch.device) -> Weights:
    """The transformer's, by diffusers' names.

    Raises:
        ValueError: the file lacks some, or does not fit the config.
    """
    header = read_header(file)
    return Weights(file, place_tensors(file, header, base_in(file), config), device)


def text_weights(
    file: Path, family: Family, part: str, config: Mapping[str, Any], names: Collection[str], device: torch.device
) -> Weights:
    """A text encoder's, by transformers' names. names: of all its tensors; those that the file lacks are left out.

    Raises:
        ValueError: the file holds no such encoder, or stores it in a way that is not read.
    """
    prefix, header = check_part(file, family, part, config), read_header(file)
    pieces = _of_llama_cpp(header, names) if header.architecture else {
        name: Piece(prefix + name) for name in names if prefix + name in header.tensors
    }  # fmt: skip
    check_stored_kinds(file, header, [piece.name for piece in pieces.values()])
    return Weights(file, pieces, device)


def _of_llama_cpp(header: Header, names: Collection[str]) -> dict[str, Piece]:
    """Where in a GGUF the tensors of a text encoder are, by the gguf package's table of llama.cpp's names."""
    import gguf

    (arch,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == header.architecture)
    blocks = sum(name.endswith(".attn_q.weight") for name in header.tensors)
    table, pieces = gguf.get_tensor_name_map(arch, blocks), {}
    for name in names:
        layer, _, end = name.rpartition(".")
        found = table.get_name(layer) or table.get_name(f"model.{layer}")
        if found and f"{found}.{end}" in header.tensors:
            pieces[name] = Piece(f"{found}.{end}")
    return pieces


def autoencoder_weights(file: Path, family: Family, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The autoencoder's tensors by diffusers' names: from Black Forest Labs' by diffusers' converter, or as they are.

    Raises:
        ValueError: the file holds no autoencoder, or stores it in a way that is not read.
    """
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    prefix, header = check_part(file, family, "vae", config), read_header(file)
    names = {name.removeprefix(prefix): name for name in header.tensors if name.startswith(prefix)}
    check_stored_kinds(file, header, [name for own, name in names.items() if own.endswith((".weight", ".bias"))])
    tensors = Tensors(file, torch.device("cpu"))
    own = {name: tensors.read(stored) for name, stored in names.items()}
    if not any(".down." in name for name in own):
        return own
    # FLUX.2's has these two within the encoder and the decoder
    moved = {name.replace("encoder.quant_conv.", "quant_conv.").replace("decoder.post_quant_conv.", "post_quant_conv."):
             value for name, value in own.items()}  # fmt: skip
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(moved, dict(config))
    return converted | {name: value for name, value in own.items() if name.startswith("bn.")}
