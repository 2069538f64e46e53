"""What comes out of the autoencoder as a picture."""

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from infer.sample.encode import to_picture


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_picture_is_diffusers_own(dtype: torch.dtype) -> None:
    pixels = 1.2 * torch.randn(1, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    # every value in the middle between two whole ones, and what autoencoders give beyond -1 and 1
    pixels[0, :, :5, :51] = ((torch.arange(255) + 0.5) / 255 * 2 - 1).view(5, 51)
    pixels = pixels.to(dtype)
    (wanted,) = VaeImageProcessor().postprocess(pixels.float())
    found = to_picture(pixels[0])
    assert found.mode == "RGB" and found.size == (56, 40)
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
