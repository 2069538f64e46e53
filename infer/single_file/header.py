"""What a single file of weights holds, by its header alone: names, sizes and how each tensor is stored. No torch.

Safetensors as ComfyUI and Black Forest Labs write them, and GGUF. In fp8 files a weight may have a scale beside it
(`scale_weight` of older files, `weight_scale` of newer ones: ComfyUI's QUANTIZATION.md); scales of activations and
marks are passed over.
"""

from __future__ import annotations

import json
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2"}
"""Safetensors' names of what is read, and ours."""
GGUF_PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
GGUF_KINDS = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "Q3_K", "Q2_K", "IQ4_NL", "IQ4_XS")
"""What diffusers dequantizes (quantizers/gguf/utils.py)."""
SCALES = ("scale_weight", "weight_scale")
"""Beside a `weight` in fp8: what its values are multiplied by."""
MEND = "give the bf16, fp8 or GGUF file of the model: it is quantized while it is loaded"


class Stored(NamedTuple):
    """A tensor in a file."""

    shape: tuple[int, ...]
    kind: str
    """bf16, fp16, fp32, e4m3, e5m2, a kind of GGUF such as Q8_0, or another format's own name for it."""


class Header(NamedTuple):
    """A file's tensors by name, and a GGUF's general.architecture."""

    tensors: dict[str, Stored]
    architecture: str | None

    def scale_of(self, name: str) -> str | None:
        """The name of the scale that an fp8 weight is multiplied by; None if there is none."""
        if not name.endswith("weight"):
            return None
        found = (name.removesuffix("weight") + each for each in SCALES)
        return next((each for each in found if each in self.tensors), None)


def is_gguf(file: Path) -> bool:
    """Whether a file is a GGUF, by its first bytes."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def read_header(file: Path) -> Header:
    """A file's header, read once as long as the file is unchanged.

    Raises:
        ValueError: it is neither safetensors nor GGUF, is cut off, or is a GGUF and the package gguf is not installed.
    """
    status = file.stat()
    return _read(file, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(file: Path, size: int, changed: int) -> Header:
    if is_gguf(file):
        reader = open_gguf(file)
        field: Any = reader.get_field("general.architecture")
        found = {t.name: _gguf_stored(t) for t in reader.tensors}
        return Header(found, None if field is None else str(field.contents()))
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            tensors = {
                name: Stored(tuple(one.get_shape()), PLAIN.get(one.get_dtype(), one.get_dtype()))
                for name, one in slices.items()
            }
            _check_formats(file, tensors, opened.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"cannot read {file}: {error}; download it again") from error
    return Header(tensors, None)


def _gguf_stored(tensor: Any) -> Stored:
    kind = tensor.tensor_type.name
    return Stored(tuple(int(each) for each in reversed(tensor.shape)), GGUF_PLAIN.get(kind, kind))


def open_gguf(file: Path) -> Any:
    """The gguf package's reader of a file, which maps it into memory.

    Raises:
        ValueError: the package is not installed, or the file is broken.
    """
    if find_spec("gguf") is None:
        raise ValueError(
            f"{file} is a GGUF file, which the package gguf reads; install it: pip install -e '.[gguf]' "
            "(or pip install gguf)"
        )
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError) as error:  # as it meets the bytes
        raise ValueError(f"cannot read {file}: {type(error).__name__}: {error}; download it again") from error


def _check_formats(file: Path, tensors: dict[str, Stored], metadata: dict[str, str]) -> None:
    """Refuse layers that ComfyUI's metadata says to be of another format than a plain or scaled fp8.

    Raises:
        ValueError: there are some.
    """
    try:
        layers = json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        kinds = {name: each if isinstance(each, str) else each["format"] for name, each in layers.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read _quantization_metadata of {file} ({error!r}); download it again") from error
    for name, kind in kinds.items():
        if kind not in ("float8_e4m3fn", "float8_e5m2"):
            raise ValueError(f"{file} stores {name} as {kind}, which is not read; {MEND}")
    doubled = next((name for name in tensors if name.endswith((".weight_scale_2", ".pre_quant_scale"))), None)
    if doubled:
        raise ValueError(f"{file} stores {doubled}, the scale of a format that is not read; {MEND}")


def check_stored_kinds(file: Path, header: Header, names: list[str]) -> None:
    """See that tensors are stored as something that is read.

    Raises:
        ValueError: one is not.
    """
    for name in names:
        shape, kind = header.tensors[name]
        if kind not in (*PLAIN.values(), *GGUF_KINDS):
            raise ValueError(f"{file} stores {name} as {kind}, which is not read; {MEND}")
        scale = header.scale_of(name)
        if scale is None:
            continue
        size = header.tensors[scale].shape
        if kind not in ("e4m3", "e5m2") or (size not in ((), (1,)) and size not in ((shape[0],), (shape[0], 1))):
            raise ValueError(
                f"{file} stores {name} as {kind} with scales of size {size}, where fp8 has one for all or one a row "
                f"of its {shape}; {MEND}"
            )
