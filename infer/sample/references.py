"""Reference pictures -> the latents that stand behind those of the picture that is drawn."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from infer.family.family import Text
from infer.family.find import of_model
from infer.sample.encode import check_latents, to_posterior
from infer.sample.picture import decode

Latents = dict[str, Tensor]
"""Normalised latents [channels, height / 8, width / 8] of pictures by their files, on the CPU in fp32."""


def encode_reference(vae: Any, picture: Image.Image, resolution: int | None) -> Tensor:
    """The normalised latents [channels, height / 8, width / 8] of an upright RGB picture, scaled as the family's
    pipelines in diffusers do: the mode of the autoencoder's posterior.

    Raises:
        NotFiniteError: the latents are NaN or infinite.
    """
    family = of_model(vae)
    pixels = family.reference_pixels(picture, resolution)
    mean, _ = to_posterior(vae, pixels)
    check_latents(mean, "a reference picture")
    with torch.no_grad():
        latents: Tensor = family.latent_map(vae.config, vae.get_buffer).normalise(mean)[0].cpu()
    return latents


def encode_files(vae: Any, files: Iterable[str], resolution: int | None) -> Latents:
    """Each distinct file once.

    Raises:
        ValueError: a file is no picture that can be read.
    """
    latents: Latents = {}
    for file in dict.fromkeys(files):
        latents[file] = encode_reference(vae, decode(Path(file).read_bytes(), file), resolution)
    return latents


def latents_behind(text: Text) -> int:
    """How large a text's references are together, in latents of one channel: what a drawing needs beyond the rest."""
    return sum(each.shape[-1] * each.shape[-2] for each in text.references)
