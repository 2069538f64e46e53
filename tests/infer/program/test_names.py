"""What the user calls a run, an adapter, a precision or a score is text, and clashes with no name within."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.adapter.selection import Trained, Weighted, load_chosen
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.program.run_names import check_run_name
from infer.quantize.precision import Precision
from infer.sample import generate
from infer.sample.generate import Sampling
from train.gap import Gap, measure
from train.loop.finish import nothing_learned

CPU = torch.device("cpu")
MODULES = ["train", "eval", "half", "type", "float", "to", "cpu", "items", "keys", "pop", "training", "forward",
           "modules", "", "a.b", ".", "a b", "läufe", "my_lora", "LoRA_A", "_x", "1/2"]  # fmt: skip


@pytest.fixture(scope="module")
def lora(tiny: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    transformer = load_transformer(tiny, Precision("bf16"), CPU)
    for parameter in attach(transformer, Adapter(rank=2, targets="single"), seed=0):
        parameter.data += 0.02
    save_adapter(transformer, folder, {})
    return folder


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_not_called_what_torch_cannot_hold(name: str, tiny: Model, lora: Path) -> None:
    transformer = load_transformer_once(tiny)
    with pytest.raises(ValueError, match=r"an adapter cannot be named .*give it another name"):
        load_adapter(transformer, str(lora), name)


_kept: list[torch.nn.Module] = []


def load_transformer_once(tiny: Model) -> torch.nn.Module:
    if not _kept:
        _kept.append(load_transformer(tiny, Precision("bf16"), CPU))
    return _kept[0]


def test_no_adapter_has_the_name_of_one_before(tiny: Model, lora: Path) -> None:
    transformer = load_transformer(tiny, Precision("bf16"), CPU)
    two = Trained(str(lora), "recovery", also=[Weighted(str(lora), 0.5)])
    first = load_chosen(transformer, two, tiny)
    transformer.delete_adapters(first)
    second = load_chosen(transformer, two, tiny)
    assert len({*first, *second}) == 4 and set(transformer.peft_config) == set(second)


@pytest.mark.parametrize("name", ["train", "v1.5 ünder, x", "recovery"])
def test_an_adapter_is_shown_as_the_user_calls_it(
    name: str, tiny: Model, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = Compare(
        tiny, {"bf16": Precision("bf16")}, adapter=Trained(str(lora), name), prompts=["a red star"],
        sampling=Sampling(steps=1, height=64, width=64), device="cpu",
    )  # fmt: skip
    folder = compare(options)
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["adapter"] for row in rows] == [None, name]
    assert rows[1]["scores"]["latents_base"] > 0
    assert name in (folder / "report.html").read_text()


@pytest.mark.parametrize("run", ["half", "v1.5", "set/type"])
def test_a_run_may_have_any_name_in_the_gap(
    run: str, tiny: Model, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    from train.data.dataset import Data

    monkeypatch.chdir(tmp_path)
    Path("set").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 40, 120)).save(f"set/{i}.png")
        Path(f"set/{i}.txt").write_text(f"a red star {i}")
    data = Data("set", resolution=64, validation=0.5, cache=str(lora.parent / "cache"))
    options = Gap(tiny, {"bf16": Precision("bf16")}, None, Trained(str(lora)), data, levels=1, run=run, device="cpu")
    rows = measure(options, {"bf16": options.memory}, CPU)
    assert [row.adapter for row in rows] == [None, run.rpartition("/")[2]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"precisions": {"a/b": Precision()}}, "precisions has the name 'a/b', which becomes a part of a file's"),
        ({"precisions": {"..": Precision()}}, r"precisions has the name '\.\.'"),
        ({"precisions": {"a\nb": Precision()}}, "precisions has the name"),
        ({"precisions": {"base": Precision()}}, "precisions has the name 'base', which is what runs without"),
        ({"precisions": {"a": Precision(), "a-adapter": Precision()}}, "a and a-adapter, whose pictures have one name"),
        ({"scores": {"psnr": "a.b"}}, "scores.psnr has the name of a score that is measured anyway"),
        ({"scores": {"ssim_base": "a.b"}}, "scores.ssim_base has the name"),
        ({"scores": {"clip_t": "a.b"}}, "scores.clip_t has the name"),
        ({"prompts": ["a", "b", "a"]}, "prompts has 'a' twice; give each once"),
        ({"seeds": [1, 0, 1]}, "seeds has 1 twice"),
        ({"unrelated": ["x", "x"]}, "unrelated has 'x' twice"),
    ],
)
def test_names_that_would_be_one(changes: dict[str, object], message: str, tiny: Model) -> None:
    options = Compare(tiny, {"nf4": Precision()}, prompts=["a"])
    with pytest.raises(ValueError, match=message):
        replace(options, **changes)


@pytest.mark.parametrize(
    "run", ["cache", "cache/x", "mine/adapter", "mine/checkpoints", "a/b/compare", "mine/images/x"]
)
def test_a_run_lies_in_no_folder_that_others_use(run: str) -> None:
    with pytest.raises(ValueError, match=f"run is {run!r}, but that folder is for .*; choose another name such as"):
        check_run_name(run)


@pytest.mark.parametrize("run", ["adapter", "compare", "train", "mine/cache", "caches"])
def test_other_words_are_runs(run: str) -> None:
    assert check_run_name(run) == Path("runs") / run


def test_a_picture_that_is_not_finite_is_none(
    tiny: Model, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter so strong that the latents overflow, and a base that gives something infinite."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "strong").mkdir()
    save_file({k: v * 1e30 for k, v in load_file(lora / FILE).items()}, tmp_path / "strong" / FILE)
    options = Compare(
        tiny, {"fp32": Precision("fp32", "fp32"), "bf16": Precision("bf16")}, prompts=["a red star"],
        adapter=Trained(str(tmp_path / "strong"), "strong"), sampling=Sampling(1, height=64, width=64), device="cpu",
    )  # fmt: skip
    with pytest.raises(
        ValueError, match=r"at precision fp32 the picture of seed 0 is not finite \(.* % of its latents\)"
    ):
        compare(options)
    assert not list(tmp_path.glob("runs/*"))
    real = generate.denoise

    def ruined(*args: Any) -> Tensor:
        found = real(*args)
        found[0, 0, 0] = float("inf")
        return found

    monkeypatch.setattr(generate, "denoise", ruined)
    with pytest.raises(ValueError, match=r"at precision fp32 the picture .* is not finite .*checkpoint may be damaged"):
        compare(replace(options, adapter=Trained()))


def test_why_nothing_was_learned(tmp_path: Path) -> None:
    from train.run.config import Train

    job = Train()
    assert "nothing was learned; raise optim.lr" in nothing_learned(job, 0.0, 0, tmp_path)
    for norm, skipped in ((float("nan"), 0), (float("inf"), 3), (0.0, 1000)):
        said = nothing_learned(job, norm, skipped, tmp_path)
        assert "lower optim.lr" in said and "raise optim.lr" not in said and str(norm) in said
