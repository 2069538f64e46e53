"""What to do with a finished adapter, as commands that can be pasted."""

import json
import shlex
from pathlib import Path

from infer.adapter.read import FILE
from infer.adapter.second import shipped_models
from infer.checkpoint.model import OPTIONS, Model
from infer.program.literal import quote
from infer.program.no_effect import changed
from infer.sample.edit import Edit
from train.run.config import Train


def model_words(model: Model) -> list[str]:
    """How the command line names a model."""
    given = {name: getattr(model, name) for name in ("parts", *OPTIONS.values())}
    files = [f"model.{name}={value}" for name, value in given.items() if value is not None]
    named = [name for name, path in shipped_models().items() if path == model.path]
    return [f"model={named[0]}" if named else f"model.path={model.path}", *files]


def compare_command(job: Train, folder: Path, prompts: list[str], edits: dict[str, Edit] | None = None) -> str:
    """infer/compare.py at the training's precision, without and with the adapter; edits: by prompt, where it has
    references."""
    words = ["python", "infer/compare.py", *model_words(job.model), f"run={job.run}"]
    words.append(f"adapter.path={folder / 'adapter'}")
    kind = job.precision.kind
    if kind in ("bf16", "int8", "fp4", "nf4"):
        words.append(f"only=[{kind}]")
        for name in changed(job.precision, "products", "double_quant", "llm_int8", "t5"):
            words.append(f"precisions.{kind}.{name}={str(getattr(job.precision, name)).lower()}")
    if job.sampling.model is not None:
        words.append(f"sampling.model={job.sampling.model}")
    if job.adapter.recovery is not None:
        words.append(f"+recovery.{kind}={job.adapter.recovery}")
    edit = (edits or {}).get(prompts[0]) if prompts else None
    if edit is not None:
        side = job.data.reference_resolution or max(job.data.resolutions)
        asked = _typed({"prompt": edit.prompt, "references": edit.references})
        words += ["prompts=[]", f"edits=[{asked}]", f"reference_resolution={side}"]
    elif prompts:
        words.append(f"prompts={json.dumps(prompts[:1], ensure_ascii=False)}")
    return shlex.join(words)


def _typed(value: object) -> str:
    """Names, texts and lists as Hydra reads them on a command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_typed(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(_typed, value))}]"
    return quote(str(value), True)


def next_steps(job: Train, folder: Path, prompts: list[str], edits: dict[str, Edit] | None = None) -> str:
    """Lines for the end of a run; prompts: of its previews; edits: those with references."""
    sheet = folder / "previews" / f"step-{job.steps:06d}.png"
    look = f"{sheet} and {folder / 'loss.png'}" if sheet.is_file() else str(folder / "loss.png")
    adapter = shlex.quote(str(folder / "adapter"))
    lines = {
        "look": look,
        "draw": compare_command(job, folder, prompts, edits),
        "ComfyUI": f"python infer/convert.py adapter.path={adapter} to=comfyui out={shlex.quote(Path(job.run).name)}"
        ".safetensors, and move that file into ComfyUI/models/loras",
        "diffusers": f'pipeline.load_lora_weights("{folder / "adapter"}", weight_name="{FILE}")',
        "share": "this command again with push=owner/name (docs/sharing.md)",
    }
    return "\n".join(["next:", *(f"  {name + ':':10} {text}" for name, text in lines.items())])


HARDLY, RISEN = 0.02, 0.02  # shares of the validation loss


def what_to_change_first(job: Train, losses: dict[str, float]) -> str | None:
    """One line, by the validation losses at their steps: it learned hardly anything, or it learned by heart; None
    where neither is so, or nothing is known."""
    if len(losses) < 2:
        return None
    first, last = next(iter(losses.values())), list(losses.values())[-1]
    best = min(losses, key=lambda step: losses[step])
    if last > (1 + RISEN) * losses[best]:
        kept = "" if job.keep_best else ", and keep_best=1 keeps that checkpoint"
        return (
            f"change first: the validation loss was lowest at step {best} ({losses[best]:.4f}) and rose to {last:.4f}: "
            f"later steps learn the pictures by heart; set steps={best}{kept}, or take more pictures or a lower "
            "adapter.rank"
        )
    if last > (1 - HARDLY) * first:
        return (
            f"change first: the validation loss fell by {100 * (1 - last / first):.1f} % alone: look at the previews, "
            f"and where they show nothing of it, take optim.lr={3 * job.optim.lr:g} or more steps, then a higher "
            "adapter.rank"
        )
    return None
