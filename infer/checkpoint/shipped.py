"""The checkpoints that configs/model names, and which of them is distilled from which."""

from pathlib import Path

from infer.checkpoint.model import Model
from infer.program.paths import CONFIGS, SHIPPED

DISTILLED = "distilled"
"""What sampling.model calls the few-step checkpoint. A config NAME_distilled.yaml stands beside NAME.yaml."""


def shipped_models() -> dict[str, str]:
    """The checkpoints that configs/model names: Hub id or folder, by the name that model=... takes."""
    found: dict[str, str] = {}
    for file in sorted((CONFIGS / "model").glob("*.yaml")):
        named = [line.removeprefix("path: ") for line in file.read_text().splitlines() if line.startswith("path: ")]
        if named:
            found[file.stem] = named[0].replace("${root:}", str(SHIPPED))
    return found


def shipped_name(model: Model) -> str | None:
    """The name that model=... takes for a checkpoint; None if configs/model does not name it."""
    here = Path(model.path).resolve() if model.local else None
    for name, path in shipped_models().items():
        if path == model.path or (here is not None and here == Path(path).resolve()):
            return name
    return None


def shipped_base(model: Model) -> str | None:
    """The checkpoint that a shipped few-step one is distilled from."""
    name, end = shipped_name(model), f"_{DISTILLED}"
    return shipped_models().get(name.removesuffix(end)) if name and name.endswith(end) else None


def shipped_distilled(model: Model) -> str | None:
    """The shipped few-step checkpoint that is distilled from this one."""
    name = shipped_name(model)
    return shipped_models().get(f"{name}_{DISTILLED}") if name else None
