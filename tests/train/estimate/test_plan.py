"""Plans against what a GPU showed, and against the bundled model's own tensors."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

from infer.adapter.attach import attach
from infer.adapter.lora import Adapter
from infer.checkpoint.files import known_config
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.fast.install import install
from infer.fast.memory import KEEP, Memory, device_bytes
from infer.program.paths import ROOT
from infer.quantize.precision import KINDS, Precision
from infer.quantize.storage import stored_bytes
from infer.sample.encode import text_encoder
from scripts.bench import plan_rows
from scripts.bench_grid import job_of
from scripts.bench_variants import VARIANTS
from train.data.dataset import Data
from train.estimate import auto
from train.estimate.memory import footprint, text_bytes, weights_by_module
from train.estimate.plan import (
    MARGIN,
    Plan,
    announce,
    check_fits,
    duration,
    overrides,
    plan,
    propose,
    seen_gib,
    table,
)
from train.estimate.step_time import CARDS, Card, seconds
from train.loop.micro_step import fit_budget
from train.objective.optim import NAMES, Optim, make_optimizer, state_bytes
from train.run.config import Train

GIB = 2**30
SEEN = [json.loads(line) for line in (Path(__file__).parents[2] / "plan_grid.jsonl").read_text().splitlines()]
DEV = Model("black-forest-labs/FLUX.1-dev")


@pytest.mark.parametrize("seen", SEEN, ids=lambda seen: seen["name"])
def test_within_5_percent_of_what_a_gpu_allocated_and_held(seen: dict[str, Any]) -> None:
    taken = footprint(job_of(seen["config"]))
    assert taken.allocated / GIB == pytest.approx(seen["allocated_gib"], rel=0.05)
    if seen["held_gib"] is not None:  # by the allocator as it is set up now
        assert (taken.allocated + taken.allocator) / GIB == pytest.approx(seen["held_gib"], rel=0.05)
    if "resident_blocks" in seen:
        assert taken.resident == seen["resident_blocks"]


def steps_measured() -> list[dict[str, Any]]:
    """Rows of steps by today's kernels: seconds, and the peak beside them. A note says of others what they are of."""
    files = [ROOT / "docs" / "benchmarks" / f"{name}.jsonl" for name in ("train", "flux2", "references")]
    rows = [row for file in files for row in map(json.loads, file.read_text().splitlines())]
    steps = [row for row in rows if row["unit"] == "s/step" and "note" not in row]
    return [row for row in steps if not VARIANTS[row["seen"]["variant"]].reference]


@pytest.mark.parametrize("row", steps_measured(), ids=lambda row: row["name"].removeprefix("train "))
def test_steps_are_planned_as_they_were_measured(row: dict[str, Any]) -> None:
    seen, card = row["seen"], CARDS[row["card"].split()[1]]
    job = VARIANTS[seen["variant"]].job
    taken = footprint(job)
    assert taken.allocated / GIB == pytest.approx(seen["allocated_gib"], rel=0.055)
    held = (taken.allocated + taken.allocator) / GIB  # too much where much is kept: holes were wider in compiled blocks
    assert 0.94 < held / seen["reserved_gib"] < 1.08
    assert seconds(job, taken, card) == pytest.approx(row["measured"], rel=0.05)


def test_products_in_int8_are_planned_as_they_were_measured() -> None:
    rows = map(json.loads, (ROOT / "docs" / "benchmarks" / "kernels.jsonl").read_text().splitlines())
    measured = {row["name"]: row["measured"] for row in rows}["kernels nf4-1024-balanced-int8"]
    job = VARIANTS["nf4-1024-balanced-int8"].job
    assert seconds(job, footprint(job), CARDS["H200"]) == pytest.approx(measured, rel=0.05)


def test_the_grid_is_wide_and_most_of_it_was_not_fitted_to() -> None:
    configs = [seen["config"] for seen in SEEN]
    assert len({json.dumps(config, sort_keys=True) for config in configs}) == len(SEEN) >= 24
    held_out = [seen["config"] for seen in SEEN if not seen["fitted"]]
    assert len(held_out) > len(SEEN) / 2
    assert {config["precision"]["kind"] for config in held_out} == {"int8", "nf4", "bf16"}
    assert {config["batch_size"] for config in held_out} == {1, 2, 4}
    assert {config["memory"]["keep"] for config in held_out} == set(KEEP)
    assert {config["resolution"] for config in held_out} == {512, 768, 1024}
    assert {config["adapter"]["targets"] for config in held_out} == {"attention", "attention+mlp"}


def test_published_errors_of_the_plan_are_todays() -> None:
    rows = (ROOT / "docs" / "benchmarks" / "plan.jsonl").read_text().splitlines()
    published = {row["name"]: row["measured"] for row in map(json.loads, rows)}
    assert published == pytest.approx({row["name"]: row["measured"] for row in plan_rows(SEEN)}, abs=0.01)


@pytest.mark.parametrize("kind", [*KINDS, "nested"])
def test_weights_are_the_bundled_models_own(kind: str, tiny: Model) -> None:
    precision = Precision("nf4", double_quant=True) if kind == "nested" else Precision(kind)
    expected = stored_bytes(load_transformer(tiny, precision, torch.device("cpu")))
    found = sum(weights_by_module(known_config(tiny, "transformer"), precision).values())
    assert found == pytest.approx(expected, rel=1e-3)
    with text_encoder(tiny, precision, torch.device("cpu"), None) as encoder:
        assert text_bytes(tiny, precision) == pytest.approx(encoder.weights_bytes, rel=0.02)


@pytest.mark.parametrize("adapter", [Adapter(rank=3), Adapter(rank=8, targets="all"), Adapter(rank=4, dora=True)])
@pytest.mark.parametrize("optim", ["adamw", "adamw8bit"])
def test_adapters_and_their_states_are_counted(adapter: Adapter, optim: str, tiny: Model) -> None:
    transformer = load_transformer(tiny, Precision("bf16"), torch.device("cpu"))
    parameters = attach(transformer, adapter, 0)
    job = Train(model=tiny, precision=Precision("bf16"), adapter=adapter, optim=Optim(name=optim))
    taken = footprint(job)
    assert taken.adapters == taken.gradients == sum(p.numel() * 4 for p in parameters)
    assert footprint(replace(job, ema=0.9)).adapters == 2 * taken.adapters
    optimizer = make_optimizer(Optim(name=optim), parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for key, value in state.items() if key.startswith(("exp", "state"))
    ]
    assert taken.optimizer == sum(value.numel() * value.element_size() for value in states)


@pytest.mark.parametrize("began", ["zero", "trained"])
def test_the_four_states_of_prodigy_are_counted(began: str, tiny: Model) -> None:
    parameters = attach(load_transformer(tiny, Precision("bf16"), torch.device("cpu")), Adapter(rank=4), 0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
        if began == "trained":
            parameter.data += 1
    optimizer = make_optimizer(Optim("prodigy", lr=1.0), parameters)
    optimizer.step()
    states = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    found = sum(value.numel() * value.element_size() for value in states)
    counted = state_bytes("prodigy", (parameter.numel() for parameter in parameters))
    zeros = 4 * sum(parameter.numel() for parameter in parameters[1::2])  # B: where it began is one number
    assert counted == found if began == "trained" else counted == pytest.approx(found + zeros, rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_leaves_room_for_the_states_that_are_not_there_yet(name: str, tiny: Model) -> None:
    parameters = attach(load_transformer(tiny, Precision("bf16"), torch.device("cpu")), Adapter(rank=64), 0)
    optimizer = make_optimizer(Optim(name, lr=1.0), parameters)
    job = Train(model=tiny, memory=Memory(budget_gib=1.0), optim=Optim(name))
    held: list[list[int]] = []

    class Taking(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format:
                held[-1].append(made.numel() * made.element_size())
            return made

    def fit(_: float, work: Any) -> int:
        held.append([])
        with Taking():
            work()
        return 0

    batch, stream = SimpleNamespace(x0=torch.zeros(1)), SimpleNamespace(fit=fit)
    for _ in range(2):
        fit_budget(job, lambda _: None, parameters, optimizer, stream, batch)  # type: ignore[arg-type]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    first, second = held
    assert sum(first) == state_bytes(name, (parameter.numel() for parameter in parameters)) and not second
    if "8bit" not in name:  # one by one, as the allocator has memory of their own for small tensors and for large ones
        tensors = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        states = Counter(x.numel() * x.element_size() for x in tensors if x.numel() > 1)
        unused = Counter(first) - states  # Prodigy's of B, where it began, is one number
        zeros = [4 * each.numel() for each in parameters[1::2]] if name == "prodigy" else []
        assert states <= Counter(first) and unused == Counter(zeros)


@pytest.mark.parametrize("kind", ["nf4", "int8", "bf16"])
def test_as_many_blocks_stay_as_the_plan_says(kind: str, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    precision, memory = Precision(kind), Memory("nothing", budget_gib=4.0)
    transformer = load_transformer(tiny, precision, torch.device("cpu"))
    attach(transformer, Adapter(rank=4), 0)
    job = Train(model=tiny, precision=precision, adapter=Adapter(rank=4), memory=memory, data=Data(resolution=128))
    stream = install(transformer, memory, torch.device("cpu"))
    assert stream is not None
    sizes, whole = [buffer.numel() for buffer in stream.host], footprint(job)
    assert whole.resident == len(sizes)
    work = whole.allocated + whole.allocator - whole.weights  # as the plan has it, and what is in no block
    work += sum(weights_by_module(known_config(tiny, "transformer"), precision).values()) - sum(sizes)
    monkeypatch.setattr(stream, "_taken", lambda _: work + device_bytes(sizes, len(sizes) - len(stream.offloaded)))
    found = set()
    for room in range(device_bytes(sizes, 0), sum(sizes), sum(sizes) // 16):
        budget = (work + room + sizes[-1] // 2) / GIB
        planned = footprint(replace(job, memory=replace(memory, budget_gib=budget)))
        assert abs(stream.fit(budget, lambda: None) - planned.resident) <= 1
        found.add(planned.resident)
    assert len(found) > 2


def test_the_page_says_what_the_plan_says() -> None:
    page = (ROOT / "docs" / "flux-dev.md").read_text()
    GlobalHydra.instance().clear()
    ConfigStore.instance().store(name="plan_schema", node=Plan)
    found = {}
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for name in re.findall(r"`experiment=(dev_\w+)`", page):
            options: Any = OmegaConf.to_object(compose("plan", [f"experiment={name}"]))
            found[name] = footprint(options)
            if name == "dev_t4":  # told in a section of its own
                continue
            row = next(line for line in page.splitlines() if f"| `experiment={name}` |" in line)
            assert row.split("|")[-2].strip() == f"{found[name].peak / GIB:.1f}", name
    assert len(found) == 5
    words = " ".join(page.split())
    twelve, eight = found["dev_12gb"], found["dev_8gb"]
    assert twelve.resident == twelve.blocks == 57 and "all 57 blocks of `dev_12gb` stay" in words
    assert f"and {eight.resident} of those of `dev_8gb`" in words


def test_gradients_of_several_micro_batches_lie_beside_those_of_a_captured_step() -> None:
    job = Train(model=DEV, accumulation=4)
    once = footprint(replace(job, accumulation=1)).gradients
    assert footprint(job).gradients == 2 * once
    assert footprint(replace(job, memory=Memory(graph=False))).gradients == once


def test_references_are_as_many_tokens_as_pictures_of_their_size() -> None:
    """What is kept for the backward pass grows with the tokens: 512 of text, 4,096 of a picture of 1024."""
    plain = Train(model=DEV, data=Data("a", 1024), memory=Memory("nothing"))
    for references, resolution, tokens in ((["before"], None, 8704), (["before", "style"], 512, 512 + 4096 + 2 * 1024)):
        job = replace(plain, data=replace(plain.data, references=references, reference_resolution=resolution))
        taken, without = footprint(job), footprint(plain)
        assert taken.checkpoints / without.checkpoints == pytest.approx(tokens / 4608)
        assert taken.block > without.block and taken.weights == without.weights
        assert seconds(job, taken, CARDS["H100"]) > seconds(plain, without, CARDS["H100"])
        assert f"with {len(references)} reference" in table(job, taken)


def test_references_that_metadata_names_are_counted(tmp_path: Path) -> None:
    (tmp_path / "deeper").mkdir()
    lines = [{"file_name": "a.png", "text": "a"}, {"file_name": "b.png", "text": "b", "references": ["x.png", "y.png"]}]
    (tmp_path / "deeper/metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "no JSON\n")
    job = Train(model=Model("black-forest-labs/FLUX.1-Kontext-dev"), data=Data(str(tmp_path)))
    named = replace(job, data=replace(job.data, references=["before", "style"]))
    assert footprint(job) == footprint(named) != footprint(replace(job, data=Data("not/here")))


def test_kinds_of_adapters_are_planned_as_they_were_measured() -> None:
    """Memory within 2 %, at full size on the plain path; on the fast one within 3 %, and seconds within 5."""
    lines = (ROOT / "docs" / "benchmarks" / "kinds.jsonl").read_text().splitlines()
    found = {row["name"].removeprefix("train "): row["seen"] for row in map(json.loads, lines) if "seen" in row}
    assert {f"kinds-{kind}-plain" for kind in ("lora", "dora", "lokr", "loha", "oft")} <= found.keys()
    for name, seen in found.items():
        job, near = VARIANTS[name].job, 0.02 if name.endswith("-plain") else 0.03
        taken = footprint(job)
        assert taken.allocated / GIB == pytest.approx(seen["allocated_gib"], rel=near)
        if job.memory.fused:
            assert seconds(job, taken, CARDS["H200"]) == pytest.approx(seen["seconds"], rel=0.05)


def test_less_is_kept_in_less_memory_and_more_time() -> None:
    job = Train(model=DEV, data=Data(resolution=1024))
    kept = [replace(job, memory=Memory(keep)) for keep in ("nothing", "attention", "everything")]
    taken = [footprint(each) for each in kept]
    peaks = [each.peak for each in taken]
    times = [seconds(each, own, CARDS["H100"]) for each, own in zip(kept, taken, strict=True)]
    assert peaks == sorted(peaks) and times == sorted(times, reverse=True)


def test_keeping_everything_in_more_blocks_goes_from_balanced_to_fast() -> None:
    job = Train(model=DEV, data=Data(resolution=1024))
    some = [replace(job, memory=Memory("attention", keep_all=count)) for count in (0, 10, 30, 57)]
    taken = [footprint(each) for each in some]
    peaks, times = (
        [each.peak for each in taken],
        [seconds(*each, CARDS["H100"]) for each in zip(some, taken, strict=True)],
    )
    assert peaks == sorted(peaks) and times == sorted(times, reverse=True)
    whole = replace(job, memory=Memory("everything"))
    assert seconds(whole, footprint(whole), CARDS["H100"]) == pytest.approx(times[-1])
    assert footprint(whole).checkpoints == taken[-1].checkpoints
    copied = replace(job, memory=Memory("everything", unpacked=True))
    assert seconds(copied, footprint(copied), CARDS["H100"]) < times[-1]
    assert 12 < (footprint(copied).weights - taken[-1].weights) / GIB < 20
    # linear between: 10 and 30 blocks
    assert times[0] - times[1] == pytest.approx((times[0] - times[2]) / 3)


def test_auto_takes_what_the_card_has_and_a_resumed_run_keeps_it(tmp_path: Path) -> None:
    job = Train(model=DEV, memory=Memory("auto", graph=False), data=Data(resolution=1024))
    kept = {}
    for gib in (12.0, 16.0, 20.0, 26.0, 30.0, 60.0):
        memory, said = auto.decide(job, [gib])
        assert memory.graph is False and memory.keep in said
        assert footprint(replace(job, memory=memory)).peak <= gib * GIB
        kept[gib] = 57 if memory.keep == "everything" else memory.keep_all
    assert list(kept.values()) == sorted(kept.values()) and 0 < kept[16.0] < kept[20.0] < 57 == kept[30.0]
    assert auto.decide(job, [8.0])[0].budget_gib is not None
    tiny = replace(job, model=Model("scripts/tiny/model"), data=Data(resolution=128))
    assert auto.decide(tiny, [79.0])[0] == Memory("attention", graph=False)  # next to nothing to save
    assert auto.decide(replace(job, memory=Memory("auto", fused=False)), [79.0])[0] == Memory("nothing", fused=False)

    heard: list[str] = []

    def settled(wanted: Train, resumed: bool, gib: float | None) -> Memory:
        return auto.settle(wanted, tmp_path / "run", resumed, None if gib is None else [gib], heard.append)

    assert settled(replace(job, memory=Memory("nothing")), False, 79.0) == Memory("nothing")
    assert settled(job, True, 79.0) == Memory(graph=False)  # a run from before there was auto
    first = settled(job, False, 20.0)
    assert first.keep_all == kept[20.0] and len(heard) == 1 and f"keep_all={first.keep_all} (of 57 blocks)" in heard[0]
    assert settled(job, True, 79.0) == first and len(heard) == 1
    # what is given with a resumption counts
    asked = replace(job, memory=Memory("auto", compile=False))
    assert settled(asked, True, 79.0) == replace(first, compile=False, graph=None) and len(heard) == 1
    assert settled(replace(job, memory=Memory("auto", fused=False)), True, None) == Memory("nothing", fused=False)
    bounded = replace(job, memory=Memory("auto", budget_gib=8.0))
    assert settled(bounded, True, 79.0).budget_gib == 8.0
    first = settled(job, False, 20.0)
    heard.clear()
    assert settled(job, True, 79.0) == first and not heard
    assert settled(job, True, 12.0) == auto.decide(job, [12.0])[0]  # on a card that is too small for it
    assert settled(job, False, None) == Memory("attention", graph=False)
    (tmp_path / "run" / "memory.yaml").write_text("keep: [")
    with pytest.raises(ValueError, match=r"memory.yaml is not what this run wrote .*; delete it, or set memory.keep"):
        settled(job, True, 79.0)


def test_auto_on_cards_as_they_are_sold() -> None:
    """What is chosen fits with a margin, and a larger card is never slower."""
    job = Train(model=DEV, memory=Memory("auto"), data=Data(resolution=1024))
    found = []
    for card in (8.0, 12.0, 16.0, 24.0, 80.0, 141.0):
        gib = seen_gib(card)
        memory, said = auto.decide(job, auto.rooms(gib, gib - 0.85, 1024**2))
        taken = footprint(replace(job, memory=memory))
        assert taken.peak < (gib - MARGIN) * GIB and memory.keep in said
        found.append((memory, seconds(replace(job, memory=memory), taken, CARDS["H100"])))
    settings = [memory for memory, _ in found]
    assert all(memory.budget_gib is not None for memory in settings[:3]) and 0 < settings[3].keep_all < 57
    assert settings[4] == settings[5] == Memory("everything", unpacked=True)
    times = [step for _, step in found]
    assert times == sorted(times, reverse=True) and times[5] < 0.85 * times[0]


def test_a_preview_and_other_programs_leave_less_room() -> None:
    beside, without = auto.rooms(24.0, 23.5, 1024**2)
    assert 18 < beside < without < 24 and max(auto.rooms(24.0, 10.0, 0)) < 11
    job = Train(model=DEV, memory=Memory("auto"), data=Data(resolution=1024))
    assert auto.decide(job, [4.0, 7.0]) == auto.decide(job, [7.0]) != auto.decide(job, [4.0])


def test_the_fastest_that_fits_is_proposed() -> None:
    job = Train(model=DEV, data=Data(resolution=1024))
    before = None
    for gib in (6, 8, 12, 16, 24, 40, 80):
        found = propose(job, gib)
        assert found is not None and found[2].peak <= gib * GIB
        assert before is None or found[0] <= before
        before = found[0]
    streamed, resident = propose(job, 6), propose(job, 40)
    assert streamed is not None and streamed[1].memory.budget_gib is not None and streamed[2].host > 4 * GIB
    assert resident is not None and resident[1].memory.budget_gib is None
    assert propose(job, 2) is None


def test_a_card_that_is_too_small_is_told_what_would_fit() -> None:
    job = Train(model=DEV, data=Data(resolution=1024))
    assert check_fits(job, 24).peak < 24 * GIB
    with pytest.raises(ValueError, match=r"needs about 11\.\d GiB and the card has 10.0: add memory.*\(about"):
        check_fits(job, 10)
    with pytest.raises(ValueError, match=r"no memory setting makes it fit; lower data\.resolution"):
        check_fits(job, 2)
    changed = replace(job, memory=Memory("nothing", budget_gib=7.5), precision=Precision("nf4", double_quant=True))
    assert overrides(job, changed) == "memory.keep=nothing memory.budget_gib=7.5 precision.double_quant=true"


@pytest.mark.parametrize("sold, names", [(8, ["RTX 4060"]), (12, ["RTX 3060 12GB"]), (24, ["RTX 4090", "RTX 3090"])])
def test_one_truth_a_card(sold: float, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What is said to fit a size fits the cards of that size in the table, beside a desktop."""
    returned = plan(Plan(model=DEV, data=Data(resolution=1024), fit_gib=sold))
    lines = capsys.readouterr().out.splitlines()
    for name in names:
        (line,) = [line for line in lines if line.strip().startswith(f"{name}  ") or f" {name} 1" in line]
        assert "fit" not in line and "left" not in line
        assert returned["peak_memory_bytes"] <= (CARDS[name].gib - MARGIN) * GIB
    assert f"the fastest that fits a card of {sold} GB" in lines[0]


def test_what_leaves_no_room_for_a_desktop_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Plan(model=DEV, data=Data(resolution=1024))
    peak = footprint(job).peak
    for spare, said in ((MARGIN + 0.1, ""), (0.3, "0.30 GiB left: without a desktop"), (-0.1, "does not fit")):
        monkeypatch.setitem(CARDS, "mine", Card(peak / GIB + spare, 1e12, 1e12))
        plan(job)
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("mine ")]
        assert line.split("  ")[-1] == said or (not said and "left" not in line and "fit" not in line)


def test_times_of_all_steps() -> None:
    assert [duration(s) for s in (7, 119, 120, 3600, 7199, 7260)] == ["7 s", "119 s", "2 min", "60 min", "2 h 00 min",
                                                                      "2 h 01 min"]  # fmt: skip
    text = table(Train(model=DEV, steps=900), footprint(Train(model=DEV)))
    h100 = seconds(Train(model=DEV), footprint(Train(model=DEV)), CARDS["H100"])
    assert re.search(rf"H100 +{h100:.2f} +{duration(900 * h100)}$", text, re.MULTILINE)


def test_json_where_it_is_asked_for(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan(Plan(model=DEV, data=Data(resolution=512)))
    assert "{" not in capsys.readouterr().out
    file = tmp_path / "plan.json"
    returned = plan(Plan(model=DEV, data=Data(resolution=512), json=True, out=str(file)))
    text = capsys.readouterr().out
    assert json.loads(text.splitlines()[-1]) == returned == json.loads(file.read_text())
    parts = returned["parts"]
    assert returned["peak_memory_bytes"] == sum(parts.values()) and parts["weights"] > 6 * GIB
    with pytest.raises(ValueError, match="nothing fits a card of 1 GB"):
        plan(Plan(model=DEV, fit_gib=1))
    with pytest.raises(ValueError, match=r"memory.budget_gib is 0.5, but .* takes about"):
        footprint(Train(model=DEV, memory=Memory(budget_gib=0.5)))
    with pytest.raises(ValueError, match="fit_gib is 0; it must be above 0"):
        Plan(fit_gib=0)


def test_training_says_its_plan_and_stops_where_the_card_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    job, said = Train(model=DEV, data=Data(resolution=1024)), []
    for gib in (80, 10):
        card = SimpleNamespace(total_memory=gib * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, card=card: card)
        if gib == 80:
            announce(job, torch.device("cuda"), said.append)
        else:
            with pytest.raises(ValueError, match=r"the card has 10\.0: add memory"):
                announce(job, torch.device("cuda"), said.append)
    announce(job, torch.device("cpu"), said.append)
    assert len(said) == 1 and said[0].startswith("plan: 11.") and "weights 6.24" in said[0]


def test_a_kind_without_a_fast_path_is_planned_on_the_plain_one(capsys: pytest.CaptureFixture[str]) -> None:
    """Its memory is the plain path's, of its own tensors; what a step takes is said not to be known."""
    lora = Plan(model=DEV, adapter=Adapter(16, 16.0), memory=Memory("nothing", fused=False))
    loha = replace(lora, adapter=Adapter(16, 16.0, kind="loha"), memory=Memory("attention"))
    found = plan(loha)
    said = capsys.readouterr().out
    assert "seconds a step are not known: adapters of kind loha train on diffusers' own layers" in said
    assert found["seconds_per_step"] == {} and not found["memory"]["fused"]
    assert found["parts"]["adapters"] == 2 * footprint(lora).adapters  # two pairs of the same rank
    with pytest.raises(ValueError, match=r"memory\.budget_gib=12 needs the fast path, but it has no adapters of kind"):
        plan(replace(loha, memory=Memory("attention", budget_gib=12)))
    assert "nothing fits" not in str(plan(replace(loha, fit_gib=24)))
