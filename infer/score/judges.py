"""What pictures are judged by: networks, functions of the user's own, the training pictures. Checked without torch."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from infer.program.absent import meant
from infer.program.paths import expand, is_hub_id
from infer.sample.picture import SUFFIXES

Score = Callable[[Image.Image, str], float]

UNRELATED = ("a street with cars", "a bowl of fruit on a table")
"""Prompts that few adapters have to do with."""
GIVES = {
    "clip": ("clip_t", "clip_i", "cmmd"),
    "dino": ("dino", "kid", "nearest_dino"),
    "lpips": ("lpips",),
    "image_reward": ("image_reward",),
}


@dataclass
class Networks:
    """Where the networks are; null leaves one out, and the report says so."""

    clip: str | None = None
    """A CLIPModel with its processor (CLIP-T, CLIP-I, CMMD): a folder or a Hub id."""
    dino: str | None = None
    """A vision model of transformers with its image processor, such as DINOv2 (DINO, KID): a folder or a Hub id."""
    lpips: str | None = None
    """AlexNet as torchvision saves it (alexnet-owt-7be5be79.pth, or the same as .safetensors): a file."""
    image_reward: str | None = None
    """ImageReward's name or checkpoint file; needs its package (`pip install image-reward`)."""

    def __post_init__(self) -> None:
        expand(self, "clip", "dino", "lpips", "image_reward")

    def absent(self) -> dict[str, str]:
        """Every score that no network is there for, and which one it needs."""
        return {
            score: f"networks.{name} is null"
            for name, scores in GIVES.items()
            if getattr(self, name) is None
            for score in scores
        }


def check_paths(networks: Networks) -> None:
    """Look at the places that are named, not at what is in them.

    Raises:
        ValueError: nothing can be there.
    """
    for name in ("clip", "dino"):
        path = getattr(networks, name)
        if path is None or Path(path).is_dir():
            continue
        if Path(path).is_file():
            raise ValueError(
                f"networks.{name} is {path!r}, a file; give the folder of transformers' format that holds its "
                "config.json, or set it to null to go without"
            )
        if not is_hub_id(path):
            raise ValueError(
                f"networks.{name} is {path!r}, which is no folder here and no Hub id (owner/name); {meant(path)}, "
                "or set it to null to go without"
            )
    if networks.lpips is not None and not Path(networks.lpips).is_file():
        raise ValueError(
            f"networks.lpips is {networks.lpips!r}, and there is no such file; give AlexNet's, or set it to null"
        )
    if networks.image_reward is not None and find_spec("ImageReward") is None:
        raise ValueError(
            f"networks.image_reward is {networks.image_reward!r}, but its package is not here; "
            "`pip install image-reward`, or set it to null"
        )


def find_scores(names: dict[str, str]) -> dict[str, Score]:
    """Named dotted paths -> functions (picture, prompt) -> number.

    Raises:
        ValueError: a path leads to no function.
    """
    from hydra.utils import get_method

    found: dict[str, Score] = {}
    for name, path in names.items():
        try:
            found[name] = get_method(path)
        except Exception as error:  # whatever importing the user's module raises
            raise ValueError(
                f"scores.{name} is {path!r}, which is no function that can be imported ({error}); "
                "write module.function of (picture, prompt) -> number"
            ) from error
    return found


def list_pictures(folder: str, option: str = "references") -> list[Path]:
    """The pictures in a folder and its subfolders; names that begin with a dot are left out.

    Raises:
        ValueError: it is no folder, or holds no picture.
    """
    root = Path(folder)
    if root.is_file():
        raise ValueError(f"{option} is {folder!r}, a file; give the folder of the training pictures")
    if not root.is_dir():
        raise ValueError(f"{option} is {folder!r}, which is no folder; give the folder of the training pictures")
    found = sorted(
        file
        for file in root.rglob("*")
        if file.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in file.relative_to(root).parts)
    )
    if not found:
        raise ValueError(f"{option} {folder} holds no picture ({', '.join(SUFFIXES)}); give the training pictures")
    return found
