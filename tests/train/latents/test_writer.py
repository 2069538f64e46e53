"""Claims and the writer's rounds: who makes what, seen from other processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.program.paths import ROOT
from train.latents import claims as claims_module
from train.latents.claims import Claims
from train.latents.shards import Shelf, list_shards, read_keys, write_shard
from train.latents.writer import Todo, Writer

OTHER = """
import sys
from pathlib import Path
from train.latents.claims import Claims
claims = Claims(Path(sys.argv[1]))
for line in sys.stdin:
    order, key = line.split()
    print(claims.take(key) if order == "take" else claims.free([key]), flush=True)
"""


class Other:
    """Another process that claims on demand."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", OTHER, str(folder)]
        self.process: Any = subprocess.Popen(command, cwd=ROOT, text=True, stdin=-1, stdout=-1)

    def ask(self, order: str, key: str) -> str:
        self.process.stdin.write(f"{order} {key}\n")
        self.process.stdin.flush()
        return str(self.process.stdout.readline().strip())

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


KEYS = [f"{i:02x}" * 32 for i in range(6)]


def test_a_claim_is_one_process_s_until_it_is_let_go(tmp_path: Path) -> None:
    own, other = Claims(tmp_path), Other(tmp_path)
    assert own.take(KEYS[0]) and own.take(KEYS[0])
    assert other.ask("take", KEYS[0]) == "False" and other.ask("take", KEYS[1]) == "True"
    assert not own.take(KEYS[1])
    own.free(KEYS[:1])
    assert other.ask("take", KEYS[0]) == "True"
    assert other.ask("free", KEYS[1]) == "None" and own.take(KEYS[1])
    assert not own.take(KEYS[0])
    other.kill()  # the system gives back what it held
    assert own.take(KEYS[0])
    assert (tmp_path / claims_module.FILE).stat().st_size == 0


def item(value: int) -> dict[str, torch.Tensor]:
    return {"value": torch.full((3,), value)}


def shelf_of(folder: Path) -> Shelf:
    def warn(message: str) -> None:
        raise AssertionError(message)

    return Shelf(folder, set(KEYS), warn)


def test_what_another_makes_is_waited_for_and_what_it_gives_up_is_made(tmp_path: Path) -> None:
    shelf, other = shelf_of(tmp_path), Other(tmp_path)
    for key in KEYS[:3]:
        assert other.ask("take", key) == "True"
    rounds: list[list[str]] = []

    def elsewhere() -> None:
        time.sleep(0.4)
        write_shard(tmp_path, {KEYS[0]: item(100)})
        other.ask("free", KEYS[0])
        time.sleep(0.4)
        other.kill()

    thread = threading.Thread(target=elsewhere)
    todo = [Todo(pair, {KEYS[i]: i for i in pair}) for pair in ((0, 1), (2, 3), (4, 5))]
    with Writer(shelf, 2**20, 0.0) as writer:
        for entries in writer.rounds(iter(todo)):
            rounds.append([])
            for entry in entries:
                assert set(entry.items.values()) <= set(entry.of)
                for key, value in entry.items.items():
                    rounds[-1].append(key)
                    writer.add(key, item(value))
            if len(rounds) == 1:
                assert rounds[0] == KEYS[3:]  # not held up by what others have
                thread.start()
    thread.join()
    made = [key for one in rounds[1:] for key in one]
    assert made == KEYS[1:3] and len(rounds) > 2
    there = [key for file in list_shards(tmp_path) for key in read_keys(file)]
    assert sorted(there) == KEYS  # none twice
    assert shelf.found.keys() == set(KEYS)


def test_claims_are_let_go_once_written_and_when_making_fails(tmp_path: Path) -> None:
    other = Other(tmp_path)
    with pytest.raises(RuntimeError, match="no more"), Writer(shelf_of(tmp_path), 1, 0.0) as writer:
        rounds = writer.rounds([Todo(None, dict.fromkeys(KEYS[:2]))])
        next(next(rounds))
        assert other.ask("take", KEYS[0]) == other.ask("take", KEYS[1]) == "False"
        writer.add(KEYS[0], item(0))
        writer.settle()
        assert other.ask("take", KEYS[0]) == "True" and other.ask("take", KEYS[1]) == "False"
        raise RuntimeError("no more")
    assert other.ask("take", KEYS[1]) == "True"
    other.kill()
    assert [key for file in list_shards(tmp_path) for key in read_keys(file)] == KEYS[:1]


def test_without_locks_everything_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(claims_module.ENOLCK, "No locks available")

    monkeypatch.setattr(claims_module.fcntl, "lockf", none)
    own = Claims(tmp_path)
    assert own.take(KEYS[0]) and own.take(KEYS[1])
    own.free(KEYS)
    assert not own.held

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(claims_module.fcntl, "lockf", broken)
    with pytest.raises(OSError, match="Input/output"):
        own.take(KEYS[2])


def test_what_a_killed_process_left_is_removed_once_nobody_else_is_writing(tmp_path: Path) -> None:
    left = tmp_path / ".18eb-aa.safetensors.7.partial"
    other = Other(tmp_path)
    assert other.ask("take", KEYS[0]) == "True"
    left.write_bytes(b"half of a sh")
    with Writer(shelf_of(tmp_path), 1, 0) as writer:
        assert left.exists()  # perhaps the other one is writing it
        assert writer.claims.take(KEYS[1])
    other.kill()
    with Writer(shelf_of(tmp_path), 1, 0) as writer:
        assert not left.exists() and writer.claims.take(KEYS[0])


def test_all_claimed_is_nobody_elses_until_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = Claims(tmp_path), Other(tmp_path)
    with own.everything() as alone:
        assert alone and other.ask("take", KEYS[0]) == "False"
    assert other.ask("take", KEYS[0]) == "True"
    with own.everything() as alone:
        assert not alone
    other.kill()

    def none(*_: object) -> None:
        raise OSError(claims_module.ENOLCK, "No locks available")

    monkeypatch.setattr(claims_module.fcntl, "lockf", none)
    with own.everything() as alone:
        assert not alone
