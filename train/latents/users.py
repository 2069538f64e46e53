"""The runs that have used a cache: `users/` in its folder holds a file for each, with the keys and folders it uses.

    {"run": "/home/me/runs/mine", "folders": ["tables/5f0c..."], "keys": "00c1a5...ff"}

Keys are cut to 16 hexadecimal digits and joined. The record of a run whose folder is gone counts no more.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from infer.program.atomic import replace_file
from train.latents.store import Cache

USERS = "users"
DIGITS = 16  # of a key


def record_use(cache: Cache, run: Path, folders: Collection[Path]) -> None:
    """Write down what a run uses: the encodings that its cache was built for, and these folders of tables and class
    pictures."""
    run = run.resolve()
    keys = sorted(key[:DIGITS] for kind in cache.indexes for key in cache.all_keys(kind))
    names = sorted(str(folder.relative_to(cache.folder)) for folder in folders)
    text = json.dumps({"run": str(run), "folders": names, "keys": "".join(keys)})
    name = hashlib.sha256(str(run).encode()).hexdigest()[:DIGITS]
    replace_file(cache.folder / USERS / f"{name}.json", lambda path: path.write_text(text))


def uses(folder: Path) -> Iterator[tuple[str, set[str], set[Path]]]:
    """Each run that is still there: its folder, the cut keys that it uses, and the folders within the cache."""
    for file in sorted((folder / USERS).glob("*.json")):
        try:
            found = json.loads(file.read_text())
            run, joined = Path(found["run"]), str(found["keys"])
            within = {folder / name for name in found["folders"]}
        except (OSError, ValueError, KeyError, TypeError):  # torn by something else than us: it says nothing
            continue
        if run.is_dir():
            yield str(run), {joined[i : i + DIGITS] for i in range(0, len(joined), DIGITS)}, within


def forget_gone(folder: Path) -> None:
    """Remove the records of runs whose folders are gone, and those that cannot be read."""
    there = {run for run, _, _ in uses(folder)}
    for file in (folder / USERS).glob("*.json"):
        try:
            gone = json.loads(file.read_text())["run"] not in there
        except (OSError, ValueError, KeyError, TypeError):
            gone = True
        if gone:
            file.unlink()
