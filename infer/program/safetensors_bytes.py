"""Tensors -> the bytes of a safetensors file, the same ones for the same tensors and notes."""

import json

from safetensors.torch import save
from torch import Tensor


def packed(tensors: dict[str, Tensor], notes: dict[str, str] | None = None) -> bytes:
    """The file's bytes. safetensors itself writes the notes in another order in each process, so that two runs that
    learned the same would differ as files."""
    content = save(tensors, metadata=notes)
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if notes:
        header["__metadata__"] = dict(sorted(notes.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    return b"".join([len(text).to_bytes(8, "little"), text, memoryview(content)[8 + length :]])
