"""What makes the bundled model, as far as a CPU can tell: what captions name, whether a CUDA graph can hold a step."""

import json
import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from diffusers import Flux2KleinPipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from infer.checkpoint.family import family_of
from infer.checkpoint.model import Model
from scripts.tiny import (
    klein_flow,
    klein_parts,
    klein_text,
    make_flow,
    make_klein,
    make_model,
    make_text,
    make_vae,
    parts,
    rounded,
    world,
)
from scripts.tiny.pace import Clock, Pace, turn

SIDES = (64, 32)  # pixels; the sizes are options
MIX = make_flow.Mix(pairs=0.5, hard=0.5)


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
    drawn = [make_flow.draw((0, 6, 0, MIX)), make_flow.draw((6, 10, 0, MIX))]
    data = make_flow.encode(parts.vae(), drawn, torch.device("cpu"), SIDES)
    assert [each.mean.shape[2] * 8 for each in data] == list(SIDES)
    assert [len(each.mean) for each in data] == [6, 4] == [len(each.wanted) for each in data]
    t5, clip = tokenizers = parts.tokenizers()
    empty = make_model.empty_ids(tokenizers, torch.device("cpu"))
    flow = make_flow.Flow(parts.transformer(), parts.t5(t5), parts.clip(clip), SIDES)
    lesson = make_text.Lesson(flow.t5, flow.clip, t5)
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    for teacher, taught in ((None, lesson), (flow, None)):
        trainer = make_flow.Trainer(flow, data, empty, 2, 1e-3, teacher, taught)
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # on a CPU it asks; fused on a GPU it does not
        trainer.move.fill_(0.5)
        for way in range(len(SIDES)):
            trainer.rounding.on.fill_(way)
            trainer.totals.zero_()
            with Silent():
                trainer.step(way)
            assert torch.isfinite(trainer.totals).all() and (teacher or trainer.totals[0] > 0.1)
            trainer.optimizer.zero_grad()
    for parameter, average in zip(before, trainer.average.parameters(), strict=True):
        torch.testing.assert_close(average, parameter)  # what does not move has its own average


def test_rounding_is_bitsandbytes_and_is_taken_back() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    exact = [layer.weight.detach().clone() for layer in layers]
    rounding = rounded.Rounding(rounded.linear(layers))
    rounding.begin()  # `on` is 0
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, exact, strict=True))
    rounding.end()
    rounding.on.fill_(1.0)
    rounding.begin()
    for layer, weight in zip(layers, exact, strict=True):
        packed, state = quantize_4bit(weight, blocksize=rounded.BLOCK, quant_type="nf4")
        theirs = dequantize_4bit(packed, state)
        assert ((layer.weight - theirs).abs() < 1e-6).float().mean() > 0.999  # but for ties
        assert (layer.weight - weight).norm() / weight.norm() > 0.05
    rounding.end()
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, exact, strict=True))
    with pytest.raises(ValueError, match=r"\(3, 5\) does not fill blocks of 64"):
        rounded.Rounding([nn.Linear(5, 3)])


def test_a_text_encoder_is_regrown_for_new_words(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    old_words = [parts.t5_tokenizer(), parts.clip_tokenizer(), klein_parts.tokenizer()]
    old = [parts.t5(old_words[0]), parts.clip(old_words[1]), klein_parts.text_encoder(old_words[2])]
    before = parts.words()
    monkeypatch.setattr(parts, "words", lambda: sorted([*before, "aardvark", "zebra"]))
    new_words = [parts.t5_tokenizer(), parts.clip_tokenizer(), klein_parts.tokenizer()]
    fresh = [parts.t5(new_words[0]), parts.clip(new_words[1]), klein_parts.text_encoder(new_words[2])]
    for model, known, teacher, words in zip(fresh, old_words, old, new_words, strict=True):
        parts.regrown(model, teacher, words.get_vocab(), known.get_vocab())
        states = []
        for one, reader in ((teacher, known), (model, words)):
            ids = torch.tensor([reader("a red star above two blue rings").input_ids])
            with torch.no_grad():
                found = one.eval()(ids)
            states.append(found.logits[..., :1] if "logits" in found else found[0])
        assert len(words) > len(known)
        if "logits" not in found:
            torch.testing.assert_close(*states)
    with torch.no_grad():
        ours, theirs = (
            klein_text.embed(one, *(torch.from_numpy(each) for each in klein_text.chat(reader, ["a red star"])))
            for one, reader in ((fresh[2], new_words[2]), (old[2], old_words[2]))
        )
    torch.testing.assert_close(ours, theirs)


def test_hard_shapes_come_oftener_and_no_held_out_pair_ever() -> None:
    rng = random.Random(0)
    scenes = [make_flow.sampled(rng, 0.5, 0.6) for _ in range(600)]
    single = [scene.things[0].shape for scene in scenes if scene.kind == "single"]
    assert sum(shape in make_flow.HARD for shape in single) > 0.55 * len(single)
    assert not any(world.held_out(thing.shape, thing.colour) for scene in scenes for thing in scene.things)


def test_three_steps_of_four_are_for_the_first_size() -> None:
    assert [turn(done, 1) for done in range(1, 9)] == [0] * 8
    assert [turn(done, 2) for done in range(1, 9)] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert [turn(done, 3) for done in range(1, 9)] == [0, 0, 0, 2, 0, 0, 0, 1]


def test_stages_share_the_seconds() -> None:
    clock = Clock(100.0, {"vae": 0.25, "flow": 0.9})
    assert 0 <= clock.now() < 600  # since Python's start
    clock.began += clock.now() - 20  # so that 20 s are over
    assert clock.left("vae") == pytest.approx(5, abs=0.1) and clock.left("flow") == pytest.approx(70, abs=0.1)
    assert clock.left("flow", until=30.0) == pytest.approx(10, abs=0.1)
    assert clock.left("vae", least=0.1) == 10.0  # a stage that the others stand on
    clock.report("vae", "done")
    clock.report("flow", "done")
    assert clock.stages() == {"vae": pytest.approx(20, abs=0.2), "flow": pytest.approx(0, abs=0.2)}
    assert Clock().left("vae") == float("inf")


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
    pictures = make_vae.pictures(6, torch.device("cpu"), 96)
    assert pictures.shape == (6, 3, 96, 96)
    assert pictures.min() >= -1 and pictures.max() <= 1 and pictures.std() > 0.1


@pytest.mark.parametrize("wide", [False, True])
def test_a_graph_can_hold_the_autoencoders_step(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = klein_parts.vae(parts.vae()) if wide else parts.vae()
    trainer = make_vae.Trainer(vae, 1, 1e-3, torch.device("cpu"), SIDES)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    for side in SIDES:
        trainer.figures.zero_()
        trainer.optimizer.zero_grad()
        with Silent():
            trainer.step(side)
        assert torch.isfinite(trainer.figures).all() and trainer.figures[1] > 0  # the divergence
        for name, parameter in vae.named_parameters():
            assert parameter.dtype == torch.float32 and parameter.grad is not None, name
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


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
            optimizer.zero_grad()
            with Silent():
                step()

        return run

    for module in (klein_text, klein_flow):
        monkeypatch.setattr(module, "captured", silent)
    reader = klein_parts.tokenizer()
    encoder = klein_parts.text_encoder(reader)
    drawn = klein_text.draw_captions((0, 2, 0, MIX))
    given = [torch.from_numpy(each).flatten(0, 1) for each in drawn.arrays]
    klein_text.teach_text(encoder, reader, *given, steps=1, batch=2)
    flow = klein_flow.Flow(klein_parts.transformer(), SIDES)
    x0, further = (torch.randn(2, (side // 16) ** 2, 128) for side in SIDES)
    with torch.no_grad():
        texts = klein_text.embed(encoder, *given[:2])
        empty = klein_text.embed(encoder, *(torch.from_numpy(each) for each in klein_text.chat(reader, [""])))
    base = klein_flow.train(
        "flow", flow, [klein_flow.noised(each, texts, empty, 2) for each in (x0, further)], 4, 1e-3, 0.5, 1e9, rough=0.5
    )
    stands = klein_flow.paths(base, texts[:2], empty, 2, (x0.shape[1], x0.shape[2]))
    assert stands.shape == (2, klein_flow.FEW + 1, *x0.shape[1:])
    draw = klein_flow.along(stands, texts, torch.arange(2), 2)
    x, _, sigma, velocity = draw()
    levels = klein_flow.sigmas(x0.shape[1], klein_flow.FEW)
    lower = torch.tensor([levels[levels.index(each) + 1] for each in sigma.tolist()])
    reached = x + (lower - sigma)[:, None, None] * velocity  # one step of Euler's
    nearest = [(stands[:, 1:] - one).abs().amax((2, 3)).min() for one in reached]
    assert max(nearest) < 1e-3
    average = klein_flow.train("few", flow, [draw], 1, 1e-3, 0.5, 1e9)
    assert all(torch.isfinite(parameter).all() for parameter in average.parameters())
    # the pipeline's own way to the text's states
    own = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        encoder, reader, ["a red star"], max_sequence_length=klein_parts.TEXT_TOKENS
    )
    ours = klein_text.embed(encoder, *(torch.from_numpy(each) for each in klein_text.chat(reader, ["a red star"])))
    torch.testing.assert_close(own, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("program", [make_model, make_klein])
def test_the_smoke_run_leaves_a_model_a_sheet_and_figures(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Goes on from the bundled model at two sizes, in the seconds given."""
    klein = program is make_klein
    tiny = Path(program.__file__).parent
    words = ["make", "--start", str(tiny / ("klein" if klein else "model")), "--smoke", "--sides", "64", "48"]
    words += ["--vae-steps", "2", "--out", str(tmp_path / "out"), "--figures", str(tmp_path / "figures")]
    words += ["--base", str(tmp_path / "base"), "--text-steps", "1"] if klein else []
    monkeypatch.setattr(sys, "argv", words)
    program.main()
    found = json.loads((tmp_path / "figures" / "figures.json").read_text())
    names = [f"{kind} at {side}" for kind, side in (("bf16", 64), ("nf4", 64), ("bf16", 48))]
    names = [f"{model}, {name}" for name in names for model in ("base", "distilled")] if klein else names
    assert list(found["right"]) == names and all(each["all"][1] == 4 for each in found["right"].values())
    assert {"plain", "broad", "plain at 48"} <= found["decibels"].keys() and found["seconds"]["flow"] > 0
    assert len(list((tmp_path / "figures").glob("*.png"))) == (2 if klein else 1)
    for folder in ("base", "out") if klein else ("out",):
        config = json.loads((tmp_path / folder / "vae" / "config.json").read_text())
        assert config["sample_size"] == world.SIZE
        assert family_of(Model(str(tmp_path / folder)))
        size = sum(file.stat().st_size for file in (tmp_path / folder).rglob("*") if file.is_file())
        assert size <= (12 if klein else 24) * 2**20
    assert "right of the held-out captions" in capsys.readouterr().out
