"""Prompts -> embeddings, images <-> packed latents: what goes into FLUX's transformer and comes out of it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from infer.checkpoint.load import Model, load_text_parts
from infer.device.device import release
from infer.quantize.compute import compute_dtype_of
from infer.quantize.precision import Precision, stored_bytes

FACTOR = 8  # pixels a latent; a packed token covers twice that


class NotFiniteError(ValueError):
    """A picture's numbers are NaN or infinite."""


@dataclass
class Text:
    """One prompt's embeddings."""

    t5: Tensor  # [tokens, joint_attention_dim]
    pooled: Tensor  # CLIP's pooled output, [pooled_projection_dim]


@dataclass
class TextEncoder:
    """Both encoders, loaded, with what they weigh."""

    pipeline: Any  # a FluxPipeline of the text parts alone
    length: int  # T5 tokens
    weights_bytes: int

    def __call__(self, prompts: list[str]) -> list[Text]:
        """Prompts -> embeddings on the CPU, one by one so that none depends on its neighbours."""
        texts = []
        with torch.no_grad():
            for prompt in prompts:
                t5, pooled, _ = self.pipeline.encode_prompt(prompt, None, max_sequence_length=self.length)
                texts.append(Text(t5[0].cpu(), pooled[0].cpu()))
        return texts

    def tokens(self, prompt: str) -> int:
        """T5 tokens that the whole prompt has."""
        return len(self.pipeline.tokenizer_2(prompt, verbose=False).input_ids)

    def truncated(self, prompts: Iterable[str]) -> list[str]:
        """Prompts whose end T5 does not see at this length."""
        return [prompt for prompt in prompts if self.tokens(prompt) > self.length]


@contextmanager
def text_encoder(model: Model, precision: Precision, device: torch.device, length: int | None) -> Iterator[TextEncoder]:
    """Load CLIP and T5 for the time of a with-block, then free them.

    length: T5 tokens; None takes what the checkpoint's own tokenizer says (512 for FLUX.1-dev).
    """
    parts = load_text_parts(model, precision, device)
    pipeline = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)
    most = int(parts["tokenizer_2"].model_max_length)
    weights = sum(stored_bytes(parts[name]) for name in ("text_encoder", "text_encoder_2"))
    encoder = TextEncoder(pipeline, most if length is None else length, weights)
    try:
        yield encoder
    finally:
        encoder.pipeline = None  # callers may keep the encoder's figures, not its weights
        del pipeline, parts
        release(device)


def to_posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [batch, 3, height, width] in [-1, 1] -> the posterior's mean and deviation, each
    [batch, channels, height / 8, width / 8], in the dtype that the autoencoder is stored in."""
    with torch.no_grad():
        posterior = vae.encode(pixels.to(vae.device, compute_dtype_of(vae))).latent_dist
    return posterior.mean.to(vae.dtype), posterior.std.to(vae.dtype)


def normalise(mean: Tensor, deviation: Tensor, shift: float, scale: float) -> tuple[Tensor, Tensor]:
    """A posterior's mean and deviation as the transformer expects them, in fp32. `shift` and `scale` stand in the
    autoencoder's config."""
    return (mean.float() - shift) * scale, deviation.float() * scale


def pack(latents: Tensor) -> Tensor:
    """[batch, channels, height, width] -> packed latents [batch, height / 2 * width / 2, channels * 4]."""
    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Packed latents of a picture of height x width pixels -> [batch, channels, height / 8, width / 8]."""
    latents: Tensor = FluxPipeline._unpack_latents(packed, height, width, FACTOR)
    return latents


@cache  # all of them: captured graphs read them where they are
def image_ids(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Position ids of the packed latents of a picture of height x width latents, [tokens, 3]; do not write to them."""
    ids: Tensor = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, device, dtype)
    return ids


def decode(vae: AutoencoderKL, packed: Tensor, height: int, width: int) -> Image.Image:
    """Packed latents [1, tokens, channels * 4] -> the picture.

    Raises:
        NotFiniteError: the autoencoder's output is NaN or infinite.
    """
    latents = unpack(packed.float(), height, width) / vae.config.scaling_factor + vae.config.shift_factor
    with torch.no_grad():
        latents = latents.to(vae.device, compute_dtype_of(vae))
        tiled = getattr(vae, "decode_in_tiles", False) and max(height, width) > vae.tile_sample_min_size
        pixels = (vae.tiled_decode if tiled else vae.decode)(latents).sample
    if not pixels.isfinite().all():
        raise NotFiniteError(
            f"the autoencoder's output is not finite (in {compute_dtype_of(vae)}); its checkpoint may be damaged"
        )
    picture: Image.Image = VaeImageProcessor(vae_scale_factor=FACTOR).postprocess(pixels.float())[0]
    return picture
