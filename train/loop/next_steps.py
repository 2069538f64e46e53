"""What to do with a finished adapter, as commands that can be pasted."""

import json
import shlex
from pathlib import Path

from infer.adapter.read import FILE
from infer.program.paths import CONFIGS, SHIPPED
from train.run.config import Train


def model_words(path: str) -> list[str]:
    """How the command line names a model."""
    for file in sorted((CONFIGS / "model").glob("*.yaml")):
        named = [line.removeprefix("path: ") for line in file.read_text().splitlines() if line.startswith("path: ")]
        if path in (name.replace("${root:}", str(SHIPPED)) for name in named):
            return [f"model={file.stem}"]
    return [f"model.path={path}"]


def compare_command(job: Train, folder: Path, prompts: list[str]) -> str:
    """infer/compare.py at the training's precision, without and with the adapter."""
    words = ["python", "infer/compare.py", *model_words(job.model.path), f"run={job.run}"]
    words.append(f"adapter.path={folder / 'adapter'}")
    kind = job.precision.kind
    words += [f"only=[{kind}]"] if kind in ("bf16", "int8", "fp4", "nf4") else []
    if job.adapter.recovery is not None:
        words.append(f"+recovery.{kind}={job.adapter.recovery}")
    if prompts:
        words.append(f"prompts={json.dumps(prompts[:1], ensure_ascii=False)}")
    return shlex.join(words)


def next_steps(job: Train, folder: Path, prompts: list[str]) -> str:
    """Lines for the end of a run; prompts: of its previews."""
    sheet = folder / "previews" / f"step-{job.steps:06d}.png"
    look = f"{sheet} and {folder / 'loss.png'}" if sheet.is_file() else str(folder / "loss.png")
    adapter = shlex.quote(str(folder / "adapter"))
    lines = {
        "look": look,
        "draw": compare_command(job, folder, prompts),
        "ComfyUI": f"python infer/convert.py adapter.path={adapter} to=comfyui out={shlex.quote(Path(job.run).name)}"
        ".safetensors, and move that file into ComfyUI/models/loras",
        "diffusers": f'pipeline.load_lora_weights("{folder / "adapter"}", weight_name="{FILE}")',
        "share": "this command again with push=owner/name (docs/sharing.md)",
    }
    return "\n".join(["next:", *(f"  {name + ':':10} {text}" for name, text in lines.items())])
