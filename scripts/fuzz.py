"""Mutated files for the readers of adapters, checkpoints and cache shards: each is read right or refused in words.

    nice python scripts/fuzz.py --cases 20000
    python scripts/fuzz.py --cases 300 --seed 1          # a quick look

A mutation flips bits, cuts, repeats or swaps pieces, changes the length in front of a safetensors header, or rewrites a
value of its JSON (another type, a huge or negative number, a missing or another name). Right is the value that was
written, or ValueError; for an adapter, which other programs may have written too, any finite one. Wrong are other
exceptions, a file that takes more than ten seconds, and memory that grows by more than 256 MiB. The last line is one
JSON object.
"""

import argparse
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from infer.program.quiet import quieten

    quieten()

import torch
from diffusers import FluxTransformer2DModel

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from scripts.fault.things import Thing, things

LONGEST = 10  # seconds
MEMORY = 256 * 2**20  # bytes
ODD: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, "", "F32", "BF16", "I64", "F8_E4M3", "..",
                  "a" * 999, [], {}, [[]], [0, 2**62], [-4, 4], {"a": {"a": 1}}]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Another file, one to three changes away."""
    for _ in range(rng.randint(1, 3)):
        content = rng.choice((_flip, _flip, _cut, _repeat, _swap, _length, _header, _header, _header))(content, rng)
    return content


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 9))):
        if changed:
            # most of a file is numbers: half of the changes are made where its structure is
            changed[rng.randrange(len(changed) if rng.random() < 0.5 else min(len(changed), 400))] ^= (
                1 << rng.randrange(8)
            )
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:b] + content[a:b] + content[b:]


def _swap(content: bytes, rng: random.Random) -> bytes:
    a, b, c = sorted(rng.randrange(len(content) + 1) for _ in range(3))
    return content[:a] + content[b:c] + content[a:b] + content[c:]


def _length(content: bytes, rng: random.Random) -> bytes:
    """The length of a safetensors header."""
    own = int.from_bytes(content[:8], "little")
    other = rng.choice((0, 1, own - 1, own + 1, own + 8, 2 * own, 2**31, 2**40, 2**63, 2**64 - 1))
    return (other % 2**64).to_bytes(8, "little") + content[8:]


def _header(content: bytes, rng: random.Random) -> bytes:
    """A value of the JSON, in front of a safetensors file or the whole file."""
    length = int.from_bytes(content[:8], "little")
    framed = content[:1] != b"{"
    try:
        tree = json.loads(content[8 : 8 + length] if framed else content)
        tree = _changed(tree, rng)
        text = json.dumps(tree).encode()
    except (ValueError, RecursionError):
        return content
    return len(text).to_bytes(8, "little") + text + content[8 + length :] if framed else text


def _changed(tree: Any, rng: random.Random) -> Any:
    inner = [tree] if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1 else None
    if inner:
        return rng.choice(ODD)
    if isinstance(tree, list):
        place = rng.randrange(len(tree))
        return [_changed(item, rng) if i == place else item for i, item in enumerate(tree)]
    chosen = rng.choice(list(tree))
    if rng.random() < 0.15:
        return {key: item for key, item in tree.items() if key != chosen}
    if rng.random() < 0.15:
        return {rng.choice(("a", "", "..", "__metadata__", f"{key}x")) if key == chosen else key: item
                for key, item in tree.items()}  # fmt: skip
    return {key: _changed(item, rng) if key == chosen else item for key, item in tree.items()}


def tiny_transformer() -> FluxTransformer2DModel:
    """One block of each kind."""
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


@dataclass(frozen=True)
class Target:
    """A reader, and a good file for it."""

    name: str
    files: list[Path]
    read: Callable[[], Any]
    value: Any
    """What is read from the good files; None if other values are right too."""


def adapter_target(folder: Path) -> Target:
    """`load_adapter`, which must leave no half of an adapter on the model."""
    own = tiny_transformer()
    attach(own, Adapter(rank=2, init="gaussian"), seed=1)
    for name, parameter in own.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.01
    file = save_adapter(own, folder / "adapter", {"step": 1, "trigger": "a"})
    base = tiny_transformer()

    def read() -> None:
        try:
            load_adapter(base, str(file), "fuzzed")
        except ValueError:
            if any("lora" in name for name, _ in base.named_parameters()):
                raise RuntimeError("a refused adapter was left on the model") from None
            raise
        for name, parameter in base.named_parameters():
            if "lora" in name and not parameter.isfinite().all():
                raise RuntimeError(f"{name} is not finite")
        base.delete_adapters("fuzzed")

    return Target("adapter", [file], read, None)


def thing_target(thing: Thing, folder: Path) -> Target:
    own = folder / thing.name
    own.mkdir()
    thing.write(own, 1)
    return Target(thing.name, thing.files(own), lambda: thing.read(own), thing.read(own))


def targets(folder: Path) -> list[Target]:
    every = {thing.name: thing for thing in things()}
    chosen = ("checkpoint", "cache shard", "index shard")
    return [adapter_target(folder), *(thing_target(every[name], folder) for name in chosen)]


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"it took more than {LONGEST} s")


def memory_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fuzz(target: Target, cases: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Mutate each of the files in turn; says what was wrong."""
    wrong = []
    good = {file: file.read_bytes() for file in target.files}
    signal.signal(signal.SIGALRM, _too_long)
    for i in range(cases):
        file = target.files[i % len(target.files)]
        file.write_bytes(mutate(good[file], rng))
        before = memory_bytes()
        signal.alarm(LONGEST)
        try:
            value = target.read()
            counts["read"] += 1
            if target.value is not None and value != target.value:
                wrong.append(f"{target.name} {i}: it is read as {str(value)[:120]}")
        except ValueError:
            counts["refused"] += 1
        except BaseException as error:
            wrong.append(f"{target.name} {i}: {type(error).__name__}: {str(error)[:160]}")
        finally:
            signal.alarm(0)
        if memory_bytes() - before > MEMORY:
            wrong.append(f"{target.name} {i}: memory grew by {(memory_bytes() - before) / 2**20:.0f} MiB")
        file.write_bytes(good[file])
        for mark in file.parent.glob("*.damaged"):
            mark.unlink()
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, counts, wrong = time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        chosen = targets(Path(name))
        for target in chosen:
            wrong += fuzz(target, args.cases // len(chosen), random.Random(f"{args.seed} {target.name}"), counts)
            print(f"{target.name}: {args.cases // len(chosen)} files", flush=True)
    for line in wrong[:40]:
        print(f"WRONG {line}")
    figures = {"cases": counts.total() + len(wrong), "read": counts["read"], "refused": counts["refused"]}
    print(json.dumps(figures | {"wrong": len(wrong), "seconds": round(time.monotonic() - began, 1)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
