"""Whether two checkpoints hold the same weights: hashes of their parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from infer.checkpoint.files import part_folder, read_config
from infer.checkpoint.model import Model
from infer.checkpoint.random_weights import shape_fingerprint
from infer.checkpoint.sources import file_of
from infer.program.remembered import Remembered

MEMORY = Path("runs/cache")  # what was read of local checkpoints


def fingerprint(model: Model, part: str) -> str:
    """A hash of a part's weights and config: what a cache or an adapter made with it depends on.

    Weights downloaded from the Hub are stored under their own SHA-256, which saves reading them; what was read of a
    local folder or a single file is remembered (infer/program/remembered.py).
    """
    if model.random:
        return shape_fingerprint(model.path, part)
    digest, remembered = hashlib.sha256(), Remembered(MEMORY)
    single = file_of(model, part)
    if single is not None:
        config = read_config(model, part)
        digest.update(f"{part} {json.dumps(config, sort_keys=True)}".encode())
        digest.update(remembered.sha256(single))
        remembered.save()
        return digest.hexdigest()
    folder = part_folder(model, part)
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".json", ".model", ".txt", ".jinja"):
            continue
        blob = file.resolve().name
        digest.update(file.name.encode())
        if len(blob) == 64 and file.is_symlink():
            digest.update(blob.encode())
            continue
        digest.update(remembered.sha256(file))
    remembered.save()
    return digest.hexdigest()
