"""Prompts -> embeddings, pictures <-> latents: what goes into FLUX's transformer and comes out of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from infer.checkpoint.family import family_of, guided_by_two_calls
from infer.checkpoint.model import Model
from infer.checkpoint.text import load_text_parts
from infer.device.device import release
from infer.family.family import Text
from infer.family.find import of_model
from infer.family.packing import unpack
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision
from infer.quantize.storage import stored_bytes


class NotFiniteError(ValueError):
    """A picture's or a prompt's numbers are NaN or infinite."""


@dataclass
class TextEncoder:
    """A checkpoint's text encoders, loaded, with what they weigh."""

    encode: Callable[[str], Text] | None
    count: Callable[[str], int]
    length: int  # text tokens
    weights_bytes: int

    def __call__(self, prompts: list[str]) -> list[Text]:
        """Prompts -> embeddings on the CPU, one by one so that none depends on its neighbours.

        Raises:
            NotFiniteError: an embedding is NaN or infinite.
        """
        assert self.encode is not None, "the encoders are freed already"
        texts = []
        with torch.no_grad():
            for prompt in prompts:
                text = self.encode(prompt)
                parts = [text.embeds, *([] if text.pooled is None else [text.pooled])]
                if not all(part.isfinite().all() for part in parts):
                    raise NotFiniteError(
                        f"the text encoder's embeddings of {prompt!r} are not finite; set precision.t5=fp32, or copy "
                        "the checkpoint again if it is damaged"
                    )
                texts.append(Text(text.embeds.cpu(), None if text.pooled is None else text.pooled.cpu()))
        return texts

    def tokens(self, prompt: str) -> int:
        """Tokens that the whole prompt has."""
        return self.count(prompt)

    def truncated(self, prompts: Iterable[str]) -> list[str]:
        """Prompts whose end is not seen at this length."""
        return [prompt for prompt in prompts if self.tokens(prompt) > self.length]


@contextmanager
def text_encoder(model: Model, precision: Precision, device: torch.device, length: int | None) -> Iterator[TextEncoder]:
    """Load the text encoders for the time of a with-block, then free them.

    length: text tokens; None takes what the checkpoint was trained with (512 for FLUX.1-dev).
    """
    family = family_of(model)
    parts = load_text_parts(model, precision, device)
    words = {tokenizer: parts[tokenizer] for _, tokenizer, _ in family.ENCODERS}
    weights = sum(stored_bytes(parts[part]) for part, _, _ in family.ENCODERS)
    tokens = family.text_length(parts) if length is None else length
    encoder = TextEncoder(
        family.make_encoder(parts, tokens), lambda prompt: family.count_tokens(words, [prompt])[0], tokens, weights
    )
    try:
        yield encoder
    finally:
        encoder.encode = None  # callers may keep the encoder's figures, not its weights
        del parts
        release(device)


def drawn_texts(model: Model, encoder: TextEncoder, prompts: list[str]) -> list[Text]:
    """Prompts -> embeddings to draw with: each with the empty prompt's, where guidance is by two calls."""
    texts = encoder(prompts)
    if not guided_by_two_calls(model):
        return texts
    (empty,) = encoder([""])
    return [replace(text, empty=empty) for text in texts]


def to_posterior(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [batch, 3, height, width] in [-1, 1] -> the posterior's mean and deviation, each
    [batch, channels, height / 8, width / 8], in the dtype that the autoencoder is stored in."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, compute_dtype_of(vae))).latent_dist
    return posterior.mean.to(vae.dtype), posterior.std.to(vae.dtype)


def check_latents(latents: Tensor, what: str) -> None:
    """See that the autoencoder made numbers of a picture.

    Raises:
        NotFiniteError: they are NaN or infinite.
    """
    if not latents.isfinite().all():
        raise NotFiniteError(
            f"the autoencoder's latents of {what} are not finite; its checkpoint may be damaged: copy it again"
        )


def decode(vae: Any, packed: Tensor, height: int, width: int) -> Image.Image:
    """Packed latents [1, tokens, channels * 4] -> the picture.

    Raises:
        NotFiniteError: the autoencoder's output is NaN or infinite.
    """
    mapped = of_model(vae).latent_map(vae.config, vae.get_buffer)
    latents = mapped.restore(unpack(packed.float(), height, width))
    with torch.no_grad():
        latents = latents.to(vae.device, compute_dtype_of(vae))
        tiled = getattr(vae, "decode_in_tiles", False) and max(height, width) > vae.tile_sample_min_size
        pixels = (vae.tiled_decode if tiled else vae.decode)(latents).sample
    if not pixels.isfinite().all():
        raise NotFiniteError(
            f"the autoencoder's output is not finite (in {compute_dtype_of(vae)}); its checkpoint may be damaged"
        )
    return to_picture(pixels[0])


def to_picture(pixels: Tensor) -> Image.Image:
    """pixels [3, height, width] from -1 to 1 -> the picture of diffusers' VaeImageProcessor, to the bit. That
    rounds on the host, and this where the pixels are."""
    values = VaeImageProcessor.denormalize(pixels.float())
    return Image.fromarray((values * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy())
