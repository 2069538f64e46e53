"""A point of a sweep: its name, its commands, and running those that are not done yet.

runs/<sweep>/<point>/ is an ordinary run's folder; point.json there records the commands and how they ended, train.log,
compare.log and track.log what they printed. Points that train at the same time share one cache
(train/latents/shards.py): none encodes what another has encoded or is about to.
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from infer.program.atomic import replace_file
from infer.program.errors import STOPPED
from infer.program.literal import quote
from infer.program.paths import ROOT
from train.trackers.figures import objectives_of, read_figures

RECORD = "point.json"
LONGEST = 100  # characters of a point's name
GRACE = 120  # seconds for a command to finish its step and save after an interrupt
PRODUCTS = {"train": "adapter/pytorch_lora_weights.safetensors", "compare": "compare/results.json"}


def name_point(overrides: list[str], keys: list[str]) -> str:
    """A folder's name made of the values of `keys`, in their order: precision-nf4_rank-4_seed-0.

    A key is shortened to its last part where that tells it from the others. What a plain name cannot say gets a few
    digits of a checksum, so that two points never share a name.
    """
    given = dict(override.lstrip("+").split("=", 1) for override in overrides if "=" in override)
    lasts = [key.split("@")[0].split(".")[-1] for key in keys]
    parts, exact = [], True
    for key, last in zip(keys, lasts, strict=True):
        if key not in given:
            continue
        value = given[key]
        if re.fullmatch(r"-?\d*\.\d{5,}(e-?\d+)?|-?\d+\.\d+e-?\d+", value):
            value = f"{float(value):.4g}"
        label = last if lasts.count(last) == 1 else key
        part = re.sub(r"(?:-|[^\w.+])+", "-", f"{label}-{value}", flags=re.ASCII).strip("-.")
        exact &= part == f"{label}-{given[key]}"
        parts.append(part)
    name = "_".join(parts) or "point"
    if exact and len(name) <= LONGEST and ".." not in name:
        return name
    values = json.dumps([[key, given[key]] for key in keys if key in given])
    return f"{name[:LONGEST].replace('..', '.')}-{hashlib.sha256(values.encode()).hexdigest()[:6]}"


def spell(value: Any) -> str:
    """A plain value in the words of Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # `${` is text here, not an interpolation
        return quote(re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value))
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spell(item)}" for key, item in value.items()) + "}"
    return repr(value)


def spell_all(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Every value of nested settings as an option."""
    options = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        options += spell_all(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}={spell(value)}"]
    return options


def commands_of(config: dict[str, Any], overrides: list[str], name: str, places: list[str]) -> dict[str, list[str]]:
    """The commands of a point by stage, in order; places: further folders of configs."""
    sweep, track = config["sweep"], config["track"]
    run = f"{config['run']}/{name}"
    start = list(sweep["launch"]) or [sys.executable]
    if start[0] == "accelerate":  # the one of this Python, whatever PATH says
        start[0] = str(Path(sys.executable).with_name("accelerate"))
    own = [o for o in overrides if not re.match(r"[+~]*(run|sweep|sweep\..*)=", o)]
    if track["kind"] == "wandb" and track["group"] is None:
        own.append(f"track.group={spell(config['run'])}")
    sources = [word for place in places for word in ("--config-dir", place)]
    commands = {"train": [*start, str(ROOT / "train/train.py"), *sources, *own, f"run={spell(run)}"]}
    if sweep["compare"] is not None:
        kind = config["precision"]["kind"]
        options = spell_all({key: config[key] for key in ("model", "memory", "device")})
        options += [f"++precisions.{kind}={spell(config['precision'])}", f"only=[{kind}]", f"run={spell(run)}"]
        options.append(f"adapter.path={spell(f'runs/{run}/adapter')}")
        if not any(option.startswith("experiment=") for option in sweep["compare"]):
            options += spell_all({"sampling": config["sampling"], "text_length": config["data"]["text_length"]})
            options += [f"prompts={spell(config['previews'])}"] if config["previews"] else []
        commands["compare"] = [sys.executable, str(ROOT / "infer/compare.py"), *options, *sweep["compare"]]
        if track["kind"] != "none":
            group = track["group"] or config["run"] if track["kind"] == "wandb" else None
            told = spell_all({"track": track | {"group": group}})
            commands["track"] = [sys.executable, str(ROOT / "train/track.py"), f"run={spell(run)}", *told]
    return commands


@contextmanager
def locked(file: Path, wait: bool) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process; gives False if it is taken and `wait` is not set."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def one_gpu(gpus: list[int] | None, folder: Path) -> Iterator[int | None]:
    """A GPU of this machine that no other point of the sweep uses; waits until there is one."""
    if gpus is None:
        yield None
        return
    while True:
        for gpu in gpus:
            with locked(folder / f"{socket.gethostname()}-gpu-{gpu}.lock", wait=False) as free:
                if free:
                    yield gpu
                    return
        time.sleep(0.2)


def execute(command: list[str], log: Path, gpu: int | None) -> int:
    """Run a command to its end, what it prints going to `log`; returns its exit code.

    It has a session of its own, so that a terminal's Ctrl-C does not reach it by itself: it is handed on once, and the
    command is given the time to save. A second one ends it at once.
    """
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    shown = shlex.join(command) if gpu is None else f"CUDA_VISIBLE_DEVICES={gpu} {shlex.join(command)}"
    with log.open("wb") as stream:
        stream.write(f"$ {shown}\n".encode())
        stream.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait()
        except BaseException:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(GRACE)
            except BaseException:
                process.kill()
            raise


def reason_of(log: Path, code: int) -> str:
    """Why a command failed: the last line in which it says so (infer/program/errors.py), else its last line."""
    text = log.read_text(errors="replace")
    found = re.findall(r"^error(?: on rank \d+)?: (.+)$", text, flags=re.MULTILINE)
    if found:
        return str(found[-1]).strip()
    if code == STOPPED:
        return "stopped by a signal, its state saved"
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ending}: {lines[-1]}" if lines else ending


def run_point(
    config: dict[str, Any], overrides: list[str], keys: list[str], number: int, places: list[str]
) -> tuple[float, ...] | None:
    """Run what is not done of a point; returns its objectives, None if it failed.

    Raises:
        ValueError: the sweep's name leads out of runs/.
    """
    name = name_point(overrides, keys)
    sweep = Path("runs") / config["run"]
    folder = sweep / name
    say = f"[{number}] {name}:"
    with locked(folder / ".point.lock", wait=False) as ours:
        if not ours:
            print(f"{say} left out, another process is at it", flush=True)
            return None
        record = _read(folder / RECORD)
        values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
        record |= {"name": name, "values": {key: values[key] for key in keys if key in values}, "config": config}
        record.setdefault("stages", {})
        commands = commands_of(config, overrides, name, places)
        error = None
        with one_gpu(config["sweep"]["gpus"], sweep / ".locks") as gpu:
            for stage, command in commands.items():
                error = _stage(stage, command, record, folder, gpu, say)
                if error is not None:
                    break
            stopped = any(stage["code"] == STOPPED for stage in record["stages"].values())
        figures = read_figures(folder, compared="compare" in commands)
        objectives = None
        if error is None:
            try:
                objectives = objectives_of(figures, config["sweep"]["objectives"])
            except ValueError as lacking:
                error = str(lacking)
        state = "stopped" if stopped else "failed" if error else "done"
        record |= {"state": state, "error": error, "figures": figures}
        _write(folder / RECORD, record)
    shown = error or ", ".join(f"{name} {figures[name]:.4g}" for name in config["sweep"]["objectives"])
    print(f"{say} {record['state']}, {shown}", flush=True)
    return objectives


def _stage(
    stage: str, command: list[str], record: dict[str, Any], folder: Path, gpu: int | None, say: str
) -> str | None:
    """One command of a point, if it is not done; returns why it failed."""
    stages = record["stages"]
    if stages.get(stage, {}).get("command") == command and _done(record, stage, folder):
        return None
    for later in list(stages)[list(stages).index(stage) :] if stage in stages else []:
        del stages[later]
    record["state"] = "running"
    _write(folder / RECORD, record)
    log = folder / f"{stage}.log"
    print(f"{say} {stage}, {log}", flush=True)
    start = time.monotonic()
    code = execute(command, log, gpu)
    ended = {"seconds": time.monotonic() - start, "gpu": gpu, "ended": time.time()}
    stages[stage] = {"command": command, "code": code} | ended
    return reason_of(log, code) if code else None


def _done(record: dict[str, Any], stage: str, folder: Path) -> bool:
    ended = record["stages"].get(stage, {}).get("code") == 0
    return ended and (stage not in PRODUCTS or (folder / PRODUCTS[stage]).is_file())


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):  # none yet, or torn by a crash of the machine: all is asked for again
        return {}
    return record


def _write(file: Path, record: dict[str, Any]) -> None:
    replace_file(file, lambda path: path.write_text(json.dumps(record, indent=1)))
