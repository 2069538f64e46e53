"""What to do with a finished adapter, as commands that can be pasted."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path

from infer.adapter.read import FILE
from infer.checkpoint.model import OPTIONS, Model
from infer.checkpoint.shipped import shipped_name
from infer.program.literal import quote
from infer.program.no_effect import changed
from infer.sample.edit import Edit
from train.run.config import Train


def model_words(model: Model) -> list[str]:
    """How the command line names a model."""
    given = {name: getattr(model, name) for name in ("parts", *OPTIONS.values())}
    files = [f"model.{name}={value}" for name, value in given.items() if value is not None]
    named = shipped_name(model)
    return [f"model={named}" if named else f"model.path={model.path}", *files]


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
    out = shlex.quote(Path(job.run).name)
    convert = f"python infer/convert.py adapter.path={adapter} to="
    merge = f"python infer/merge.py {shlex.join(model_words(job.model))} adapter.path={adapter} out={out}-merged"
    lines = {"look": look, "draw": compare_command(job, folder, prompts, edits)}
    if job.adapter.kind == "lora":
        lines["ComfyUI"] = f"{convert}comfyui out={out}.safetensors, and move that file into ComfyUI/models/loras"
        lines["diffusers"] = f'pipeline.load_lora_weights("{folder / "adapter"}", weight_name="{FILE}")'
    elif job.adapter.kind == "oft":
        lines["others"] = f"{merge}, whose folder diffusers loads; OneTrainer reads {folder / 'adapter' / FILE}"
    else:
        lines["ComfyUI"] = f"move a copy of {folder / 'adapter' / FILE} into ComfyUI/models/loras"
        lines["diffusers"] = f"{convert}diffusers out={out}-lora.safetensors writes it as LoRA, or {merge}"
    lines["share"] = "this command again with push=owner/name (docs/sharing.md)"
    return "\n".join(["next:", *(f"  {name + ':':10} {text}" for name, text in lines.items())])


def ended_early(job: Train, asked: int, reason: str) -> str:
    """What is said of a run that ended before its last step; job: with the steps that it made."""
    best = f"python infer/choose.py run={shlex.quote(job.run)}"
    return (
        f"ended at step {job.steps} of {asked}: {reason}. The adapter is that of the last step; `{best}` draws the "
        "checkpoints that are kept and says which is the best (keep_best=1 keeps that of the lowest loss); the same "
        "command without what ended it (stop.loss=0, stop.likeness=0, stop.copying=null, stop.drift=null) goes on"
    )


HARDLY, RISEN = 0.02, 0.02  # shares of the validation loss
STILL = 0.05  # change of the previews' latents below which hardly anything is drawn otherwise
BLED = 0.5  # drift over change from which on an adapter moves everything and not what it was taught


def what_to_change_first(
    job: Train, losses: Mapping[str, float], scores: Mapping[str, Mapping[str, float]]
) -> list[str]:
    """Lines on what to change first, by the validation losses and the scores at their steps (as text), what matters
    most first: it copies, it learned by heart, it learned hardly anything, it drifts. None where nothing is known."""
    last = scores[max(scores, key=int)] if scores else {}
    found = [_copied(job, scores), _by_heart(job, losses)]
    if not any(found):
        found.append(_hardly(job, losses, last.get("change")))
    found.append(_drifts(job, last))
    return [f"change first: {note}" if not i else f"then: {note}" for i, note in enumerate(filter(None, found))]


def _smaller(job: Train) -> str:
    """The setting of an adapter that can learn less."""
    return "a smaller adapter.block" if job.adapter.kind == "oft" else "a lower adapter.rank"


def _copied(job: Train, scores: Mapping[str, Mapping[str, float]]) -> str | None:
    copying = {step: one["copying"] for step, one in scores.items() if "copying" in one}
    if not copying or not copying[max(copying, key=int)]:
        return None
    share = copying[max(copying, key=int)]
    earlier = [int(step) for step, value in copying.items() if value < share]
    fewer = f"steps={max(earlier)}" if earlier else "fewer steps"
    return (
        f"{100 * share:.0f} % of the drawn pictures are near copies of training pictures: set {fewer}, or take more "
        f"pictures or {_smaller(job)}"
    )


def _by_heart(job: Train, losses: Mapping[str, float]) -> str | None:
    if len(losses) < 2:
        return None
    last, best = list(losses.values())[-1], min(losses, key=lambda step: losses[step])
    if last <= (1 + RISEN) * losses[best]:
        return None
    kept = "" if job.keep_best else ", and keep_best=1 keeps that checkpoint"
    return (
        f"the validation loss was lowest at step {best} ({losses[best]:.4f}) and rose to {last:.4f}: later steps learn "
        f"the pictures by heart; set steps={best}{kept}, or take more pictures or {_smaller(job)}"
    )


def _hardly(job: Train, losses: Mapping[str, float], change: float | None) -> str | None:
    found = list(losses.values())
    fell = 1 - found[-1] / found[0] if len(found) > 1 else None
    if (fell is None or fell >= HARDLY) and (change is None or change >= STILL):
        return None
    said = []
    if fell is not None and fell < HARDLY:
        little = f"fell by {100 * fell:.1f} % alone" if fell >= 0.0005 else "did not fall"
        said.append(f"the validation loss {little}")
    if change is not None and change < STILL:
        said.append(f"pictures are moved by {change:.3f} of their latents alone")
    size = {"lora": ", then a higher adapter.rank", "oft": ", then a larger adapter.block"}.get(job.adapter.kind, "")
    return (
        f"{' and '.join(said)}: look at the previews, and where they show nothing of it, take "
        f"optim.lr={3 * job.optim.lr:g} or more steps{size}"
    )


def _drifts(job: Train, last: Mapping[str, float]) -> str | None:
    drift, change = last.get("drift"), last.get("change")
    if drift is None or not change or drift <= BLED * change:
        return None
    mend = "preserve=empty, or preserve=class with a trigger" if job.preserve.kind == "none" else "a lower optim.lr"
    return (
        f"unrelated prompts are moved by {drift:.3f}, where the run's own are by {change:.3f}: set {mend} "
        f"(docs/methods.md), or {_smaller(job)} or a lower optim.lr"
    )
