"""Pictures with precomputed modulations against pictures of the same blocks step by step."""

from typing import Any

import pytest
import torch
from torch import Tensor

from infer.adapter.lora import RECOVERY, Adapter
from infer.adapter.switch import switch
from infer.checkpoint.load import load_scheduler
from infer.checkpoint.model import Model
from infer.family.family import Text
from infer.fast import flux1_blocks, precomputed
from infer.fast.cuda_graph import Sampler
from infer.fast.install import install, uninstall
from infer.fast.memory import Memory
from infer.fast.offload import Offload
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling, draw
from tests.infer.fast.families import CPU, load, make
from tests.infer.fast.test_families import add
from tests.infer.fast.test_fast import ADAPTERS, error, exact
from tests.infer.fast.test_graph import log  # noqa: F401  # a fixture

SIZE = 64, 96
BASE = ("fp32", "int8", "nf4", "double")


def text_for(transformer: Any, seed: int, references: int = 0, guided: bool = True) -> Text:
    config, noise = transformer.config, torch.Generator().manual_seed(seed)
    embeds, empty = (torch.randn(20, config.joint_attention_dim, generator=noise) for _ in range(2))
    behind = tuple(torch.randn(config.in_channels // 4, 4, 6, generator=noise) for _ in range(references))
    if "pooled_projection_dim" in config:
        return Text(embeds, torch.randn(config.pooled_projection_dim, generator=noise), references=behind)
    return Text(embeds, None, empty=Text(empty, None) if guided else None, references=behind)


def pictures(transformer: Any, model: Model, steps: int = 3, references: int = 0) -> list[Tensor]:
    """Of two texts, two guidances and two sizes."""
    found = []
    for seed, guidance, size in ((0, 4.0, SIZE), (1, 1.5, SIZE), (0, 4.0, (48, 48))):
        text = text_for(transformer, seed, references)
        found.append(draw(transformer, load_scheduler(model), text, seed, Sampling(steps, guidance), size, CPU))
    return found


def step_by_step(transformer: Any, model: Model, steps: int = 3, references: int = 0) -> list[Tensor]:
    ahead, transformer.precomputed = transformer.precomputed, None
    found = pictures(transformer, model, steps, references)
    transformer.precomputed = ahead
    return found


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each product that gives a modulation of FLUX.1's blocks."""
    rows: list[int] = []

    def counting(multiply: Any) -> Any:
        def product(x: Tensor, layers: Any) -> Any:
            rows.append(len(x))
            return multiply(x, layers)

        return product

    monkeypatch.setattr(flux1_blocks, "modulation", counting(flux1_blocks.modulation))
    monkeypatch.setattr(precomputed, "linear", counting(precomputed.linear))
    return rows


def test_by_the_kernels_of_fused_blocks(model: Model) -> None:
    transformer, _ = make(exact("nf4"), ADAPTERS["all layers"], model)
    install(transformer, Memory(), CPU)
    expected = step_by_step(transformer, model)
    install(transformer, Memory(), CPU, kernels=True)
    assert error(pictures(transformer, model), expected) < 1e-5


@pytest.mark.parametrize(
    ("adapter", "kind"), [*((None, kind) for kind in BASE), *(("all layers", kind) for kind in BASE), ("dora", "nf4")]
)
def test_pictures_are_those_of_each_step_by_itself(adapter: str | None, kind: str, model: Model) -> None:
    precision = exact("nf4", double_quant=True) if kind == "double" else exact(kind)
    transformer = make(precision, ADAPTERS[adapter], model)[0] if adapter else load(model, precision)
    install(transformer, Memory(), CPU)
    assert error(pictures(transformer, model), step_by_step(transformer, model)) < 1e-5
    if adapter:
        found = pictures(transformer, model)
        switch(transformer, False)
        assert error(pictures(transformer, model), found) > 1e-3  # the adapter counts, and is off at once
        assert error(pictures(transformer, model), step_by_step(transformer, model)) < 1e-5


def test_with_references(model: Model) -> None:
    transformer = load(model, exact("nf4"))
    install(transformer, Memory(), CPU)
    found = pictures(transformer, model, references=2)
    assert error(found, step_by_step(transformer, model, references=2)) < 1e-5
    assert error(found, pictures(transformer, model)) > 1e-3


def test_each_layer_multiplies_the_rows_of_all_steps_once(
    tiny: Model, counted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    transformer = load(tiny, exact("nf4"))
    install(transformer, Memory(), CPU)
    expected = step_by_step(transformer, tiny, 5)
    layers = 2 * len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    assert counted == 3 * 5 * layers * [1]
    counted.clear()
    assert error(pictures(transformer, tiny, 5), expected) < 1e-5
    assert counted == 3 * layers * [5]
    counted.clear()
    monkeypatch.setattr(precomputed, "AT_ONCE", 2)
    assert error(pictures(transformer, tiny, 5), expected) < 1e-5
    assert counted == 3 * (layers * [2] + layers * [2] + layers * [1])


def test_bf16_is_no_further_from_fp32_than_step_by_step(model: Model) -> None:
    truth = load(model, Precision("fp32"))
    install(truth, Memory(), CPU)
    wanted, transformer = pictures(truth, model), load(model, Precision("bf16"))
    install(transformer, Memory(), CPU)
    before = error([each.float() for each in step_by_step(transformer, model)], wanted)
    assert error([each.float() for each in pictures(transformer, model)], wanted) < max(0.02, 1.2 * before)


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4", "double"])
@pytest.mark.parametrize("resident", [0, 4])
def test_streamed_blocks_draw_bit_for_bit_what_resident_ones_do(resident: int, kind: str, model: Model) -> None:
    precision = Precision("nf4", double_quant=True) if kind == "double" else Precision(kind)
    transformer, _ = make(precision, ADAPTERS["all layers"], model)
    install(transformer, Memory(), CPU)
    expected = pictures(transformer, model)
    offload = install(transformer, Memory(budget_gib=1), CPU)
    assert isinstance(offload, Offload)
    offload.set_resident(resident)
    for slot in offload.slots:
        slot.fill_(255)  # what is read from a slot before it is filled would show
    offload.holds = [None] * len(offload.slots)
    for _ in range(2):
        assert equal(pictures(transformer, model), expected)


def test_within_a_budget_one_step_takes_what_many_take(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step is drawn to see what fits."""
    transformer, taken = load(tiny, exact("nf4")), []
    fill = precomputed.Precomputed._fill

    def filling(self: Any, transformer: Any, table: Tensor, x: Tensor) -> None:
        taken.append(table.untyped_storage().nbytes())
        fill(self, transformer, table, x)

    monkeypatch.setattr(precomputed.Precomputed, "_fill", filling)
    for memory in (Memory(), Memory(budget_gib=1)):
        install(transformer, memory, CPU)
        for steps in (1, 3):
            draw(transformer, load_scheduler(tiny), text_for(transformer, 0), 0, Sampling(steps, 2.0), SIZE, CPU)
    assert taken[2] == taken[3] > taken[1] == 3 * taken[0]


def test_captured_pictures_are_the_ordinary_ones_and_nothing_is_stale(model: Model, log: list[str]) -> None:  # noqa: F811
    """Other texts, the adapter switched off and on, and weights that change between two pictures."""
    transformer, parameters = make(exact("nf4"), ADAPTERS["all layers"], model)
    install(transformer, Memory(), CPU)
    expected = {}
    for state in ("on", "off", "changed"):
        switch(transformer, state != "off")
        if state == "changed":
            for parameter in parameters:
                parameter.data += 0.02
        expected[state] = pictures(transformer, model)
    for parameter in parameters:
        parameter.data -= 0.02
    Sampler(transformer, None)
    for state in ("on", "off", "changed"):
        switch(transformer, state != "off")
        if state == "changed":
            for parameter in parameters:
                parameter.data += 0.02
        log.clear()
        assert error(pictures(transformer, model), expected[state]) < 1e-5
        assert log.count("capture") == 2  # one a size, whatever the text and the step
    assert error(expected["on"], expected["off"]) > 1e-3 and error(expected["on"], expected["changed"]) > 1e-3


def test_beside_a_recovery_adapter(model: Model) -> None:
    transformer = load(model, exact("nf4"))
    without = pictures(transformer, model)
    add(transformer, RECOVERY, model, Adapter(rank=8, targets="all"), 1)
    install(transformer, Memory(), CPU)
    found = pictures(transformer, model)
    assert error(found, step_by_step(transformer, model)) < 1e-5 and error(found, without) > 1e-3


def test_where_nothing_is_precomputed(tiny: Model, counted: list[int]) -> None:
    """Compiled blocks, diffusers' own, with gradients, and where a hook waits for the transformer's own arguments."""
    transformer = load(tiny, exact("nf4"))
    install(transformer, Memory(compile=True), CPU)
    assert transformer.precomputed is None
    install(transformer, Memory(), CPU)
    expected = pictures(transformer, tiny)
    seen: list[float] = []
    hook = transformer.register_forward_pre_hook(
        lambda module, args, given: seen.append(float(given["timestep"])), with_kwargs=True
    )
    counted.clear()
    assert error(pictures(transformer, tiny), expected) < 1e-5
    hook.remove()
    assert len(seen) == 9 and set(counted) == {1}
    uninstall(transformer)
    counted.clear()
    assert error(pictures(transformer, tiny), expected) < 1e-4 and not counted
