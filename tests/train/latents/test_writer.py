"""Claims and rounds: who makes what, seen from other processes."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infer.program.paths import ROOT
from train.latents import locks
from train.latents.shards import ShardIndex, list_shards, read_keys, write_shard
from train.latents.writer import ShardWriter, rounds

OTHER = """
import sys
from pathlib import Path
from train.latents.locks import claim, give_up, open_claims
claims = open_claims(Path(sys.argv[1]))
for line in sys.stdin:
    order, key = line.split()
    print(claim(claims, key) if order == "claim" else give_up(claims, key), flush=True)
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


def test_a_claim_is_one_process_s_until_it_is_given_up(tmp_path: Path) -> None:
    own, other = locks.open_claims(tmp_path), Other(tmp_path)
    assert locks.claim(own, KEYS[0]) and locks.claim(own, KEYS[0])
    assert other.ask("claim", KEYS[0]) == "False" and other.ask("claim", KEYS[1]) == "True"
    assert not locks.claim(own, KEYS[1])
    locks.give_up(own, KEYS[0])
    assert other.ask("claim", KEYS[0]) == "True"
    assert other.ask("give_up", KEYS[1]) == "None" and locks.claim(own, KEYS[1])
    assert not locks.claim(own, KEYS[0])
    other.kill()  # the system gives back what it held
    assert locks.claim(own, KEYS[0])
    assert (tmp_path / locks.CLAIMS).stat().st_size == 0


def item(value: int) -> dict[str, torch.Tensor]:
    return {"value": torch.full((3,), value)}


def index_of(folder: Path) -> ShardIndex:
    def warn(message: str) -> None:
        raise AssertionError(message)

    return ShardIndex(folder, warn)


def test_what_another_makes_is_waited_for_and_what_it_gives_up_is_made(tmp_path: Path) -> None:
    index, other = index_of(tmp_path), Other(tmp_path)
    for key in KEYS[:3]:
        assert other.ask("claim", key) == "True"
    made: list[list[str]] = []

    def elsewhere() -> None:
        time.sleep(0.4)
        write_shard(tmp_path, {KEYS[0]: item(100)})
        other.ask("give_up", KEYS[0])
        time.sleep(0.4)
        other.kill()

    thread = threading.Thread(target=elsewhere)
    pairs = [KEYS[0:2], KEYS[2:4], KEYS[4:6]]
    with ShardWriter(index, 2**20, 0.0) as writer:
        for todo, later in rounds(pairs, writer.settle, lambda pair: bool(index.absent(pair))):
            made.append([])
            for pair in todo:
                mine, complete = writer.claim(pair)
                for key in sorted(mine):
                    made[-1].append(key)
                    writer.add(key, item(KEYS.index(key)))
                if not complete:
                    later.append(pair)
            if len(made) == 1:
                assert made[0] == KEYS[3:]  # not held up by what others have
                thread.start()
        assert writer.written == set(KEYS[1:]) and writer.missing == set(KEYS)
    thread.join()
    assert [key for each in made[1:] for key in each] == KEYS[1:3] and len(made) > 2
    there = [key for file in list_shards(tmp_path) for key in read_keys(file)]
    assert sorted(there) == KEYS  # none twice
    assert not index.absent(KEYS)


def test_claims_are_given_up_once_written_and_when_making_fails(tmp_path: Path) -> None:
    other = Other(tmp_path)
    with pytest.raises(RuntimeError, match="no more"), ShardWriter(index_of(tmp_path), 1, 0.0) as writer:
        assert writer.claim(KEYS[:3]) == (set(KEYS[:3]), True)
        assert writer.claim(KEYS[:1]) == (set(), False)  # this process's own claim, as another of its threads sees it
        assert other.ask("claim", KEYS[0]) == other.ask("claim", KEYS[1]) == "False"
        writer.add(KEYS[0], item(0))
        writer.settle()
        assert writer.claim(KEYS[:1]) == (set(), True)  # it is there
        assert other.ask("claim", KEYS[0]) == "True" and other.ask("claim", KEYS[1]) == "False"
        writer.give_up(KEYS[2:])
        assert other.ask("claim", KEYS[2]) == "True"
        raise RuntimeError("no more")
    assert other.ask("claim", KEYS[1]) == "True"
    other.kill()
    assert [key for file in list_shards(tmp_path) for key in read_keys(file)] == KEYS[:1]


def test_without_locks_everything_is_granted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(locks.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with ShardWriter(index_of(tmp_path), 2**20, 60) as writer:
        assert writer.claim(KEYS[:2]) == (set(KEYS[:2]), True)
        writer.give_up(KEYS)
        assert not writer.claimed

    def broken(*_: object) -> None:
        raise OSError(5, "Input/output error")

    own = locks.open_claims(tmp_path)
    monkeypatch.setattr(locks.fcntl, "lockf", broken)
    with pytest.raises(OSError, match="Input/output"):
        locks.claim(own, KEYS[2])


def test_what_a_killed_process_left_is_removed_once_nobody_else_is_writing(tmp_path: Path) -> None:
    left = tmp_path / ".18eb-aa.safetensors.7.partial"
    other = Other(tmp_path)
    assert other.ask("claim", KEYS[0]) == "True"
    left.write_bytes(b"half of a sh")
    with ShardWriter(index_of(tmp_path), 1, 0) as writer:
        assert left.exists()  # perhaps the other one is writing it
        assert writer.claim(KEYS[:2]) == ({KEYS[1]}, False)
    other.kill()
    with ShardWriter(index_of(tmp_path), 1, 0) as writer:
        assert not left.exists() and writer.claim(KEYS[:1]) == ({KEYS[0]}, True)


def test_all_claimed_is_nobody_elses_until_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = locks.open_claims(tmp_path), Other(tmp_path)
    with locks.claim_all(own) as alone:
        assert alone and other.ask("claim", KEYS[0]) == "False"
    assert other.ask("claim", KEYS[0]) == "True"
    with locks.claim_all(own) as alone:
        assert not alone
    other.kill()

    def none(*_: object) -> None:
        raise OSError(locks.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", none)
    with locks.claim_all(own) as alone:
        assert not alone
