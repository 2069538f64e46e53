"""FLUX.2 against diffusers' own pipeline and functions, on a random tiny klein."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxPipeline
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen2Tokenizer

from infer.checkpoint.family import family_of, guided_by_two_calls, latent_map, own_drawing
from infer.checkpoint.load import load_scheduler, load_transformer, load_vae
from infer.checkpoint.model import Model
from infer.checkpoint.text import load_text_parts
from infer.family import flux1, flux2
from infer.family.family import Text
from infer.family.packing import pack, unpack
from infer.quantize import compute
from infer.quantize.compute import compute_dtype
from infer.quantize.precision import Precision
from infer.sample.encode import NotFiniteError, drawn_texts, text_encoder, to_posterior
from infer.sample.generate import Sampling, denoise, noise, settled
from tests.tiny_klein import make_klein
from train.objective.flow_matching import predict

CPU = torch.device("cpu")
FP32 = Precision("fp32")


@pytest.fixture(scope="module")
def pipeline(klein: Model) -> Any:
    loaded = Flux2KleinPipeline.from_pretrained(klein.path, torch_dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def texts(klein: Model) -> list[Text]:
    with text_encoder(klein, FP32, CPU, 24) as encoder:
        return drawn_texts(klein, encoder, ["a cat", "two red foxes"])


def test_packing_is_patchifying_and_packing() -> None:
    latents = torch.randn(2, 16, 6, 4)
    theirs = Flux2KleinPipeline._pack_latents(Flux2KleinPipeline._patchify_latents(latents))
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs, 48, 32), latents)


def test_only_the_layers_that_are_read_are_loaded_and_embeddings_are_the_pipelines(
    klein: Model, pipeline: Any, texts: list[Text]
) -> None:
    parts = load_text_parts(klein, FP32, CPU)
    assert len(parts["text_encoder"].layers) == 27 and len(pipeline.text_encoder.model.layers) == 28
    for prompt, text in zip(("a cat", "two red foxes"), texts, strict=True):
        wanted, _ = pipeline.encode_prompt(prompt, max_sequence_length=24)
        torch.testing.assert_close(text.embeds, wanted[0], rtol=0, atol=1e-6)
        assert text.pooled is None and text.empty is not None
    empty, _ = pipeline.encode_prompt("", max_sequence_length=24)
    torch.testing.assert_close(texts[0].empty.embeds, empty[0], rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_tokens_are_counted_with_the_template(klein: Model) -> None:
    with text_encoder(klein, FP32, CPU, 40) as encoder:
        (template,) = {encoder.tokens("a" * count) - count for count in (0, 1, 9)}
        assert 0 < template < 39
        assert encoder.truncated(["a", "a" * 40]) == ["a" * 40]


def test_latents_are_normalised_as_the_pipeline_does(klein: Model, pipeline: Any) -> None:
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    theirs = pipeline._encode_vae_image(pixels, None)
    mapped = latent_map(klein)
    mean, _ = to_posterior(load_vae(klein, CPU, torch.float32), pixels)
    ours = mapped.normalise(mean)
    torch.testing.assert_close(pack(ours), Flux2KleinPipeline._pack_latents(theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mapped.restore(ours), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_are_the_klein_pipelines(guidance: float, klein: Model, pipeline: Any, texts: list[Text]) -> None:
    start = noise(3, 64, 96, 16)
    kept: list[Tensor] = []

    def keep(_: Any, step: int, t: Tensor, given: dict[str, Tensor]) -> dict[str, Tensor]:
        kept.append(given["latents"])
        return given

    text = texts[0]
    assert text.empty is not None
    pipeline(
        prompt_embeds=text.embeds[None], negative_prompt_embeds=text.empty.embeds[None], height=64, width=96,
        latents=start.transpose(1, 2).unflatten(2, (4, 6)), num_inference_steps=3, guidance_scale=guidance,
        callback_on_step_end=keep, output_type="pil",
    )  # fmt: skip
    transformer = load_transformer(klein, FP32, CPU)
    ours = denoise(transformer, load_scheduler(klein), text, start, Sampling(3, guidance), (64, 96))
    assert torch.equal(ours, kept[-1])


def test_pictures_are_the_flux1_pipelines(tiny: Model) -> None:
    with text_encoder(tiny, Precision("bf16"), CPU, 16) as encoder:
        (text,) = encoder(["a red star"])
    transformer, scheduler = load_transformer(tiny, Precision("bf16"), CPU), load_scheduler(tiny)
    parts: dict[str, Any] = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    theirs = FluxPipeline(scheduler=scheduler, transformer=transformer, **parts)
    theirs.set_progress_bar_config(disable=True)
    dtype = compute_dtype(torch.bfloat16, CPU)
    assert text.pooled is not None
    start = noise(0, 64, 64, 16).to(dtype)
    wanted = theirs(
        prompt_embeds=text.embeds[None].to(dtype), pooled_prompt_embeds=text.pooled[None].to(dtype), latents=start,
        height=64, width=64, num_inference_steps=3, guidance_scale=2.5, output_type="latent",
    ).images  # fmt: skip
    ours = denoise(transformer, load_scheduler(tiny), text, start, Sampling(3, 2.5), (64, 64))
    assert torch.equal(ours, wanted)


def test_the_velocity_in_training_is_that_of_the_pipelines_call(klein: Model, texts: list[Text]) -> None:
    transformer = load_transformer(klein, FP32, CPU)
    x, sigma = torch.randn(2, 16, 8, 12), torch.tensor([0.3, 0.9])
    embeds = torch.stack([text.embeds for text in texts])
    ours = predict(transformer, x, embeds, None, sigma, 1.0, torch.float32)
    patched = Flux2KleinPipeline._patchify_latents(x)
    wanted = transformer(
        hidden_states=Flux2KleinPipeline._pack_latents(patched),
        encoder_hidden_states=embeds,
        timestep=sigma,
        guidance=None,
        img_ids=Flux2KleinPipeline._prepare_latent_ids(patched),
        txt_ids=Flux2KleinPipeline._prepare_text_ids(embeds),
        return_dict=False,
    )[0]
    assert torch.equal(ours, wanted)


def test_what_a_checkpoint_draws_with(klein: Model, tmp_path_factory: pytest.TempPathFactory) -> None:
    from tests.tiny_klein import make_klein

    distilled = Model(str(make_klein(tmp_path_factory.mktemp("klein") / "distilled", distilled=True)))
    assert family_of(klein) is flux2 and family_of(distilled) is flux2
    assert tuple(own_drawing(klein)) == (28, 4.0) and tuple(own_drawing(distilled)) == (4, 1.0)
    assert guided_by_two_calls(klein) and not guided_by_two_calls(distilled)
    assert settled(Sampling(guidance=2.0), klein) == Sampling(28, 2.0)
    with text_encoder(distilled, FP32, CPU, 24) as encoder:
        (text,) = drawn_texts(distilled, encoder, ["a cat"])
    assert text.empty is None


@pytest.mark.parametrize(
    ("path", "drawing"),
    [
        ("black-forest-labs/FLUX.1-dev", (28, 3.5)),
        ("black-forest-labs/FLUX.1-schnell", (4, 3.5)),
        ("black-forest-labs/FLUX.1-Kontext-dev", (28, 2.5)),
        ("black-forest-labs/FLUX.1-Krea-dev", (28, 4.5)),
        ("black-forest-labs/FLUX.2-klein-base-9B", (28, 4.0)),
        ("black-forest-labs/FLUX.2-klein-9B", (4, 1.0)),
        ("black-forest-labs/FLUX.2-dev", (28, 4.0)),
    ],
)
def test_published_checkpoints_draw_as_their_cards_say(path: str, drawing: tuple[int, float]) -> None:
    assert tuple(own_drawing(Model(path, weights="random"))) == drawing


@pytest.mark.parametrize("name", ["klein-base-4B", "klein-base-9B", "dev"])
def test_published_sizes(name: str) -> None:
    """Parameters as the model cards count them (facts of black-forest-labs): 3.876, 9.079 and 32.22 billion."""
    config = flux2.SIZES[f"black-forest-labs/FLUX.2-{name}"]["transformer"]
    count = sum(rows * columns for rows, columns in flux2.linear_shapes(config).values())
    count += sum(flux2.norm_sizes(config).values())
    wanted = {"klein-base-4B": 3.876e9, "klein-base-9B": 9.079e9, "dev": 32.22e9}[name]
    assert count == pytest.approx(wanted, rel=1e-3)
    encoder = flux2.SIZES[f"black-forest-labs/FLUX.2-{name}"]["text_encoder"]
    assert flux2.embeds_width(encoder) == config["joint_attention_dim"]


def test_a_mistral_on_disk_is_read_as_the_pipeline_of_dev_reads_it(tmp_path: Path) -> None:
    """Of a whole Mistral 3, with its eyes and with layers above those that are read."""
    width, vocabulary = 32, len(pre_tokenizers.ByteLevel.alphabet()) + 2
    text = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 33,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": None,
    }  # fmt: skip
    eyes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    config = Mistral3Config(text_config=text | {"model_type": "mistral"}, vision_config=eyes, image_token_index=1)
    whole = Mistral3ForConditionalGeneration(config).eval()
    folder = make_klein(tmp_path / "dev")
    whole.save_pretrained(folder / "text_encoder")
    pieces = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "<pad>"])}
    template = "<s>{% for message in messages %}[{{ message.role }}]{{ message.content[0].text }}{% endfor %}"
    tokenizer = Qwen2Tokenizer(
        vocab=pieces, merges=[], pad_token="<pad>", unk_token=None, eos_token="<s>", chat_template=template
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": "Flux2Pipeline"}
    (folder / "model_index.json").write_text(json.dumps(index))
    model = Model(str(folder))
    parts = load_text_parts(model, FP32, CPU)
    assert len(parts["text_encoder"].layers) == 30, "those above are not loaded"
    with text_encoder(model, FP32, CPU, 64) as encoder:
        (ours,) = encoder(["a cat"])
    theirs = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        whole, parts["tokenizer"], ["a cat"], max_sequence_length=64
    )
    assert ours.embeds.shape == (64, 3 * width)
    torch.testing.assert_close(ours.embeds, theirs[0].detach(), rtol=1e-5, atol=1e-5)


def test_hidden_states_beyond_fp16_are_kept_where_a_card_has_no_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3 stored for fp16 (as on a T4) with one layer that writes what fp16 cannot hold."""
    folder = make_klein(tmp_path / "loud")
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    weights = load_file(file)
    for part in ("gate", "up", "down"):  # each within fp16, and what they make together is not
        weights[f"model.layers.4.mlp.{part}_proj.weight"] *= 300
    save_file(weights, file, {"format": "pt"})
    model = Model(str(folder))
    monkeypatch.setattr(compute, "_quick_on_cpu", lambda dtype: True)  # else a CPU would compute in fp32 by itself
    for kind in ("bf16", "nf4", "int8"):
        precision = Precision(kind, compute_dtype="fp16")
        with text_encoder(model, precision, CPU, 24) as encoder:
            (found,) = encoder(["a cat"])
        exact = Precision(kind, compute_dtype="fp32") if kind == "nf4" else FP32
        with text_encoder(model, exact, CPU, 24) as encoder:
            (wanted,) = encoder(["a cat"])
        assert found.embeds.abs().max() > torch.finfo(torch.float16).max
        far = float((found.embeds - wanted.embeds).norm() / wanted.embeds.norm())
        assert far < (0.05 if kind == "int8" else 0.02), kind


def test_embeddings_that_are_not_finite_are_said(klein: Model) -> None:
    with text_encoder(klein, FP32, CPU, 16) as encoder:
        encoder.encode = lambda prompt: Text(torch.full((16, 4), float("nan")), None)
        with pytest.raises(NotFiniteError, match=r"embeddings of 'a cat' are not finite; set precision\.t5=fp32"):
            encoder(["a cat"])


def test_a_text_encoder_that_is_none_of_its_is_refused() -> None:
    with pytest.raises(ValueError, match=r"is of the kind 'llama'; FLUX\.2 reads qwen3 or mistral3"):
        flux2.text_class("text_encoder", {"model_type": "llama"}, whole=False)
    with pytest.raises(ValueError, match=r"has 12 layers, of which FLUX\.2 reads number 27"):
        flux2.text_class("text_encoder", {"model_type": "qwen3", "num_hidden_layers": 12}, whole=False)


def test_flux1s_map_is_its_two_numbers() -> None:
    config = {"shift_factor": 0.1, "scaling_factor": 2.0}
    never: Callable[[str], Tensor] = lambda name: pytest.fail(name)  # noqa: E731
    mapped = flux1.latent_map(config, never)
    latents = torch.randn(1, 16, 4, 4)
    assert torch.equal(mapped.normalise(latents), (latents - 0.1) * 2.0)
    assert replace(mapped, shift=0.0).normalise(latents).equal(latents * 2.0)
