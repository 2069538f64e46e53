"""GroupNorm by sums over channels against torch's, and against sums in fp64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from infer.checkpoint.group_norm import group_norm, spread_norms
from infer.checkpoint.load import load_vae
from infer.checkpoint.model import Model

CPU = torch.device("cpu")


def truth(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    x64 = x.double()
    groups = x64.reshape(len(x), norm.num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    scaled = (centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()).view(x.shape)
    form = (-1, *[1] * (x.ndim - 2))
    if norm.weight is None:
        return scaled
    return scaled * norm.weight.double().view(form) + norm.bias.double().view(form)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups", "affine"), [
    ((1, 32, 24, 16), 8, True), ((3, 32, 8, 8), 4, True), ((2, 64, 40), 32, True), ((2, 16, 5, 7), 16, False),
])  # fmt: skip
@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_it_is_torchs_group_norm(
    dtype: torch.dtype, shape: tuple[int, ...], groups: int, affine: bool, mean: float
) -> None:
    noise = torch.Generator().manual_seed(0)
    norm = nn.GroupNorm(groups, shape[1], eps=1e-6, affine=affine)
    if affine:
        norm.weight.data = torch.rand(shape[1], generator=noise) + 0.5
        norm.bias.data = torch.randn(shape[1], generator=noise)
    norm, x = norm.to(dtype), (torch.randn(shape, generator=noise) + mean).to(dtype)
    found, expected = group_norm(norm, x), truth(norm, x)
    assert found.dtype == dtype and found.shape == x.shape
    off, own = ((each.double() - expected).norm() / expected.norm() for each in (found, norm(x)))
    assert off <= 1.1 * own + 1e-4


def test_a_batch_in_another_memory_format_is_the_same() -> None:
    norm, x = nn.GroupNorm(4, 16), torch.randn(2, 16, 6, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(group_norm(norm, x.to(memory_format=torch.channels_last)), group_norm(norm, x))


def test_a_deviation_of_a_three_hundredth_of_the_mean_is_right_within_two_percent() -> None:
    noise = torch.Generator().manual_seed(4)
    norm, x = nn.GroupNorm(2, 8, eps=1e-8), 30 + 0.1 * torch.randn((1, 8, 64, 64), generator=noise)
    expected = truth(norm, x)
    assert (group_norm(norm, x).double() - expected).norm() / expected.norm() < 0.02


def test_a_flat_group_stays_finite() -> None:
    found = group_norm(nn.GroupNorm(2, 4, eps=1e-6), torch.full((1, 4, 8, 8), 300.0))
    assert found.abs().max() < 0.1


def test_an_autoencoder_with_spread_norms_gives_the_same_pictures(tiny: Model) -> None:
    vae = load_vae(tiny, CPU, torch.float32)
    spread = copy.deepcopy(vae)
    spread_norms(spread)
    noise = torch.Generator().manual_seed(2)
    image, latents = torch.rand(2, 3, 64, 48, generator=noise) * 2 - 1, torch.randn(1, 16, 8, 6, generator=noise)
    with torch.no_grad():
        torch.testing.assert_close(spread.decode(latents).sample, vae.decode(latents).sample, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            spread.encode(image).latent_dist.mode(), vae.encode(image).latent_dist.mode(), atol=1e-4, rtol=1e-4
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_as_near_to_exact_sums_as_torchs_own() -> None:
    noise = torch.Generator("cuda").manual_seed(3)
    for shape in ((1, 128, 512, 512), (4, 64, 64, 64)):
        x = (torch.randn(shape, generator=noise, device="cuda") * 3 + 5).bfloat16()
        norm = nn.GroupNorm(32, shape[1], eps=1e-6, device="cuda", dtype=torch.bfloat16)
        expected = truth(norm, x)
        off, own = ((each.double() - expected).norm() / expected.norm() for each in (group_norm(norm, x), norm(x)))
        assert off <= 1.1 * own
