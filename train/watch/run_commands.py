"""Commands about a run that is there: go on, draw with it, look at its data."""

import json
from pathlib import Path
from typing import Any

import yaml

from infer.checkpoint.model import Model
from infer.choosing.run import known_settings
from infer.choosing.settings import Choose
from infer.drawing.settings import Draw
from infer.program.paths import CONFIGS
from train.loop.next_steps import model_words
from train.state.checkpoint_names import checkpoint_steps
from train.state.latest import NAME as LATEST
from train.watch.commands import LINE, check, lines_of, numbers, text_of, typed, typed_text
from train.watch.places import RefusedError, run_folder
from train.watch.runs import flat, read_config
from train.watch.states import read_json

OF_A_TERMINAL = ("hydra", "sweep", "push", "mirror")
"""Settings of a recorded command that the page does not start again."""
NETWORKS = ("none", "hub")
"""Files of configs/networks: what judges likeness to the training pictures."""
SIDE = 4096  # pixels of a picture's side at most


def go_on_words(run: str) -> list[str]:
    """The run's own command once more.

    Raises:
        RefusedError: it is not recorded, or is one for a terminal.
    """
    latest = read_json(run_folder(run) / LATEST)
    words = latest.get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise RefusedError(
            f"the command of run {run!a} is not recorded (an older version started it); type it once more"
        )
    if latest.get("ranks") not in (None, 1):
        raise RefusedError(
            f"run {run!a} was started by a launcher with {latest['ranks']} processes; go on in a terminal"
        )
    for word in words:
        name = word.lstrip("+").partition("=")[0]
        if not LINE.fullmatch(word.lstrip("+")) or "${" in word or name.partition(".")[0] in OF_A_TERMINAL:
            raise RefusedError(
                f"the run was started with {word[:80]!a}, which is for a terminal: type its command there"
            )
    return ["train/train.py", *words]


def _model(run: str) -> tuple[list[str], dict[str, Any]]:
    """How a command names the run's base model and its precision, and the run's settings."""
    config = read_config(run_folder(run))
    model, precision = config.get("model"), config.get("precision")
    try:
        words = model_words(known_settings(Model, model))
    except (ValueError, TypeError, AttributeError) as error:
        said = f"the settings of run {run!a} do not say its base model ({error}); its config.yaml is absent or broken"
        raise RefusedError(said) from error
    if any("${" in word for word in words):
        raise RefusedError(f"the base model of run {run!a} would be filled in from elsewhere; draw in a terminal")
    if isinstance(model, dict) and model.get("weights") == "random":
        words.append("model.weights=random")
    kind = precision.get("kind") if isinstance(precision, dict) else None
    if isinstance(kind, str) and (CONFIGS / "precision" / f"{kind}.yaml").is_file() and kind.isidentifier():
        words.append(f"precision={kind}")
    return words, config


def _sampling(form: dict[str, Any]) -> list[str]:
    words = []
    for name, kind, low, high in (
        ("steps", int, 1, 1000),
        ("guidance", float, 0, 100),
        ("height", int, 16, SIDE),
        ("width", int, 16, SIDE),
    ):
        value = text_of(form, name, 12)
        if value:
            words.append(f"sampling.{name}={typed(value, kind, name, low, high)}")
    return words


def draw_words(form: dict[str, Any]) -> list[str]:
    """infer/draw.py with a run's adapter, or its base alone.

    Raises:
        RefusedError: a field is wrong.
    """
    run = text_of(form, "run", 200)
    folder = run_folder(run)
    words, _ = _model(run)
    which = text_of(form, "adapter", 40) or "adapter"
    known = [each for each in ("adapter", "adapter-ema", "chosen") if (folder / each).is_dir()]
    if which == "base":
        given = []
    elif which in known:
        given = [f"adapter.path={typed_text(str(folder / which))}"]
    else:
        raise RefusedError(f"run {run!a} has no {which!a}; it has {', '.join(known) or 'no adapter yet'}")
    prompts = lines_of(form, "prompts", 50)
    if not prompts:
        raise RefusedError("there is no prompt; write one a line")
    weights = numbers(form, "weights", float, -100, 100)
    if weights and given:
        given.append(f"weights=[{','.join(f'{each:g}' for each in weights)}]")
    elif weights:
        raise RefusedError("strengths are the adapter's, and the base alone has none; leave them empty")
    seeds = numbers(form, "seeds", int, 0, 2**63 - 1)
    words += [*given, f"prompts={json.dumps(prompts, ensure_ascii=False)}"]
    words += [f"seeds=[{','.join(map(str, seeds))}]"] if seeds else []
    words += [*_sampling(form), f"out={typed_text(str(free_folder(folder / 'drawn')))}", "resident=true"]
    words = ["infer/draw.py", *words]
    check(words, "draw", Draw)
    return words


def free_folder(parent: Path) -> Path:
    """A folder of a number that is not there yet."""
    taken = [int(each.name) for each in parent.glob("*") if each.name.isdecimal()] if parent.is_dir() else []
    return parent / f"{max(taken, default=0) + 1:03d}"


def choose_words(form: dict[str, Any]) -> list[str]:
    """infer/choose.py for a run: the grid and the scores, or `take` a checkpoint.

    Raises:
        RefusedError: a field is wrong.
    """
    run = text_of(form, "run", 200)
    folder = run_folder(run)
    there = checkpoint_steps(folder / "checkpoints")
    words = ["infer/choose.py", f"run={typed_text(run)}"]
    weights_of = text_of(form, "average", 10)
    if weights_of not in ("", "true", "false"):
        raise RefusedError(f"average is {weights_of!a}; choose true or false, or leave it empty")
    words += [f"average={weights_of}"] if weights_of else []
    take = text_of(form, "take", 40)
    steps = numbers(form, "checkpoints", int, 0, 10**9)
    for step in [*steps, *([typed(take, int, "take", 0, 10**9)] if take else [])]:
        if step not in there:
            raise RefusedError(
                f"run {run!a} has no checkpoint of step {step}; it has {', '.join(map(str, there)) or 'none'}"
            )
    if take:
        words.append(f"take=step-{int(take):06d}")
    else:
        words += [f"checkpoints=[{','.join(f'step-{step:06d}' for step in steps)}]"] if steps else []
        prompts = lines_of(form, "prompts", 20)
        words += [f"prompts={json.dumps(prompts, ensure_ascii=False)}"] if prompts else []
        weights = numbers(form, "weights", float, -100, 100)
        words += [f"weights=[{','.join(f'{each:g}' for each in weights)}]"] if weights else []
        seed = text_of(form, "seed", 20)
        words += [f"seed={typed(seed, int, 'seed', 0, 2**63 - 1)}"] if seed else []
        networks = text_of(form, "networks", 40)
        if networks:
            if networks not in NETWORKS:
                raise RefusedError(f"networks is {networks!a}; choose {' or '.join(NETWORKS)}")
            words.append(f"networks={networks}")
        words += [*_sampling(form), "resident=true"]
    check(words, "choose", Choose)
    return words


def look_words(train: list[str]) -> list[str]:
    """A look at the data of a training's command: of its words, and of its preset's settings, those that look.py has.

    Raises:
        RefusedError: neither names pictures.
    """
    kept = [word for word in train[1:] if word.startswith(("model=", "run=", "data."))]
    given = {word.partition("=")[0] for word in kept}
    for preset in [word.partition("=")[2] for word in train if word.startswith("experiment=")]:
        kept = [*(word for word in _preset_words(preset) if word.partition("=")[0] not in given), *kept]
    if not any(word.startswith("data.path=") for word in kept):
        raise RefusedError("choose the folder of the pictures, to look at them")
    return ["train/look.py", *kept]


def _preset_words(preset: str) -> list[str]:
    """The model and the data of a file of configs/experiment, which look.py has none of."""
    said = yaml.safe_load((CONFIGS / "experiment" / f"{preset}.yaml").read_text())
    models = [each["override /model"] for each in said.get("defaults", []) if "override /model" in each]
    data = flat({"data": said["data"]}) if "data" in said else {}
    return [*(f"model={model}" for model in models), *(f"{name}={value}" for name, value in data.items())]
