"""Latents <-> packed latents: 2 x 2 latents are one token, in every family alike.

FLUX.2's pipelines patchify and then pack, which gives the same tokens as FLUX.1's packing alone
(tests/infer/family/test_flux2.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

FACTOR = 8  # pixels a latent; a packed token covers twice that


def pack(latents: Tensor) -> Tensor:
    """[batch, channels, height, width] -> packed latents [batch, height / 2 * width / 2, channels * 4]."""
    from diffusers import FluxPipeline

    packed: Tensor = FluxPipeline._pack_latents(latents, *latents.shape)
    return packed


def unpack(packed: Tensor, height: int, width: int) -> Tensor:
    """Packed latents of a picture of height x width pixels -> [batch, channels, height / 8, width / 8]."""
    from diffusers import FluxPipeline

    latents: Tensor = FluxPipeline._unpack_latents(packed, height, width, FACTOR)
    return latents
