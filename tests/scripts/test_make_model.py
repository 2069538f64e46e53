"""What makes the bundled model, as far as a CPU can tell: what captions name, whether a CUDA graph can hold a step."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch.utils._python_dispatch import TorchDispatchMode

from scripts.tiny import klein_flow, klein_parts, klein_text, make_flow, make_text, make_vae, parts, world
from scripts.tiny.pace import Pace


class Silent(TorchDispatchMode):
    """Refuses what asks the device for a value, or brings one from the host: a captured graph would fail there, or keep
    that value for ever."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asks = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten._unique2")
        assert not str(func).startswith(asks), f"{func} asks the device"
        assert not str(func).startswith("aten.lift_fresh"), "a tensor is made of the host's numbers"
        return func(*args, **(kwargs or {}))


def test_a_graph_can_hold_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="asks the device"), Silent():
        torch._foreach_lerp_([torch.zeros(1)], [torch.ones(1)], torch.zeros(()))
    with pytest.raises(AssertionError, match="the host's numbers"), Silent():
        torch.tensor([1.0])
    drawn = [make_flow._draw((0, 6, 0, 0.5, None))]
    data = make_flow.encode(parts.vae(), drawn, torch.device("cpu"))
    t5, clip = parts.tokenizers(None)
    empty = tuple(
        torch.tensor([each("", padding="max_length", max_length=parts.TEXT_TOKENS).input_ids]) for each in (t5, clip)
    )
    flow = make_flow.Flow(parts.transformer(), parts.t5(t5), parts.clip(clip))
    lesson = make_text.Lesson(flow.t5, flow.clip, t5)
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    for teacher, taught in ((None, lesson), (flow, None)):
        trainer = make_flow.Trainer(flow, data, (empty[0], empty[1]), 2, 1e-3, teacher, taught)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # on a CPU it asks; fused on a GPU it does not
        trainer.move.fill_(0.5)
        with Silent():
            trainer.step()
        assert torch.isfinite(trainer.totals).all() and (teacher or trainer.totals[0] > 0.1)
        trainer.optimizer.zero_grad()
    for parameter, average in zip(before, trainer.average.parameters(), strict=True):
        torch.testing.assert_close(average, parameter)  # what does not move has its own average


def test_labels_name_what_the_scene_holds() -> None:
    rng = random.Random(3)
    for _ in range(200):
        scene = world.sample_scene(rng)
        caption = world.describe(scene, rng)
        rows = [
            [kind[i - 1] if i > 0 else None for i, kind in zip(row, make_text.PARTS, strict=True)]
            for row in make_text.labels(caption)
        ]
        named = [row for row in rows if row[4] is not None]
        things = {(t.shape, t.colour, t.texture if t.texture != "plain" else None) for t in scene.things}
        assert {(row[4], row[3], row[2]) for row in named} == things
        assert [row[0] for row in named] == [world.COUNTS[len(scene.things)] if scene.kind == "count" else None] * len(
            named
        )
        if scene.kind == "above":
            upper = next(row for row in named if row[5] == "above")
            assert (upper[4], upper[3]) == (scene.things[0].shape, scene.things[0].colour)
        if scene.kind == "single":
            assert named[0][5] in (None, scene.place)


def test_the_rate_rises_stays_and_falls() -> None:
    pace = Pace("test", 100, float("inf"))
    rates = []
    while pace.more():
        rates.append(pace.rate(2.0, warmup=10, decay=0.4))
    assert len(rates) == 100
    assert rates[10:60] == [2.0] * 50
    assert all(a < b for a, b in pairwise(rates[:10])) and all(a > b for a, b in pairwise(rates[60:]))
    assert 0 < rates[0] <= 0.2 and 0 < rates[-1] <= 0.06


def test_the_autoencoder_learns_from_more_than_the_world() -> None:
    torch.manual_seed(0)
    pictures = make_vae.pictures(6, torch.device("cpu"))
    assert pictures.shape == (6, 3, world.SIZE, world.SIZE)
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.std() > 0.1


@pytest.mark.parametrize("wide", [False, True])
def test_a_graph_can_hold_the_autoencoders_step(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = klein_parts.vae(parts.vae()) if wide else parts.vae()
    trainer = make_vae.Trainer(vae, 1, 1e-3, torch.device("cpu"))
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    with Silent():
        trainer.step()
    assert torch.isfinite(trainer.figures).all() and trainer.figures[1] > 0  # the divergence


def test_the_wider_autoencoder_begins_as_the_narrow_one() -> None:
    torch.manual_seed(1)
    narrow = parts.vae().eval()
    wide = klein_parts.vae(narrow).eval()
    image = make_vae.pictures(1, torch.device("cpu"))
    with torch.no_grad():
        mean, _ = make_vae._moments(narrow, image)
        wider, _ = make_vae._moments(wide, image)
    torch.testing.assert_close(wider[:, :16], mean)
    assert wider.shape[1] == 32 and wider[:, 16:].abs().max() > 0


def test_a_graph_can_hold_kleins_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(step: Any, optimizer: torch.optim.Optimizer) -> Any:
        monkeypatch.setattr(optimizer, "step", lambda: None)

        def run() -> None:
            with Silent():
                step()

        return run

    for module in (klein_text, klein_flow):
        monkeypatch.setattr(module, "captured", silent)
    reader = klein_parts.tokenizer()
    encoder = klein_parts.text_encoder(reader)
    (_, drawn) = klein_text.draw_captions((0, 2, 0, 0.5))
    given = [torch.from_numpy(each) for each in drawn]
    klein_text.teach_text(encoder, reader, *given, steps=1, batch=2)
    flow = klein_flow.Flow(klein_parts.transformer())
    x0 = torch.randn(2, (world.SIZE // 16) ** 2, 128)
    with torch.no_grad():
        texts = klein_text.embed(encoder, *given[:2])
        empty = klein_text.embed(encoder, *(torch.from_numpy(each) for each in klein_text.chat(reader, [""])))
    base = klein_flow.train("flow", flow, klein_flow.noised(x0, texts, empty, 2), 1, 1e-3, 0.5, 1e9)
    stands = klein_flow.paths(base, texts[:2], empty, 2, (x0.shape[1], x0.shape[2]))
    assert stands.shape == (2, klein_flow.FEW + 1, *x0.shape[1:])
    draw = klein_flow.along(stands, texts, torch.arange(2), 2)
    x, _, sigma, velocity = draw()
    levels = klein_flow.sigmas(x0.shape[1], klein_flow.FEW)
    lower = torch.tensor([levels[levels.index(each) + 1] for each in sigma.tolist()])
    reached = x + (lower - sigma)[:, None, None] * velocity  # one step of Euler's
    nearest = [(stands[:, 1:] - one).abs().amax((2, 3)).min() for one in reached]
    assert max(nearest) < 1e-3
    average = klein_flow.train("few", flow, draw, 1, 1e-3, 0.5, 1e9)
    assert all(torch.isfinite(parameter).all() for parameter in average.parameters())
    # the pipeline's own way to the text's states
    own = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        encoder, reader, ["a red star"], max_sequence_length=klein_parts.TEXT_TOKENS
    )
    ours = klein_text.embed(encoder, *(torch.from_numpy(each) for each in klein_text.chat(reader, ["a red star"])))
    torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-4)
