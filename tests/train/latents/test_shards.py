"""Shards: what is read is what was written, or the shard is named as damaged; and nobody prunes what others use."""

import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from infer.program.paths import ROOT
from train.latents.locks import hold
from train.latents.shards import (
    DamagedError,
    Item,
    ShardIndex,
    list_shards,
    prune,
    read_item,
    read_keys,
    read_part,
    verify,
    write_shard,
)

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int32)


def item(seed: int, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = (2, 3)) -> Item:
    own = torch.Generator().manual_seed(seed)
    return {
        "mean": (100 * torch.randn(shape, generator=own)).abs().to(dtype),
        "deviation": torch.rand(shape, generator=own),
    }


def same(a: Item, b: Item) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def found(folder: Path, keys: Collection[str]) -> dict[str, Path]:
    """Key -> shard, as a new index says."""
    index = ShardIndex(folder, lambda _: None)
    index.refresh()
    files = {key: index.find(key) for key in keys}
    assert index.absent(keys) == {key for key, file in files.items() if file is None}
    there = {key: file for key, file in files.items() if file is not None}
    assert {key: file for file, own in index.by_shard(keys).items() for key in own} == there
    return there


@settings(max_examples=25)
@given(
    st.lists(st.sets(st.sampled_from("abcdefgh"), min_size=1), min_size=1, max_size=4),
    st.sampled_from(DTYPES),
    st.sampled_from([(), (0,), (5,), (2, 1, 3)]),
    st.sets(st.sampled_from("abcdefgh")),
)
def test_what_is_read_is_what_was_written_first(
    shards: list[set[str]], dtype: torch.dtype, shape: tuple[int, ...], keep: set[str]
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, first = Path(name), dict[str, Item]()
        for i, keys in enumerate(shards):
            items = {key: item(100 * i + ord(key), dtype, shape) for key in keys}
            write_shard(folder, items)
            first = items | first
        files = found(folder, "abcdefgh")
        assert files.keys() == first.keys()
        for key, expected in first.items():
            assert same(read_item(files[key], key, "mean", "deviation"), expected)
        for file in list_shards(folder):
            verify(file, read_keys(file))
            for key, part in read_part(file, read_keys(file), "mean").items():
                assert torch.equal(part, read_item(file, key, "mean")["mean"])

        prune(folder, keep)
        after = found(folder, "abcdefgh")
        assert after.keys() == first.keys() & keep
        assert all(same(read_item(after[key], key, "mean", "deviation"), first[key]) for key in after)
        held = [key for file in list_shards(folder) for key in read_keys(file)]
        assert sorted(held) == sorted(after)  # no second copies
        assert {path.suffix for path in folder.iterdir()} <= {".safetensors"}


def test_plain_safetensors_can_read_a_shard(tmp_path: Path) -> None:
    own = item(1)
    assert same(load_file(write_shard(tmp_path, {"k": own})), {f"k/{part}": tensor for part, tensor in own.items()})


def flip(place: Callable[[bytes], int]) -> Callable[[Path], object]:
    def damage(file: Path) -> object:
        content = bytearray(file.read_bytes())
        content[place(bytes(content))] ^= 4
        return file.write_bytes(content)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut short": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "cut in its header": lambda file: file.write_bytes(file.read_bytes()[:90]),
    "empty": lambda file: file.write_bytes(b""),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0\0"),
    "a data bit": flip(lambda content: len(content) - 3),
    "another type": lambda file: file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"')),
    "another shape": lambda file: file.write_bytes(file.read_bytes().replace(b"[2,3]", b"[3,2]")),
    "a checksum": flip(lambda content: content.index(b'"k/mean":"') + 12),
    "header length": flip(lambda _: 1),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_not_believed(tmp_path: Path, kind: str) -> None:
    file = write_shard(tmp_path, {"k": item(1), "l": item(2)})
    DAMAGE[kind](file)
    with pytest.raises(DamagedError, match=rf"{file.name} is damaged \(.+\)"):
        read_item(file, "k", "mean", "deviation")
        read_item(file, "l", "mean", "deviation")
    with pytest.raises(DamagedError, match=file.name):
        verify(file, {"k", "l"})

    said: list[str] = []
    index = ShardIndex(tmp_path, said.append)
    if not index.refresh():  # it opens, so only its checksums tell
        assert index.find("k") == file
        with pytest.raises(DamagedError) as caught:
            verify(file, {"k", "l"})
        index.distrust(caught.value)
    assert len(said) == 1 and file.name in said[0] and "encoded again" in said[0]
    assert not found(tmp_path, "kl")
    again = write_shard(tmp_path, {"k": item(1)})
    assert found(tmp_path, "kl") == {"k": again}
    prune(tmp_path, {"k"})
    assert [path.name for path in tmp_path.iterdir()] == [again.name]


@given(st.integers(0, 10**6), st.integers(0, 7))
@settings(max_examples=60)
def test_no_flipped_bit_changes_what_is_read(place: int, bit: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        file, own = write_shard(Path(name), {"k": item(1)}), item(1)
        content = bytearray(file.read_bytes())
        content[place % len(content)] ^= 1 << bit
        file.write_bytes(content)
        try:
            read = read_item(file, "k", "mean", "deviation")
        except DamagedError:
            return
        assert same(read, own)  # padding


def test_a_bad_shard_that_was_read_once_does_not_come_back(tmp_path: Path) -> None:
    good, bad = write_shard(tmp_path, {"k": item(1)}), write_shard(tmp_path, {"l": item(2)})
    index = ShardIndex(tmp_path, lambda _: None)
    index.refresh()
    index.distrust(DamagedError(bad, "told so"))
    index.forget()
    assert index.absent("kl") == {"k", "l"}
    index.refresh()
    assert index.find("k") == good and index.find("l") is None
    assert (tmp_path / f"{bad.stem}.damaged").read_text() == "told so\n"


def test_the_index_sees_what_others_add_and_keeps_to_the_oldest_copy(tmp_path: Path) -> None:
    first = write_shard(tmp_path, {"a": item(1), "z": item(3)})
    index = ShardIndex(tmp_path, lambda _: None)
    index.refresh()
    assert index.by_shard(["a", "b"]) == {first: ["a"]}
    write_shard(tmp_path, {"a": item(9)})
    second = write_shard(tmp_path, {"b": item(2), "y": item(4)})
    index.refresh()
    assert index.by_shard(["a", "b", "c"]) == {first: ["a"], second: ["b"]}
    older = first.with_name("0" + first.name[1:])  # of a machine whose clock is behind, seen last
    write_shard(tmp_path, {"a": item(7)}).rename(older)
    index.refresh()
    assert index.find("a") == older == found(tmp_path, "a")["a"]
    assert index.find("z") == first and index.absent("abyzc") == {"c"}


def test_the_index_takes_twelve_bytes_an_item(tmp_path: Path) -> None:
    for shard in range(3):
        write_shard(tmp_path, {f"{shard}-{i}": {"t": torch.zeros(1)} for i in range(500)})
    index = ShardIndex(tmp_path, lambda _: None)
    index.refresh()
    assert index.table.hashes.nbytes + index.table.numbers.nbytes == 12 * 1500
    assert not index.absent([f"{shard}-{i}" for shard in range(3) for i in range(500)])


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="No space"):
        write_shard(tmp_path, {"k": item(1)})
    assert not list(tmp_path.iterdir())


def test_prune_killed_between_its_steps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(3):
        write_shard(tmp_path, {f"keep{i}": item(i), f"drop{i}": item(9)})
    keep = {f"keep{i}" for i in range(3)}
    unlink, calls = Path.unlink, [0]

    def dies(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".safetensors":
            calls[0] += 1
            if calls[0] == 2:
                raise KeyboardInterrupt
        unlink(self, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", dies)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep)
    monkeypatch.undo()
    (tmp_path / ".18eacb-aa.safetensors.7.partial").write_bytes(b"of a process that was killed")
    assert found(tmp_path, keep).keys() == keep
    prune(tmp_path, keep)
    files = found(tmp_path, {*keep, "drop0", "drop1", "drop2"})
    assert files.keys() == keep
    assert all(same(read_item(files[f"keep{i}"], f"keep{i}", "mean", "deviation"), item(i)) for i in range(3))
    assert all(path.suffix == ".safetensors" and not path.name.startswith(".") for path in tmp_path.iterdir())


HOLDER = """
import sys
from pathlib import Path
from train.latents.locks import hold
held = hold(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_alone_is_refused_while_another_process_holds(tmp_path: Path) -> None:
    hold(tmp_path, alone=True).close()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        hold(tmp_path).close()  # together is fine
        with pytest.raises(ValueError, match=r"is in use by another process.*wait until it ends"):
            hold(tmp_path, alone=True)
        other.kill()  # its hold dies with it
    hold(tmp_path, alone=True).close()


def test_the_checksum_is_crc32(tmp_path: Path) -> None:
    tensor = torch.arange(5, dtype=torch.int32)
    file = write_shard(tmp_path, {"k": {"t": tensor}})
    header = json.loads(file.read_bytes()[8:].split(b"}}")[0] + b"}}")
    expected = zlib.crc32(b"k/t torch.int32 [5]" + tensor.numpy().tobytes())
    assert header["__metadata__"] == {"k/t": f"{expected:08x}"}
