"""The model card beside an adapter (README.md in the Hub's format), and its way to the Hub, when that is asked for."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from infer.adapter.factors import NAMES
from infer.adapter.read import FILE
from infer.checkpoint.family import own_drawing
from infer.checkpoint.model import Model
from infer.family.find import LICENCES, of_pipeline
from infer.program.atomic import replace_file
from infer.program.paths import is_hub_id


@dataclass
class Card:
    """What a card says."""

    name: str
    base: str
    """Hub id of the base model, or a local path, of which the last part is said."""
    pipeline: str
    """diffusers' class of the base's pipeline."""
    trigger: str | None
    precision: str
    """Of the base that it was trained on, such as `nf4`."""
    facts: dict[str, str]
    """Further rows of its table, such as rank and steps."""
    figures: dict[str, float] = field(default_factory=dict)
    """Validation losses by step, as text keys."""
    samples: dict[str, str] = field(default_factory=dict)
    """Prompts with the name of the picture beside the card."""
    notes: list[str] = field(default_factory=list)
    """What users must know."""
    few: str | None = None
    """Hub id or folder of the few-step checkpoint that it is drawn on too."""
    kind: str = "lora"
    """lora, lokr, loha or oft (infer/adapter/factors.py), which diffusers' pipelines load or do not."""
    place: str = "."
    """Where the adapter is loaded from: its folder, or its repository on the Hub."""


def write_card(folder: Path, card: Card) -> Path:
    """Write `folder/README.md`: YAML front matter that the Hub understands, then text."""
    from huggingface_hub import ModelCardData

    hub = is_hub_id(card.base)
    licence, licence_name = LICENCES.get(card.base, (None, None))
    data = ModelCardData(
        base_model=card.base if hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=licence,
        license_name=licence_name,
        tags=[
            of_pipeline(card.pipeline, card.base).TAG,
            card.kind,
            "text-to-image",
            "diffusers-training",
            "template:diffusion-lora",
        ],
        instance_prompt=card.trigger,
        widget=[{"text": prompt, "output": {"url": file}} for prompt, file in card.samples.items()] or None,
    )
    base = card.base if hub else Path(card.base).name
    lines = [
        f"# {card.name}",
        "",
        f"A {NAMES[card.kind]} adapter for {base}, trained on its weights in {card.precision}.",
        "",
    ]
    if card.trigger:
        lines += [f"Trigger word: `{card.trigger}`", ""]
    lines += [f"{note}\n" for note in card.notes]
    for prompt, file in card.samples.items():
        lines += [f"![{prompt}]({file})", "", prompt, ""]
    lines += ["| | |", "|---|---|", f"| base | {base} |", f"| precision of the base in training | {card.precision} |"]
    lines += [f"| {name} | {value} |" for name, value in card.facts.items()]
    if card.figures:
        steps = sorted(card.figures, key=int)
        losses = ", ".join(f"{card.figures[step]:.4f} at step {step}" for step in steps)
        lines.append(f"| validation loss | {losses} |")
    if card.kind != "lora":
        lines += ["", *_of_kind(card)]
    else:
        lines += ["", *_snippet(card, card.base if hub else "the base model's folder")]
    if card.kind == "lora" and len(of_pipeline(card.pipeline, card.base).ENCODERS) > 1:
        lines += [
            "",
            "diffusers says that no keys are there for CLIPTextModel: right, only the transformer has an adapter.",
        ]
    if card.few is not None and card.kind == "lora":
        lines += ["", *_in_few_steps(card, card.few)]
    text = f"---\n{data.to_yaml()}\n---\n" + "\n".join(lines) + "\n"
    readme = folder / "README.md"
    replace_file(readme, lambda path: path.write_text(text))
    return readme


def prompt_of(card: Card) -> str:
    """A prompt that shows the adapter: one of its samples', else the trigger word."""
    return next(iter(card.samples), card.trigger or "a cup on a table")


def _in_few_steps(card: Card, few: str) -> list[str]:
    drawing = own_drawing(Model(few))
    how = f", num_inference_steps={drawing.steps}, guidance_scale={drawing.guidance:g}"
    return [
        f"Trained on the base model, it is drawn on {Path(few).name if not is_hub_id(few) else few} too, which is "
        f"distilled to {drawing.steps} steps:",
        "",
        *_snippet(card, few if is_hub_id(few) else "the distilled model's folder", how),
    ]


def _of_kind(card: Card) -> list[str]:
    """How an adapter that is no LoRA is drawn with."""
    said = {
        "oft": "Its keys are OneTrainer's (`oft_R`), and it is drawn by infer/draw.py of flux-lora, or merged into the "
        "weights by infer/merge.py.",
    }.get(
        card.kind,
        "Its keys are LyCORIS', which ComfyUI reads. As LoRA, which diffusers' pipelines load, it is written by "
        "infer/convert.py of flux-lora with to=diffusers.",
    )
    return [f"It is {NAMES[card.kind]}. {said}"]


def _snippet(card: Card, base: str, how: str = "") -> list[str]:
    """A program that draws with the adapter. how: further arguments of the call."""
    return [
        "```python",
        "import torch",
        f"from diffusers import {card.pipeline}",
        "",
        f'pipeline = {card.pipeline}.from_pretrained("{base}", torch_dtype=torch.bfloat16)',
        f"# or the name of this repository on the Hub in the place of {card.place}",
        f'pipeline.load_lora_weights("{card.place}", weight_name="{FILE}")',
        'pipeline.to("cuda" if torch.cuda.is_available() else "cpu")',
        f"picture = pipeline({json.dumps(prompt_of(card), ensure_ascii=False)}{how}).images[0]",
        'picture.save("picture.png")',
        "```",
    ]


def push(folder: Path, repository: str) -> str:
    """Upload an adapter's folder to the Hub, as a private repository if it is new; returns its address.

    Raises:
        ValueError: the name is none, there is no adapter, or the Hub refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    if repository.count("/") != 1:
        raise ValueError(f"push is {repository!r}; write owner/name")
    if not (folder / FILE).is_file():
        raise ValueError(f"there is no adapter in {folder} to push")
    api = huggingface_hub.HfApi()
    try:
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload a LoRA adapter")
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"the Hub did not take {repository}: {reason}; log in with `hf auth login` and check the name. The adapter "
            f"is in {folder}"
        ) from error
    return str(address)
