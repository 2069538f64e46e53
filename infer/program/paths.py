"""Paths that users write: ~ is their home, a name is a path or a Hub id, and the message about a wrong file says what
it is. Only headers are read, and nothing heavy is imported: paths are checked before anything is loaded.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from infer.program.absent import meant

ROOT = Path(__file__).resolve().parents[2]
"""The folder of infer/ and train/: the repository, or the one that a wheel was installed into."""
SHIPPED = ROOT / "infer" / "shipped" if (ROOT / "infer" / "shipped").is_dir() else ROOT
"""The folder of configs/ and scripts/tiny: the repository, or within a wheel's package (setup.py)."""
INSTALLED = SHIPPED != ROOT
CONFIGS = SHIPPED / "configs"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
WEIGHTS = (".safetensors", ".sft", ".gguf")
FILES = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pth", ".bin", ".zip", ".tar", ".gz", ".7z", ".rar",
         ".json", ".jsonl", ".csv", ".parquet", ".arrow", ".txt", ".png", ".jpg", ".jpeg", ".webp")  # fmt: skip
"""Endings that no name on the Hub has."""
LORA = ("lora", "lokr_", "hada_", "oft_")  # in the names of an adapter's tensors
FLUX = ("double_blocks.", "single_blocks.", "transformer_blocks.")  # in those of a FLUX.1 transformer
POINTER = "it is a pointer of Git LFS and not the file itself; fetch that: git lfs pull"
HEADER = 100 * 2**20  # bytes: the longest header that safetensors reads

READ = ("gguf", "flux", "safetensors")  # kinds of files that may hold a model


def expand(options: Any, *names: str) -> None:
    """Put the home folder in the place of a leading ~ in these settings, each a path or None."""
    for name in names:
        path = getattr(options, name)
        if path is not None:
            setattr(options, name, expanded(path))


def expanded(path: str) -> str:
    """A path with the home folder in the place of a leading ~, unless something here has that very name."""
    if not path.startswith("~") or os.path.lexists(path):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # there is no such user
        return path


def is_hub_id(path: str) -> bool:
    """Whether a name is owner/name of the Hub, and nothing here: neither there nor, by its ending, a file."""
    return HUB_ID.fullmatch(path) is not None and not os.path.lexists(path) and not path.lower().endswith(FILES)


def roots_of(folder: Path) -> list[Path]:
    """Folders in which a folder's files may really lie: itself, and for a snapshot in the Hub's cache, whose files are
    links, that repository's blobs."""
    root = folder.resolve()
    snapshots = next((each.parent for each in (root, *root.parents) if each.parent.name == "snapshots"), None)
    return [root] if snapshots is None else [root, snapshots.with_name("blobs")]


def nowhere(option: str, path: str) -> str:
    """The message about a path that is neither here nor a Hub id: of a file by its ending, that it is not there."""
    if not path.lower().endswith(FILES):
        return f"{option} {path!r} is no folder here and no Hub id (owner/name); {meant(path)}"
    folder = Path(path).expanduser().absolute().parent
    if not folder.is_dir():
        return f"{option} {path!r} is not there, nor is its folder {folder}; {meant(path, 'give the file itself')}"
    there = sorted(file.name for file in folder.iterdir() if file.name.lower().endswith(WEIGHTS))
    also = f"; there {'are' if there[1:] else 'is'} {', '.join(there[:3])}" if there else ""
    return f"{option} {path!r} is not there: {folder} has no such file{also}; {meant(path, 'give the file itself')}"


def kind_of_file(file: Path) -> str:
    """What a file is, by its first bytes: gguf, adapter, flux (a transformer's weights), safetensors, pickle, archive,
    pointer (of Git LFS, in the place of the file itself), page (HTML), empty or other."""
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            if not head:
                return "empty"
            if head.lstrip()[:5].lower() in (b"<!doc", b"<html"):
                return "page"
            if head.startswith(b"GGUF"):
                return "gguf"
            if head == b"version " and stream.read(24) == b"https://git-lfs.github.c":
                return "pointer"
            if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!")):
                return "pickle" if file.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin") else "archive"
            if head.startswith(b"\x80") and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
                return "pickle"
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= HEADER:
                return "other"
            names = json.loads(stream.read(length))
            if not isinstance(names, dict):
                return "other"
    except (OSError, ValueError, RecursionError, TypeError):
        return "other"
    if any(mark in name for name in names for mark in LORA):
        return "adapter"
    return "flux" if any(mark in name for name in names for mark in FLUX) else "safetensors"


def refuse_file(path: Path) -> None:
    """Refuse a file that was given as model.path and is no single file with a transformer's weights: what it is, and
    the mend.

    Raises:
        ValueError: it is none.
    """
    kind = kind_of_file(path)
    if kind == "adapter":
        raise ValueError(f"model.path {path} is a LoRA file; give it as adapter.path, and its base model as model.path")
    part = path.parent / "config.json"
    if kind in READ and part.is_file() and (path.parent.parent / "model_index.json").is_file():
        raise ValueError(
            f"model.path {path} is a file of the checkpoint {path.parent.parent}; set model.path to that folder"
        )
    if kind == "pickle":
        raise ValueError(
            f"model.path {path} is a pickled checkpoint, which may run any program when it is read; give the model as "
            "safetensors or GGUF"
        )
    if kind == "pointer":
        raise ValueError(f"model.path {path} is no checkpoint: {POINTER}")
    if path.name == "model_index.json":
        raise ValueError(f"model.path {path} is a file of the checkpoint {path.parent}; set model.path to that folder")
    if kind not in READ:
        raise ValueError(
            f"model.path {path} is a file and no checkpoint; give a diffusers folder, a Hub id (owner/name) or a file "
            "of weights (safetensors or GGUF)"
        )


def no_index(folder: Path) -> str:
    """The message about a folder without model_index.json that was given as model.path: what it is, and the mend."""
    if (folder.parent / "model_index.json").is_file():
        return f"{folder} is a part of the checkpoint {folder.parent}; set model.path to that folder"
    if (folder / "snapshots").is_dir() and folder.name.startswith("models--"):
        name = folder.name.removeprefix("models--").replace("--", "/", 1)
        return f"{folder} is the Hub's cache of {name}; set model.path={name}"
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".safetensors", ".sft", ".gguf"))
    inner = [each.parent.name for each in sorted(folder.glob("*/model_index.json"))]
    if inner:
        return (
            f"{folder} holds no model_index.json, but folders in it do: {', '.join(inner[:3])}; set model.path to one"
        )
    if files and kind_of_file(files[0]) == "adapter":
        return f"{folder} holds a LoRA file; give {files[0]} as adapter.path, and its base model as model.path"
    if files:
        return (
            f"{folder} holds no model_index.json, so it is no diffusers checkpoint; to use a single file in it, set "
            f"model.path={files[0]} (docs/files.md)"
        )
    return (
        f"{folder} holds no model_index.json, so it is no diffusers checkpoint; name the folder that has it, a Hub id, "
        "or a single file of weights (docs/files.md)"
    )
