"""Output preservation: which text is preserved, what is refused, and the gradient against one made by hand."""

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.fast.install import install
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from tests.infer.adapter.test_adapters import randomise
from train.data.dataset import Data
from train.loop.batch import Batch
from train.loop.micro_step import make_learner, preservation_cost
from train.objective.preservation import Preserve, check_preserved, preserved_text
from train.run.config import Train
from train.train import train

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "trigger", "word", "expected"),
    [
        ("sks dog on a table", "sks", "dog", "dog on a table"),
        ("sks, a photo of a dog", "sks", "dog", "a photo of a dog"),
        ("a photo of sks, running", "sks", "dog", "a photo of dog, running"),
        ("sks on a table, with skskin", "sks", "cat", "cat on a table, with skskin"),
        ("zelk style, a red star", "zelk style", "", "a red star"),
        ("a red star, zelk style", "zelk style", "", "a red star"),
        ("sks dog, a dogma", "sks dog", "dog", "dog, a dogma"),
        ("a dog", "sks", "dog", "a dog"),
        ("", "sks", "dog", ""),
        (r"x\1 dog", r"x\1", "cat", "cat dog"),
    ],
)
def test_the_class_word_takes_the_triggers_place(text: str, trigger: str, word: str, expected: str) -> None:
    assert preserved_text(text, Preserve("class", word), trigger) == expected
    assert preserved_text(text, Preserve("empty"), trigger) == ""


@pytest.mark.parametrize(
    ("preserve", "trigger", "captions", "said"),
    [
        (Preserve("class", "dog"), None, ["a dog"], r"data\.trigger is null; set the trigger, or preserve=empty"),
        (Preserve("class", "doog"), "sks", ["a dog", "dogs"], r"preserve\.word is 'doog', which no caption holds"),
        (Preserve("class", "dog"), "sks", ["a table"], "write the trigger into them, as in 'sks dog'"),
        (Preserve("class", "dog"), "sks", ["sks on a table"], None),
        (Preserve("class", "dog"), "sks dog", ["a table"], None),
        (Preserve("class"), "sks", ["a table"], None),
        (Preserve("empty"), None, ["a table"], None),
        (Preserve(), None, ["a table"], None),
    ],
)
def test_a_word_that_no_caption_holds_is_refused(
    preserve: Preserve, trigger: str | None, captions: list[str], said: str | None
) -> None:
    if said is None:
        check_preserved(preserve, trigger, captions)
        return
    with pytest.raises(ValueError, match=said):
        check_preserved(preserve, trigger, captions)


def test_it_is_refused_before_torch_is_imported(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a ring")
    monkeypatch.setattr("train.train.ready", lambda: pytest.fail("torch would be imported"))
    data = Data(str(tmp_path), 64, trigger="sks", validation=0)
    with pytest.raises(ValueError, match=r"preserve\.word is 'dog', which no caption holds, as in 'a ring'"):
        train(Train(tiny, data=data, preserve=Preserve("class", "dog"), device="cpu"))
    for changes in ({"prefix": "a dog with "}, {"suffix": " on a dog"}):  # the word may stand around every caption
        monkeypatch.setattr("train.train.ready", Mock(side_effect=SystemExit))
        with pytest.raises(SystemExit):
            train(Train(tiny, data=replace(data, **changes), preserve=Preserve("class", "dog"), device="cpu"))


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_is_that_of_both_targets(tiny: Model, fused: bool) -> None:
    """The reference: the two losses written down in fp32, the base from a transformer that has no adapter."""
    transformer, bare = (load_transformer(tiny, Precision("fp32"), CPU).train() for _ in range(2))
    parameters = attach(transformer, Adapter(4, 4.0, targets="single"), seed=0)
    randomise(transformer)
    numbers = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 16, 8, 8, generator=numbers) for _ in range(2))
    config = transformer.config
    texts = [torch.randn(2, 6, config.joint_attention_dim, generator=numbers) for _ in range(2)]
    pooled = [torch.randn(2, config.pooled_projection_dim, generator=numbers) for _ in range(2)]
    sigma, weight = torch.tensor([0.3, 0.8]), torch.tensor([0.5, 0.25])
    batch = Batch(x0, noise, sigma, texts[0], pooled[0], None, weight, texts[1], pooled[1])
    x = x0 + sigma[:, None, None, None] * (noise - x0)

    def pack(z: torch.Tensor) -> torch.Tensor:
        return z.view(2, 16, 4, 2, 4, 2).permute(0, 2, 4, 1, 3, 5).reshape(2, 16, 64)

    def velocity(model: object, i: int) -> torch.Tensor:
        ids = torch.zeros(4, 4, 3)
        ids[..., 1], ids[..., 2] = torch.arange(4)[:, None], torch.arange(4)[None]
        return model(  # type: ignore[operator, no-any-return]
            hidden_states=pack(x), encoder_hidden_states=texts[i], pooled_projections=pooled[i], timestep=sigma,
            img_ids=ids.view(-1, 3), txt_ids=torch.zeros(6, 3), guidance=torch.ones(2), return_dict=False,
        )[0]  # fmt: skip

    with torch.no_grad():
        base = velocity(bare, 1)
    learned = (velocity(transformer, 0) - pack(noise - x0)).square().mean((1, 2))
    kept = 3.0 * (velocity(transformer, 1) - base).square().mean((1, 2))
    expected = torch.autograd.grad((weight * (learned + kept)).sum(), parameters)
    again = (velocity(transformer, 0) - pack(noise - x0)).square().mean((1, 2))
    only = torch.autograd.grad((weight * again).sum(), parameters)
    memory = Memory("attention" if fused else "nothing", fused=fused)
    if fused:
        install(transformer, memory, CPU)
    job = Train(memory=memory, precision=Precision("fp32"), preserve=Preserve("empty", weight=3.0))
    values = make_learner(job, Accelerator(cpu=True), transformer, parameters, None)(batch)
    torch.testing.assert_close(values, (learned + kept).detach(), rtol=1e-4, atol=1e-5)
    for parameter, gradient, other in zip(parameters, expected, only, strict=True):
        assert parameter.requires_grad and parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7)
        assert float((gradient - other).norm()) > 0.01 * float(other.norm())


def test_the_cost_is_told_by_the_passes() -> None:
    job = Train(memory=Memory("everything"), preserve=Preserve("empty"))
    assert "takes about 0.60 of 1.00 s of a micro-step" in preservation_cost(1.0, job)
