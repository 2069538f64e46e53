"""The objective against values worked out by hand, and packing against loops."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling

from infer.family.packing import pack, unpack
from train.data.seeds import generator
from train.objective.flow_matching import Flow, losses, noised, sample_sigma, shift_for, shifted


def test_pack_gathers_two_by_two_patches() -> None:
    latents = torch.randn(2, 16, 6, 4)
    packed = pack(latents)
    assert packed.shape == (2, 6, 64)
    for token in range(6):
        y, x = 2 * (token // 2), 2 * (token % 2)
        patch = latents[:, :, y : y + 2, x : x + 2].reshape(2, 64)
        assert torch.equal(packed[:, token], patch)
    assert torch.equal(unpack(packed, 48, 32), latents)


def test_noised_and_loss_by_hand() -> None:
    x0, noise = torch.randn(3, 16, 4, 4), torch.randn(3, 16, 4, 4)
    sigma = torch.tensor([0.1, 0.5, 0.9])
    x = noised(x0, noise, sigma)
    for i, level in enumerate((0.1, 0.5, 0.9)):
        torch.testing.assert_close(x[i], (1 - level) * x0[i] + level * noise[i])
    velocity = torch.randn(3, 4, 64)
    for weighting, weight in (
        ("none", lambda s: 1.0),
        ("sigma_sqrt", lambda s: s**-2),
        ("cosmap", lambda s: 2 / (math.pi * (1 - 2 * s + 2 * s * s))),
        ("min_snr", lambda s: s**2 * min(((1 - s) / s) ** 2, 5.0)),  # of the error of x_0, which is s^2 times this one
        ("bell", lambda s: (math.exp(-2 * (s - 0.5) ** 2) - math.exp(-0.5)) / BELL),
    ):
        values = losses(velocity, x0, noise, sigma, Flow(weighting=weighting))
        for i, level in enumerate((0.1, 0.5, 0.9)):
            target = noise[i] - x0[i]
            total = 0.0
            for token in range(4):
                y, xx = 2 * (token // 2), 2 * (token % 2)
                patch = target[:, y : y + 2, xx : xx + 2].reshape(64)
                total += float(((velocity[i, token] - patch) ** 2).sum())
            assert float(values[i]) == pytest.approx(weight(level) * total / (16 * 4 * 4), rel=1e-4)


BELL = sum(math.exp(-2 * ((i + 0.5) / 1000 - 0.5) ** 2) - math.exp(-0.5) for i in range(1000)) / 1000


def test_losses_against_their_formulas_number_by_number() -> None:
    x0, noise, velocity = (torch.randn(3, 16, 2, 2, dtype=torch.float64) for _ in range(3))
    levels = (0.1, 0.5, 0.9)
    scales = {
        "constant": lambda s: 0.2,
        "snr": lambda s: 0.8 / (1 + s / (1 - s)) ** 2 + 0.2,  # kohya's, s / (1 - s) being its noise over signal
        "exponential": lambda s: math.exp(math.log(0.2) * s),
    }
    forms = {
        "huber": lambda e, c: 2 * c * (math.sqrt(e * e + c * c) - c),
        "smooth_l1": lambda e, c: 2 * (math.sqrt(e * e + c * c) - c),
        "mae": lambda e, c: abs(e),
    }
    for loss, form in forms.items():
        for schedule, scale in scales.items() if loss != "mae" else [("constant", lambda s: 0.1)]:
            flow = Flow(loss=loss, loss_schedule=schedule, loss_scale=0.1 if loss == "mae" else 0.2)
            values = losses(pack(velocity), x0, noise, torch.tensor(levels, dtype=torch.float64), flow)
            for i, level in enumerate(levels):
                errors = (velocity - noise + x0)[i].flatten().tolist()
                expected = sum(form(e, scale(level)) for e in errors) / len(errors)
                assert float(values[i]) == pytest.approx(expected, rel=1e-5), (loss, schedule)


def test_mode_has_heavy_tails() -> None:
    """Stable Diffusion 3's density against its own formula, by sorted draws."""
    flow, numbers = Flow("mode"), generator(0, "mode")
    drawn = sample_sigma(flow, 20_000, 64, numbers).sort().values
    u = torch.linspace(0.5 / 20_000, 1 - 0.5 / 20_000, 20_000, dtype=torch.float64)
    expected = (1 - u - 1.29 * ((math.pi * u / 2).cos() ** 2 - 1 + u)).sort().values
    assert float((drawn - expected).abs().max()) < 0.03


def test_a_mask_weighs_each_latent() -> None:
    x0, noise, velocity = torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6), torch.randn(2, 16, 4, 6)
    sigma, mask = torch.tensor([0.2, 0.6]), torch.rand(2, 1, 4, 6)
    values = losses(pack(velocity), x0, noise, sigma, Flow(weighting="sigma_sqrt"), mask)
    for i in range(2):
        total = sum(
            float(mask[i, 0, y, x] * (velocity - noise + x0)[i, c, y, x] ** 2)
            for c in range(16)
            for y in range(4)
            for x in range(6)
        )
        assert float(values[i]) == pytest.approx(total / (16 * 4 * 6) / float(sigma[i]) ** 2, rel=1e-4)
    whole = losses(pack(velocity), x0, noise, sigma, Flow())
    assert torch.equal(losses(pack(velocity), x0, noise, sigma, Flow(), torch.ones(2, 1, 4, 6)), whole)
    assert losses(pack(velocity), x0, noise, sigma, Flow(), torch.zeros(2, 1, 4, 6)).tolist() == [0, 0]


def test_a_step_along_the_true_velocity_recovers_the_picture() -> None:
    x0, noise = torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4)
    sigma = torch.tensor([0.7])
    torch.testing.assert_close(noised(x0, noise, sigma) - 0.7 * (noise - x0), x0)


@pytest.mark.parametrize("tokens", [64, 256, 1024, 4096])
def test_shift_is_the_pipelines(tokens: int) -> None:
    assert shift_for(tokens) == pytest.approx(math.exp(calculate_shift(tokens)))


def test_densities() -> None:
    own = generator(0, "test")
    uniform = sample_sigma(Flow("uniform"), 20_000, 1024, own)
    assert torch.allclose(
        torch.quantile(uniform, torch.tensor([0.25, 0.5, 0.75])), torch.tensor([0.25, 0.5, 0.75]), atol=0.02
    )
    normal = torch.logit(sample_sigma(Flow("logit_normal", logit_mean=0.3, logit_std=0.8), 20_000, 1024, own))
    assert float(normal.mean()) == pytest.approx(0.3, abs=0.03)
    assert float(normal.std()) == pytest.approx(0.8, abs=0.03)
    # the shift adds log(shift) to the logit
    moved = torch.logit(sample_sigma(Flow("shifted"), 20_000, 4096, own))
    assert float(moved.mean()) == pytest.approx(1.15, abs=0.03)
    u = torch.tensor([0.2])
    assert float(shifted(u, 256)) == pytest.approx(math.exp(0.5) / (math.exp(0.5) + 1 / 0.2 - 1))


@pytest.mark.parametrize("mean", [-1.0, 0.0, 1.0])
def test_logit_mean_has_the_opposite_sign_in_diffusers_scripts(mean: float) -> None:
    """As `Flow.logit_mean` says; in them u is a place in the timesteps, of which the first is the noisiest."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    u = compute_density_for_timestep_sampling("logit_normal", 20_000, mean, 1.0, generator=generator(1, "theirs"))
    theirs = scheduler.sigmas[(u * scheduler.config.num_train_timesteps).long()]
    ours = sample_sigma(Flow("logit_normal", logit_mean=-mean), 20_000, 1024, generator(2, "ours"))
    quarters = torch.tensor([0.25, 0.5, 0.75])
    assert torch.allclose(torch.quantile(theirs, quarters), torch.quantile(ours, quarters), atol=0.02)
