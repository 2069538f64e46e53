"""Reference pictures against diffusers' own pipelines, on the bundled model and on a random tiny klein."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxKontextPipeline
from diffusers.pipelines.flux import pipeline_flux_kontext
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from infer.checkpoint.family import takes_references
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.family import flux1, flux2
from infer.family.family import Text
from infer.family.packing import pack
from infer.quantize.precision import Precision
from infer.sample.encode import drawn_texts, text_encoder
from infer.sample.generate import Sampling, denoise, draw, noise
from infer.sample.references import encode_reference
from train.objective.flow_matching import predict

CPU = torch.device("cpu")
FP32 = Precision("fp32")


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Something smooth, so that scaling it matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(model: Model, length: int) -> Text:
    with text_encoder(model, FP32, CPU, length) as encoder:
        (text,) = drawn_texts(model, encoder, ["make it red"])
    return replace(text, embeds=text.embeds.float(), pooled=None if text.pooled is None else text.pooled.float())


@pytest.fixture(scope="module")
def transformer(tiny: Model) -> Any:
    return load_transformer(tiny, FP32, CPU)


@pytest.fixture(scope="module")
def text(tiny: Model) -> Text:
    return encoded(tiny, 16)


@pytest.fixture(scope="module")
def kontext(tiny: Model, transformer: Any) -> Any:
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    vae, scheduler = load_vae(tiny, CPU, torch.float32), load_scheduler(tiny)
    pipeline = FluxKontextPipeline(scheduler=scheduler, transformer=transformer, vae=vae, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_kontext(kontext: Any, text: Text, start: Tensor, image: Image.Image, steps: int = 1, **how: Any) -> Tensor:
    assert text.pooled is not None
    latents: Tensor = kontext(
        image, prompt_embeds=text.embeds[None], pooled_prompt_embeds=text.pooled[None], latents=start, height=64,
        width=96, num_inference_steps=steps, guidance_scale=2.5, output_type="latent", max_area=96 * 64, **how,
    ).images  # fmt: skip
    return latents


def test_pictures_are_the_kontext_pipelines(
    tiny: Model, kontext: Any, transformer: Any, text: Text, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own scaling to a preferred size (here of fewer pixels, for the time it takes), encoding, ids and steps."""
    preferred = [(width // 64 * 16, height // 64 * 16) for width, height in PREFERRED_KONTEXT_RESOLUTIONS]
    monkeypatch.setattr(pipeline_flux_kontext, "PREFERRED_KONTEXT_RESOLUTIONS", preferred)
    start, image = noise(0, 64, 96, 16), picture(90, 61)
    reference = encode_reference(load_vae(tiny, CPU, torch.float32), image, None)
    assert reference.shape == (16, 192 // 8, 320 // 8)
    wanted = by_kontext(kontext, text, start, image)
    given = replace(text, references=(reference,))
    ours = denoise(transformer, load_scheduler(tiny), given, start, Sampling(1, 2.5), (64, 96))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_kontexts_steps_are_the_pipelines_bit_for_bit(tiny: Model, kontext: Any, transformer: Any, text: Text) -> None:
    start, reference = noise(1, 64, 96, 16), torch.randn(16, 6, 10)
    wanted = by_kontext(kontext, text, start, reference[None], 2, _auto_resize=False)
    given = replace(text, references=(reference,))
    ours = denoise(transformer, load_scheduler(tiny), given, start, Sampling(2, 2.5), (64, 96))
    assert torch.equal(ours, wanted)
    plain = denoise(transformer, load_scheduler(tiny), text, start, Sampling(2, 2.5), (64, 96))
    assert (plain - wanted).abs().max() > 0.1  # the reference is seen


def test_kontexts_sizes_scale_with_the_resolution() -> None:
    for width, height in PREFERRED_KONTEXT_RESOLUTIONS:
        assert flux1.reference_pixels(picture(width, height), None).shape == (1, 3, height, width)
        small = flux1.reference_pixels(picture(width, height), 512).shape
        assert small == (1, 3, height // 2 // 16 * 16, width // 2 // 16 * 16)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_the_klein_pipelines(guidance: float, klein: Model) -> None:
    """One reference of another shape, and one that is cut to multiples of 16; with one call a step and with two."""
    pipeline = Flux2KleinPipeline.from_pretrained(klein.path, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    text, start, images = encoded(klein, 24), noise(3, 64, 96, 16), [picture(96, 64), picture(75, 100, 1)]
    assert text.empty is not None
    kept: list[Tensor] = []

    def keep(_: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(given["latents"])
        return given

    pipeline(
        images, prompt_embeds=text.embeds[None], negative_prompt_embeds=text.empty.embeds[None], height=64, width=96,
        latents=start.transpose(1, 2).unflatten(2, (4, 6)), num_inference_steps=3, guidance_scale=guidance,
        callback_on_step_end=keep,
    )  # fmt: skip
    vae = load_vae(klein, CPU, torch.float32)
    references = tuple(encode_reference(vae, image, None) for image in images)
    assert [each.shape[1:] for each in references] == [(8, 12), (12, 8)]
    given, scheduler = replace(text, references=references), load_scheduler(klein)
    ours = draw(load_transformer(klein, FP32, CPU), scheduler, given, 3, Sampling(3, guidance), (64, 96), CPU)
    torch.testing.assert_close(ours, kept[-1], rtol=0, atol=2e-4)


def test_klein_scales_down_what_is_too_large() -> None:
    assert flux2.reference_pixels(picture(200, 100), 64).shape == (1, 3, 32, 80)
    assert flux2.reference_pixels(picture(40, 50), 64).shape == (1, 3, 48, 32)


def test_the_velocity_in_training_is_of_the_picture_alone(klein: Model) -> None:
    transformer = load_transformer(klein, FP32, CPU)
    x, sigma, embeds = torch.randn(2, 16, 8, 12), torch.tensor([0.3, 0.9]), torch.randn(2, 5, 192)
    references = [torch.randn(2, 16, 8, 12), torch.randn(2, 16, 4, 6)]
    ours = predict(transformer, x, embeds, None, sigma, 1.0, torch.float32, references)
    tokens = [Flux2KleinPipeline._patchify_latents(each) for each in references]
    ids = Flux2KleinPipeline._prepare_image_ids([each[:1] for each in tokens])[0]
    wanted = transformer(
        hidden_states=torch.cat([pack(each) for each in (x, *references)], dim=1),
        encoder_hidden_states=embeds,
        timestep=sigma,
        guidance=None,
        img_ids=torch.cat([Flux2KleinPipeline._prepare_latent_ids(Flux2KleinPipeline._patchify_latents(x))[0], ids]),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds)[0],
        return_dict=False,
    )[0][:, :24]
    assert torch.equal(ours, wanted)


def test_which_checkpoints_were_trained_with_references(tiny: Model, klein: Model) -> None:
    published = ("FLUX.1-dev", "FLUX.1-schnell", "FLUX.1-Kontext-dev", "FLUX.2-klein-base-4B", "FLUX.2-dev")
    found = [takes_references(Model(f"black-forest-labs/{name}")) for name in published]
    assert found == [False, False, True, True, True]
    assert takes_references(klein) and not takes_references(tiny)
