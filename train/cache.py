"""Samples -> encoded samples, each encoded once and found by what it is.

The key of a picture is its pixels, the transform and the autoencoder's weights; of a text its words, the T5 length,
both encoders' weights and T5's precision. A renamed file costs nothing, an edited one is never taken for the old one.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from tqdm import tqdm

from infer.atomic import replace_file
from infer.encode import Text, release, text_encoder, to_moments
from infer.flux import Model, fingerprint, load_vae
from infer.quantize import Precision
from train.data import Data, Sample, pixel_hash, to_square


@dataclass
class Cache:
    """Where encoded pictures and texts lie."""

    folder: Path
    pictures: list[str]
    """The key of each sample's picture."""
    texts: dict[str, str]
    """The key of each text."""

    def picture(self, index: int) -> tuple[Tensor, Tensor]:
        """A sample's latents: mean and deviation of the autoencoder's posterior, [channels, height, width] each."""
        tensors = _read(_file(self.folder, "pictures", self.pictures[index]))
        return tensors["mean"], tensors["deviation"]

    def text(self, text: str) -> Text:
        tensors = _read(_file(self.folder, "texts", self.texts[text]))
        return Text(tensors["t5"], tensors["pooled"])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"the cached {file} cannot be read ({error}); delete it and start the run again") from error


def _file(folder: Path, kind: str, key: str) -> Path:
    return folder / kind / key[:2] / f"{key}.safetensors"


def _write(file: Path, tensors: dict[str, Tensor]) -> None:
    replace_file(file, lambda path: path.write_bytes(save(tensors)))


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _progress(total: int, what: str, show: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=what, unit=what.split()[-1].rstrip("s"), disable=not show or total == 0)


def build(
    data: Data,
    samples: list[Sample],
    extra_texts: list[str],
    model: Model,
    precision: Precision,
    device: torch.device,
    write: bool,
) -> Cache:
    """Encode what is not in the cache yet: pictures with the autoencoder, then texts with CLIP and T5; both are freed.

    write: whether this process encodes (rank 0); others only work out the keys.
    """
    folder = Path(data.cache)
    transform = ["centre square", data.resolution]
    vae_print = fingerprint(model, "vae")
    keys, missing = [], {}
    with _progress(len(samples), "reading pictures", write) as bar:
        for i, sample in enumerate(samples):
            key = _key("picture", pixel_hash(sample.load()), transform, vae_print)
            keys.append(key)
            if not _file(folder, "pictures", key).is_file():
                missing[key] = i
            bar.update()
    if missing and write:
        vae = load_vae(model, device)
        todo = list(missing.items())
        with _progress(len(todo), "encoding pictures", write) as bar:
            for key, i in todo:  # one by one: no latent depends on its neighbours, and little memory is needed
                mean, deviation = to_moments(vae, to_square(samples[i].load(), data.resolution)[None])
                tensors = {"mean": mean[0].cpu().contiguous(), "deviation": deviation[0].cpu().contiguous()}
                _write(_file(folder, "pictures", key), tensors)
                bar.update()
        del vae
        release(device)

    t5 = asdict(precision.for_t5())
    prints = [fingerprint(model, part) for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")]
    wanted = dict.fromkeys([*(sample.caption for sample in samples), *extra_texts])
    texts = {text: _key("text", text, data.text_length, prints, t5) for text in wanted}
    absent = [text for text, key in texts.items() if not _file(folder, "texts", key).is_file()]
    if absent and write:
        with (
            text_encoder(model, precision, device, data.text_length) as encoder,
            _progress(len(absent), "encoding texts", write) as bar,
        ):
            for text in absent:
                (encoded,) = encoder([text])
                _write(
                    _file(folder, "texts", texts[text]),
                    {"t5": encoded.t5.contiguous(), "pooled": encoded.pooled.contiguous()},
                )
                bar.update()
            for text in encoder.truncated(absent):
                bar.write(f"T5 sees only the first {encoder.length} tokens of {text!r}")
    return Cache(folder, keys, texts)
