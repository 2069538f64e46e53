"""Checkpoints against optimizers that were never saved, damage of every kind, and what resuming draws."""

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from infer.program.atomic import replace_file
from train.data.seeds import derive, generator
from train.objective.optim import NAMES, Optim, make_optimizer, make_schedule
from train.state.checkpoint import (
    Checkpoint,
    best_steps,
    find_checkpoint,
    optimizer_to,
    read_checkpoint,
    retain,
    save_checkpoint,
    set_aside,
)
from train.state.journal import Journal
from train.state.steps import list_checkpoints

FILES = ("adapter.safetensors", "optimizer.safetensors", "state.json")


def put(folder: Path, step: int, keep: int = 9, average: dict[str, Tensor] | None = None) -> Path:
    moment = {"state": {0: {"m": torch.full((3,), float(step))}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    rest = {"validation": {"0": step / 3, "é": 2}}
    path = save_checkpoint(folder, step, {"a.lora_A": torch.arange(4.0) + step}, moment, rest, average)
    retain(folder, keep, [])
    return path


def step_of(found: tuple[Path, Checkpoint] | None) -> int:
    """Of what `find_checkpoint` gives, after looking at all of it."""
    assert found is not None
    path, (adapter, optimizer, state) = found
    step: int = state["step"]
    assert path.name == f"step-{step:06d}"
    assert torch.equal(adapter["a.lora_A"], torch.arange(4.0) + step)
    assert torch.equal(optimizer["state"][0]["m"], torch.full((3,), float(step)))
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": [0]}]
    assert state == {"step": step, "validation": {"0": step / 3, "é": 2}}
    return step


@pytest.mark.parametrize("name", NAMES)
def test_a_restored_optimizer_goes_on_as_if_never_saved(tmp_path: Path, name: str) -> None:
    optim = Optim(name=name, lr=1.0 if name == "prodigy" else 1e-2, schedule="cosine", warmup=2)
    # bitsandbytes keeps moments of 4096 numbers and more in 8 bits
    starts = [torch.randn(shape, generator=generator(0, i)) for i, shape in enumerate([(64, 80), (96, 64), (5, 4)])]
    gradients = [[torch.randn(p.shape, generator=generator(1, n, i)) for i, p in enumerate(starts)] for n in range(6)]

    def fresh(values: list[Tensor]) -> tuple[list[nn.Parameter], Any, Any]:
        parameters = [nn.Parameter(value.clone()) for value in values]
        optimizer = make_optimizer(optim, parameters)
        return parameters, optimizer, make_schedule(optim, optimizer, 10)

    def advance(parameters: list[nn.Parameter], optimizer: Any, schedule: Any, numbers: range) -> None:
        for n in numbers:
            for parameter, gradient in zip(parameters, gradients[n], strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
            schedule.step()

    whole = fresh(starts)
    advance(*whole, range(3))
    adapter = {str(i): p.detach() for i, p in enumerate(whole[0])}
    save_checkpoint(tmp_path, 3, adapter, whole[1].state_dict(), {"schedule": whole[2].state_dict()})
    advance(*whole, range(3, 6))

    values, moments, rest = read_checkpoint(tmp_path / "step-000003")
    again = fresh([values[str(i)] for i in range(3)])
    forgetful = fresh([values[str(i)] for i in range(3)])
    again[1].load_state_dict(optimizer_to(moments, torch.device("cpu")))
    again[2].load_state_dict(rest["schedule"])
    advance(*again, range(3, 6))
    advance(*forgetful, range(3, 6))
    for a, b, c in zip(whole[0], again[0], forgetful[0], strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)  # the state that was saved does matter
    assert whole[2].get_last_lr() == again[2].get_last_lr()


NUMBERS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=4)
SHAPES = st.lists(st.integers(0, 3), max_size=3)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool])
TENSORS = st.builds(lambda shape, dtype: (torch.randn(shape) * 9).to(dtype), SHAPES, DTYPES)
KEYS = st.text(max_size=4) | st.integers() | st.sampled_from(["tensor", "list", "items", "float", "a/b", "step"])
TREES = st.recursive(
    NUMBERS | TENSORS | TENSORS.map(lambda t: t.expand(2, *t.shape)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and bool((a.eq(b) | a.ne(a)).all())
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return repr(a) == repr(b)  # NaN too


@settings(max_examples=80)
@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_any_state_comes_back(tree: dict[Any, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        shared = torch.randn(2)
        there = {"own": tree, "twice": [shared, shared, shared[:1]], "betas": [0.9, 1e-300]}
        path = save_checkpoint(Path(name), 1, {}, there, {})
        assert same(read_checkpoint(path)[1], there)


def change(file: Path, place: int, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "first bit flipped": lambda file: change(file, 0, 0),
    "middle bit flipped": lambda file: change(file, file.stat().st_size // 2, 3),
    "last bit flipped": lambda file: change(file, -1, 6),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "empty": lambda file: file.write_bytes(b""),
    "missing": lambda file: file.unlink(),
    "of another step": lambda file: shutil.copy(file.parents[1] / "step-000002" / file.name, file),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_the_one_before_taken(tmp_path: Path, name: str, damage: str) -> None:
    for step in (2, 4, 6):
        put(tmp_path, step)
    DAMAGE[damage](tmp_path / "step-000006" / name)
    with pytest.raises(ValueError, match=r"step-000006 is damaged"):
        read_checkpoint(tmp_path / "step-000006")
    told: list[str] = []
    assert step_of(find_checkpoint(tmp_path, None, told.append)) == 4
    assert len(told) == 1 and "step-000006 is damaged" in told[0] and "an older one is used" in told[0]
    put(tmp_path, 6)  # the run comes there again
    assert step_of(find_checkpoint(tmp_path, None, pytest.fail)) == 6


def test_no_bit_of_the_state_can_change(tmp_path: Path) -> None:
    path = put(tmp_path, 5)
    content = (path / "state.json").read_bytes()
    for place, bit in itertools.product(range(len(content)), (0, 5)):
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        (path / "state.json").write_bytes(changed)
        with pytest.raises(ValueError, match="is damaged"):
            read_checkpoint(path)


def test_nothing_whole_is_nothing(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "absent", None, pytest.fail) is None
    told: list[str] = []
    for step in (1, 2):
        (put(tmp_path, step) / "state.json").write_text("{}")
    assert find_checkpoint(tmp_path, None, told.append) is None and len(told) == 2


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    steps = [8, 9, 10, 999_999, 1_000_000]
    for count, step in enumerate(steps, start=1):
        assert put(tmp_path, step, keep) == tmp_path / f"step-{step:06d}"
        kept = [f"step-{s:06d}" for s in steps[max(0, count - keep) : count]]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
    assert step_of(find_checkpoint(tmp_path, None, pytest.fail)) == 1_000_000
    assert {file.name for path in tmp_path.iterdir() for file in path.iterdir()} == set(FILES)


def test_the_best_are_kept_beside_the_newest(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        put(tmp_path, step)
    losses = {"0": 0.1, "2": 0.5, "3": 0.0, "4": 0.3, "6": 0.5, "8": 0.4}  # none of 0 and 3 is there, 10 is not judged
    assert best_steps(tmp_path, losses, 3) == [4, 8, 2]
    assert best_steps(tmp_path, losses, 0) == best_steps(tmp_path, {}, 3) == []
    (tmp_path / "step-000004.77.partial").mkdir()  # of a process that was killed
    retain(tmp_path, 1, best_steps(tmp_path, losses, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000008", "step-000010"]
    assert [path.name for path in set_aside(tmp_path, 4)] == ["step-000008.aside", "step-000010.aside"]
    assert step_of(find_checkpoint(tmp_path, None, pytest.fail)) == 4
    put(tmp_path, 8)
    (tmp_path / "step-000008" / "mark").touch()
    set_aside(tmp_path, 4)  # the later one takes the place of the one from before
    assert (tmp_path / "step-000008.aside" / "mark").is_file() and not (tmp_path / "step-000008").exists()


def test_averaged_weights_are_a_file_of_their_own(tmp_path: Path) -> None:
    average = {"a.lora_A": torch.arange(4.0) / 3}
    path = put(tmp_path, 4, average=average)
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, "ema.safetensors"])
    assert torch.equal(read_checkpoint(path)[2]["average"]["a.lora_A"], average["a.lora_A"])
    change(path / "ema.safetensors", -1, 0)
    with pytest.raises(ValueError, match="step-000004 is damaged"):
        find_checkpoint(tmp_path, "step-000004", pytest.fail)
    (path / "ema.safetensors").unlink()
    with pytest.raises(ValueError, match="step-000004 is damaged"):
        read_checkpoint(path)


def test_names_reach_the_disk_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, then their folder, then the rename, then the folder above: after a power cut at any time it is whole."""
    done: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(number: int) -> None:
        done.append(Path(f"/proc/self/fd/{number}").readlink().name.split(".")[0])
        fsync(number)

    def moved(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", moved)
    save_checkpoint(tmp_path / "all", 3, {}, {}, {})
    assert sorted(done[:3]) == ["adapter", "optimizer", "state"] and done[3:] == ["step-000003", "rename", "all"]
    done.clear()
    replace_file(tmp_path / "all" / "x.json", lambda path: path.write_text("{}"))
    assert done == ["", "all"]  # the hidden temporary file, then its folder


def test_a_crash_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, 1)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            put(tmp_path, 2)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.*") if file.is_file()} == before

    # a process that was killed left its folder, and the next one has the same number, as in a container
    monkeypatch.setattr("train.state.checkpoint.os.getpid", lambda: 7)
    (tmp_path / "step-000002.7.partial").mkdir()
    (tmp_path / "step-000002.7.partial" / "state.json").write_text("{")
    assert step_of(find_checkpoint(tmp_path, None, pytest.fail)) == 1
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-000001"]
    put(tmp_path, 2)
    assert step_of(find_checkpoint(tmp_path, None, pytest.fail)) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_only_safetensors_and_json_are_written(tmp_path: Path) -> None:
    path = put(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    for file in path.iterdir():
        content = file.read_bytes()
        start = 0 if file.suffix == ".json" else 8
        length = len(content) if file.suffix == ".json" else int.from_bytes(content[:8], "little")
        assert isinstance(json.loads(content[start : start + length]), dict)


PLACES = st.tuples(st.integers(0, 99), st.sampled_from("ab"), st.integers(0, 99), st.integers(0, 9))


@given(st.sets(PLACES, min_size=2))
def test_each_place_has_its_own_numbers(places: set[tuple[Any, ...]]) -> None:
    seeds = {place: derive(*place) for place in places}
    assert len(set(seeds.values())) == len(places) and all(0 <= seed < 2**63 for seed in seeds.values())
    draws = {place: torch.randn(4, generator=generator(*place)) for place in places}
    assert len({tuple(draw.tolist()) for draw in draws.values()}) == len(places)
    torch.manual_seed(len(places))  # nothing that happened before counts
    for place, draw in draws.items():
        assert torch.equal(torch.randn(4, generator=torch.Generator().manual_seed(seeds[place])), draw)


def test_seeds_stay_what_they_were() -> None:
    """A change would make every run that resumes another run. From sha256sum: echo -n 3/sample/17."""
    assert derive(3, "sample", 17) == 0x73CD558BD444B298 >> 1


def test_the_journal_drops_what_lies_beyond(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    journal = Journal(file, 0, write=True)
    for step in range(5):
        journal.log(step, {"loss": step / 3})
    journal.log(2, {"validation_loss": 0.5})
    with file.open("a") as stream:
        stream.write('{"step": 1, "lo')
    Journal(file, 2, write=False).log(9, {"loss": 1.0})  # another rank writes nothing
    assert len(file.read_text().splitlines()) == 7
    file.write_text(file.read_text() + "\n")
    journal.log(1, {"validation_loss": 0.7})
    Journal(file, 2, write=True).log(3, {"loss": 9.0})
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"step": 0, "loss": 0.0},
        {"step": 1, "loss": 1 / 3},
        {"step": 2, "loss": 2 / 3},
        {"step": 1, "validation_loss": 0.7},  # that of step 2 comes after its checkpoint, and comes again
        {"step": 3, "loss": 9.0},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
