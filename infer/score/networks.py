"""Networks that judge pictures: CLIP, DINO, LPIPS, ImageReward. None ships with the toolkit.

Each comes from a folder or a Hub id in the config, is loaded once all pictures are drawn, and is named in the report
where it is absent. CLIP and DINO are transformers' own models with their own preprocessing; LPIPS is AlexNet's features
under the published weights that torchmetrics ships. torchmetrics' own class is the reference in the tests: it needs
torchvision, whose presence alone switches the preprocessing of CLIP and DINO, and takes AlexNet from no file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from infer.score.judges import Networks, check_paths
from infer.score.pairs import to_pixels

TRAINING = ("dino", "nearest_dino", "kid", "clip_i", "cmmd")  # scores that need the training pictures too
Embed = Callable[[list[Image.Image]], Tensor]
BATCH = 16


@dataclass
class Loaded:
    """The networks that are named; None for the others."""

    clip: Embed | None = None  # pictures -> embeddings [n, width] of length 1
    text: Callable[[list[str]], Tensor] | None = None  # CLIP's embeddings of prompts, [n, width] of length 1
    dino: Embed | None = None  # pictures -> the class token [n, width], not normalised
    lpips: Callable[[Image.Image, Image.Image], float] | None = None
    image_reward: Callable[[Image.Image, str], float] | None = None


def check_networks(networks: Networks) -> None:
    """Look at the networks that are named before anything is drawn.

    Raises:
        ValueError: one is absent, or another network.
    """
    check_paths(networks)
    for name, wanted in (("clip", "a CLIP model"), ("dino", "a vision model")):
        path = getattr(networks, name)
        if path is None:
            continue
        config = _read(name, path, "AutoConfig")
        kind = str(config.model_type)
        if (kind == "clip") != (name == "clip") or not (name == "clip" or hasattr(config, "image_size")):
            raise ValueError(f"networks.{name} {path} is of type {kind}, not {wanted}; name another, or set it to null")
    if networks.lpips is not None:
        _alexnet(networks.lpips)
        _channel_weights()


def load_networks(networks: Networks, device: torch.device) -> Loaded:
    """The networks that are named, in fp32."""
    loaded = Loaded()
    if networks.clip is not None:
        loaded.clip, loaded.text = _clip(networks.clip, device)
    if networks.dino is not None:
        loaded.dino = _dino(networks.dino, device)
    if networks.lpips is not None:
        loaded.lpips = _lpips(networks.lpips, device)
    if networks.image_reward is not None:
        loaded.image_reward = _image_reward(networks.image_reward, device)
    return loaded


def clip_score(embed: Embed, text: Callable[[list[str]], Tensor], picture: Image.Image, prompt: str) -> float:
    """CLIP-T: the cosine of a picture's and its prompt's embeddings (Hessel et al. 2021, neither scaled nor cut)."""
    return float((embed([picture]) * text([prompt])).sum())


def _read(name: str, path: str, cls: str, **options: Any) -> Any:
    import transformers

    try:
        return getattr(transformers, cls).from_pretrained(path, **options)
    except (OSError, ValueError) as error:  # what transformers raises for absent and for broken files
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load networks.{name} from {path}: {reason}; set it to null to go without") from error


def _in_batches(embed: Callable[[list[Any]], Tensor]) -> Callable[[list[Any]], Tensor]:
    def whole(items: list[Any]) -> Tensor:
        with torch.no_grad():
            return torch.cat([embed(items[i : i + BATCH]).float().cpu() for i in range(0, len(items), BATCH)])

    return whole


def _clip(path: str, device: torch.device) -> tuple[Embed, Callable[[list[str]], Tensor]]:
    model = _read("clip", path, "CLIPModel", dtype=torch.float32).to(device).eval()
    images = _read("clip", path, "AutoImageProcessor")
    words = _read("clip", path, "AutoTokenizer")
    most = model.config.text_config.max_position_embeddings

    def embed(pictures: list[Image.Image]) -> Tensor:
        inputs = images(pictures, return_tensors="pt").to(device)
        return functional.normalize(model.visual_projection(model.vision_model(**inputs).pooler_output))

    def text(prompts: list[str]) -> Tensor:
        inputs = words(prompts, return_tensors="pt", padding=True, truncation=True, max_length=most).to(device)
        return functional.normalize(model.text_projection(model.text_model(**inputs).pooler_output))

    return _in_batches(embed), _in_batches(text)


def _dino(path: str, device: torch.device) -> Embed:
    model = _read("dino", path, "AutoModel", dtype=torch.float32).to(device).eval()
    images = _read("dino", path, "AutoImageProcessor")

    def embed(pictures: list[Image.Image]) -> Tensor:
        features: Tensor = model(**images(pictures, return_tensors="pt").to(device)).last_hidden_state[:, 0]
        return features

    return _in_batches(embed)


def _alexnet(path: str) -> nn.Sequential:
    """AlexNet's convolutional part (Krizhevsky 2014, torchvision's layout), its weights from a file."""
    features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    file = Path(path)
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        convolutions = {key.removeprefix("features."): own for key, own in state.items() if key.startswith("features.")}
        features.load_state_dict(convolutions)
    except Exception as error:  # pickle, safetensors and torch each raise their own
        raise ValueError(
            f"networks.lpips {path} does not hold AlexNet's weights as torchvision names them (features.0.weight, "
            f"...): {str(error).splitlines()[0]}"
        ) from error
    return features.eval().requires_grad_(False)


def _channel_weights() -> list[Tensor]:
    """LPIPS 0.1's weight of each channel after each ReLU, [1, channels, 1, 1], from the file that torchmetrics ships.

    Raises:
        ValueError: this version of torchmetrics does not ship them there.
    """
    file = resources.files("torchmetrics.functional.image") / "lpips_models" / "alex.pth"
    try:
        with file.open("rb") as stream:
            state = torch.load(stream, map_location="cpu", weights_only=True)
        return [state[f"lin{i}.model.1.weight"] for i in range(5)]
    except (OSError, KeyError) as error:
        raise ValueError(
            f"networks.lpips is set, but torchmetrics has no LPIPS weights at {file} "
            f"({type(error).__name__}: {error}); "
            "install torchmetrics 1.9, or set networks.lpips to null"
        ) from error


def _lpips(path: str, device: torch.device) -> Callable[[Image.Image, Image.Image], float]:
    """LPIPS 0.1 (Zhang et al. 2018): squared differences of normalised features after each ReLU, by channel weights."""
    weights = [weight.to(device) for weight in _channel_weights()]
    features = _alexnet(path).to(device)
    shift = torch.tensor([-0.030, -0.088, -0.188], device=device)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], device=device)[:, None, None]

    def stages(picture: Image.Image) -> list[Tensor]:
        x = ((to_pixels(picture).to(device) * 2 - 1) - shift) / scale
        found = []
        for layer in features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found

    def distance(picture: Image.Image, other: Image.Image) -> float:
        with torch.no_grad():
            pairs = zip(stages(picture), stages(other), weights, strict=True)
            return float(sum(functional.conv2d((a - b).square(), weight).mean() for a, b, weight in pairs))

    return distance


def _image_reward(name: str, device: torch.device) -> Callable[[Image.Image, str], float]:
    """ImageReward (Xu et al. 2023), by its own package."""
    import ImageReward  # type: ignore[import-not-found]

    model = ImageReward.load(name, device=str(device))

    def score(picture: Image.Image, prompt: str) -> float:
        return float(model.score(prompt, [picture]))

    return score
