"""A point of a sweep: its name, its commands, and running those that are not done yet.

runs/<sweep>/<point>/ is the folder of an ordinary run. point.json there records the point's commands and how each of
them ended; train.log, compare.log and track.log hold what they printed. Points that train at the same time share one
cache (train/latents/shards.py): none encodes what another has encoded or is encoding.
"""

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

from filelock import FileLock, Timeout

from infer.program.atomic import replace_file
from infer.program.errors import STOPPED
from infer.program.literal import quote
from infer.program.paths import ROOT
from train.trackers.figures import objectives_of, read_figures

RECORD = "point.json"
NAME_LENGTH = 100  # characters of a point's name, before its checksum
GRACE = 120  # seconds in which an interrupted command finishes its step and saves
PRODUCTS = {"train": "adapter/pytorch_lora_weights.safetensors", "compare": "compare/results.json"}


def name_point(overrides: list[str], keys: list[str]) -> str:
    """The name of a point's folder, made of the values of `keys` in their order: precision-nf4_rank-4_seed-0.

    A key is shortened to its last part where no other key ends alike. Where the name cannot hold the values as they
    are, digits of their checksum follow it: two points never share a name.
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
    if exact and len(name) <= NAME_LENGTH and ".." not in name:
        return name
    values = json.dumps([[key, given[key]] for key in keys if key in given])
    return f"{name[:NAME_LENGTH].replace('..', '.')}-{hashlib.sha256(values.encode()).hexdigest()[:6]}"


def spell(value: Any) -> str:
    """A plain value as it is written on Hydra's command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        # a `${` in a plain value is text, not an interpolation
        return quote(re.sub(r"(\\*)\$\{", lambda m: m[1] * 2 + "\\${", value))
    if isinstance(value, list):
        return f"[{','.join(map(spell, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{spell(item)}" for key, item in value.items()) + "}"
    return repr(value)


def spell_all(config: dict[str, Any], prefix: str = "") -> list[str]:
    """Every value of nested settings as an override of Hydra: `optim.lr=0.0001`."""
    options = []
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        options += spell_all(value, f"{prefix}{key}.") if nested else [f"{prefix}{key}={spell(value)}"]
    return options


def commands_of(
    config: dict[str, Any], overrides: list[str], name: str, config_dirs: list[str]
) -> dict[str, list[str]]:
    """The commands of a point, by stage and in order: train, compare, track.

    Args:
        config: the point's settings.
        overrides: what the sweep's command line says, with this point's values.
        name: the point's.
        config_dirs: further folders of configs, given with --config-dir.
    """
    sweep, track = config["sweep"], config["track"]
    run = f"{config['run']}/{name}"
    launch = list(sweep["launch"]) or [sys.executable]
    if launch[0] == "accelerate":  # the one beside this Python, whichever PATH finds first
        launch[0] = str(Path(sys.executable).with_name("accelerate"))
    options = [o for o in overrides if not re.match(r"[+~]*(run|sweep|sweep\..*)=", o)]
    if track["kind"] == "wandb" and track["group"] is None:
        options.append(f"track.group={spell(config['run'])}")
    flags = [word for folder in config_dirs for word in ("--config-dir", folder)]
    commands = {"train": [*launch, str(ROOT / "train/train.py"), *flags, *options, f"run={spell(run)}"]}
    if sweep["compare"] is not None:
        kind = config["precision"]["kind"]
        options = spell_all({key: config[key] for key in ("model", "memory", "device")})
        options += [f"++precisions.{kind}={spell(config['precision'])}", f"only=[{kind}]", f"run={spell(run)}"]
        options.append(f"adapter.path={spell(f'runs/{run}/adapter')}")
        if not any(option.startswith("experiment=") for option in sweep["compare"]):
            options += spell_all({"sampling": config["sampling"], "text_length": config["data"]["text_length"]})
            edits = config.get("edits") or []
            options += [f"prompts={spell(config['previews'] or [])}"] if config["previews"] or edits else []
            if edits:
                side = config["data"]["resolution"]
                side = config["data"]["reference_resolution"] or (max(side) if isinstance(side, list) else side)
                options += [f"edits={spell(edits)}", f"reference_resolution={side}"]
        commands["compare"] = [sys.executable, str(ROOT / "infer/compare.py"), *options, *sweep["compare"]]
        if track["kind"] != "none":
            group = track["group"] or config["run"] if track["kind"] == "wandb" else None
            options = spell_all({"track": track | {"group": group}})
            commands["track"] = [sys.executable, str(ROOT / "train/track.py"), f"run={spell(run)}", *options]
    return commands


@contextmanager
def try_lock(file: Path) -> Iterator[bool]:
    """Hold a file's lock, which ends with the process. Gives False where another process holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(file)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextmanager
def free_gpu(gpus: list[int] | None, folder: Path) -> Iterator[int | None]:
    """One of `gpus` that no other point of the sweep uses; waits until one is free. None where `gpus` is.

    folder: of the locks, one a GPU of this machine.
    """
    if gpus is None:
        yield None
        return
    while True:
        for gpu in gpus:
            with try_lock(folder / f"{socket.gethostname()}-gpu-{gpu}.lock") as free:
                if free:
                    yield gpu
                    return
        time.sleep(0.2)


def execute(command: list[str], log: Path, gpu: int | None) -> int:
    """Run a command to its end, with its output in `log`; returns its exit code.

    The command has a session of its own, which a terminal's Ctrl-C does not reach. The first Ctrl-C is passed on, and
    the command has GRACE seconds to save; the second one kills it.
    """
    environment = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": str(gpu)})
    shown = shlex.join(command) if gpu is None else f"CUDA_VISIBLE_DEVICES={gpu} {shlex.join(command)}"
    with log.open("wb") as output:
        output.write(f"$ {shown}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
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
    """Why a command failed: its last error message (infer/program/errors.py), else its last line."""
    text = log.read_text(errors="replace")
    errors = re.findall(r"^error(?: on rank \d+)?: (.+)$", text, flags=re.MULTILINE)
    if errors:
        return str(errors[-1]).strip()
    if code == STOPPED:
        return "stopped by a signal, its state saved"
    lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
    ending = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{ending}: {lines[-1]}" if lines else ending


def run_point(
    config: dict[str, Any], overrides: list[str], keys: list[str], number: int, config_dirs: list[str]
) -> tuple[float, ...] | None:
    """Run the commands of a point that are not done; returns its objectives, or None if it failed.

    Args:
        keys: the settings whose values name the point.
        number: the point's, counted by Hydra.
        config, overrides, config_dirs: as for `commands_of`.

    Raises:
        ValueError: the sweep's name leads out of runs/.
    """
    name = name_point(overrides, keys)
    sweep = Path("runs") / config["run"]
    folder = sweep / name
    label = f"[{number}] {name}:"
    with try_lock(folder / ".point.lock") as held:
        if not held:
            print(f"{label} skipped, another process runs it", flush=True)
            return None
        record = _read(folder / RECORD)
        values = dict(o.lstrip("+").split("=", 1) for o in overrides if "=" in o)
        record |= {"name": name, "values": {key: values[key] for key in keys if key in values}, "config": config}
        record.setdefault("stages", {})
        commands = commands_of(config, overrides, name, config_dirs)
        error = None
        with free_gpu(config["sweep"]["gpus"], sweep / ".locks") as gpu:
            for stage, command in commands.items():
                error = _run_stage(stage, command, record, folder, gpu, label)
                if error is not None:
                    break
            stopped = any(stage["code"] == STOPPED for stage in record["stages"].values())
        figures = read_figures(folder, compared="compare" in commands)
        objectives = None
        if error is None:
            try:
                objectives = objectives_of(figures, config["sweep"]["objectives"])
            except ValueError as absent:
                error = str(absent)
        state = "stopped" if stopped else "failed" if error else "done"
        record |= {"state": state, "error": error, "figures": figures}
        _write(folder / RECORD, record)
    shown = error or ", ".join(f"{name} {figures[name]:.4g}" for name in config["sweep"]["objectives"])
    print(f"{label} {record['state']}, {shown}", flush=True)
    return objectives


def _run_stage(
    stage: str, command: list[str], record: dict[str, Any], folder: Path, gpu: int | None, label: str
) -> str | None:
    """Run one command of a point if it is not done; returns why it failed, or None."""
    stages = record["stages"]
    if stages.get(stage, {}).get("command") == command and _is_done(record, stage, folder):
        return None
    for later in list(stages)[list(stages).index(stage) :] if stage in stages else []:
        del stages[later]
    record["state"] = "running"
    _write(folder / RECORD, record)
    log = folder / f"{stage}.log"
    print(f"{label} {stage}, {log}", flush=True)
    start = time.monotonic()
    code = execute(command, log, gpu)
    ended = {"seconds": time.monotonic() - start, "gpu": gpu, "ended": time.time()}
    stages[stage] = {"command": command, "code": code} | ended
    return reason_of(log, code) if code else None


def _is_done(record: dict[str, Any], stage: str, folder: Path) -> bool:
    ended = record["stages"].get(stage, {}).get("code") == 0
    return ended and (stage not in PRODUCTS or (folder / PRODUCTS[stage]).is_file())


def _read(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):  # absent, or torn by a crash of the machine: every command runs again
        return {}
    return record


def _write(file: Path, record: dict[str, Any]) -> None:
    replace_file(file, lambda path: path.write_text(json.dumps(record, indent=1)))
