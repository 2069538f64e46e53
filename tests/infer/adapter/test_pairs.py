"""Every pair of options: it works, or it is refused before anything is loaded.

Rows are a covering array (tests/covering.py): each pair of values that is not refused stands together in one of them,
trains for two steps, and goes through a command. In the default suite the factors have their main values; all values of
all factors with every command: `pytest -m slow tests/infer/adapter/test_pairs.py`.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.oft.layer import OFTRotationModule
from PIL import Image
from safetensors.torch import load_file

from infer.adapter.attach import attach, load_adapter
from infer.adapter.attached import save_adapter
from infer.adapter.error_init import minus, save_start, start_from_error
from infer.adapter.lora import Adapter
from infer.adapter.read import FILE, Pairs, read_adapter, read_pairs
from infer.adapter.selection import Trained
from infer.adapter.targets import base_layers
from infer.adapter.write import FORMATS
from infer.checkpoint.fingerprint import fingerprint
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.checkpoint.originals import Originals
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.convert import Convert, Source, convert
from infer.fast.install import Memory
from infer.merge import merge
from infer.merging.settings import Merge
from infer.merging.update import merged
from infer.program.paths import ROOT
from infer.quantize.precision import Precision, kind_asked, kind_of
from infer.quantize.storage import dequantized
from infer.recover import recover
from infer.rounding.settings import Recover
from infer.sample.generate import Sampling
from infer.save import Save, save
from tests.covering import Row, covering
from tests.infer.adapter.test_adapters import inputs, randomise
from tests.infer.single_file import files
from train.data.dataset import Data
from train.gap import Gap, gap
from train.objective.flow_matching import LOSSES, Flow
from train.objective.optim import Optim
from train.objective.preservation import KINDS, Preserve
from train.run.config import Train
from train.train import train
from train.transfer import Transfer, transfer

CPU = torch.device("cpu")
TARGETS = r"(single_)?transformer_blocks\.[01]\.(attn\.to_[qk]|proj_out|ff\.net\.2)"
RANK = 8
MIXTURE = {r".*\.0\..*": "int8", r".*\.1\.attn.*": "bf16", "x_embedder": "fp4"}
PRECISIONS = {
    "bf16": Precision("bf16"),
    "fp32": Precision("fp32"),
    "int8": Precision("int8"),
    "llm_int8": Precision("int8", llm_int8=True, outlier_threshold=4.0),
    "fp4": Precision("fp4"),
    "nf4": Precision("nf4"),
    "double": Precision("nf4", double_quant=True, t5="bf16"),
    "skipped": Precision("fp4", skip_modules=["transformer_blocks.0", "proj_mlp"]),
    "mixture": Precision("nf4", layers=MIXTURE, t5="int8"),
    "nested": Precision("bf16", double_quant=True, layers={r"single.*": "nf4"}),
}
MEMORY = {
    "auto": Memory("auto"),
    "lean": Memory("nothing"),
    "balanced": Memory("attention"),
    "products": Memory("products"),
    "fast": Memory("everything"),
    "plain": Memory("nothing", fused=False),
    "whole": Memory("everything", fused=False),
}
OPTIMIZERS = ["adamw", "adamw8bit", "paged_adamw8bit", *(["prodigy"] if find_spec("prodigyopt") else [])]
BEGUN = {"start": "plain", "start_dora": "dora", "start_loftq": "loftq", "start_residual": "residual"}  # files, below
FACTORS = {
    "adapter": ["lora", "rslora", "dora", "lokr", "loha", "oft"],
    "base": ["folder", "file", "gguf"],
    "data": ["plain", "references"],
    "origin": ["default", "gaussian", "orthogonal", "residual", "loftq", *BEGUN],
    "precision": list(PRECISIONS),
    "memory": list(MEMORY),
    "optimizer": OPTIMIZERS,
    "beside": ["nothing", "dropout", "average", "recovery", "class", "empty"],
    "flow": ["uniform", "logit_normal", "mode", "shifted"],
    "loss": ["mse", "huber", "smooth_l1", "mae", "sigma_sqrt", "cosmap", "bell", "min_snr"],
    "repeats": ["whenever", "always"],
    "command": ["train", "resume", "compare", "gap", "transfer", "merge", "save", "convert", "recover"],
}
MAIN = (
    FACTORS
    | {
        "adapter": ["lora", "dora", "lokr", "oft"],
        "origin": ["default", "residual", "loftq", "start_loftq"],
        "precision": ["bf16", "int8", "nf4", "mixture"],
        "base": ["folder", "file"],
        "memory": ["auto", "fast", "plain"],  # on a CPU auto is balanced
        "optimizer": ["adamw", "adamw8bit", *OPTIMIZERS[3:]],
        "flow": ["logit_normal", "shifted"],
        "loss": ["mse", "huber", "min_snr"],
    }
)
ERRORS = ("residual", "loftq")
OTHERS = ("lokr", "loha", "oft")  # adapters that are not LoRA


def loss_of(name: str) -> dict[str, Any]:
    return {"loss": name} if name in LOSSES else {"weighting": name}


NEITHER = r"adapter\.init=.* is not made for adapter\.(dora|recovery)"
# what is refused of two values, and what is said
REFUSED: list[tuple[str, tuple[str, ...], str, tuple[str, ...], str]] = [
    ("adapter", ("dora",), "origin", ERRORS, NEITHER),
    ("adapter", ("dora",), "origin", ("start", "start_loftq", "start_residual"), r"is LoRA; set adapter\.dora to it"),
    ("adapter", ("lora", "rslora"), "origin", ("start_dora",), r"is DoRA; set adapter\.dora to it"),
    ("adapter", OTHERS, "origin", ("gaussian", "orthogonal", *ERRORS), r"adapter\.init is .*it belongs to LoRA; leave"),
    ("adapter", OTHERS, "origin", tuple(BEGUN), "is LoRA; set adapter=lora to go on from it"),
    ("adapter", OTHERS, "beside", ("dropout",), r"adapter\.dropout is 0\.1, which has no effect"),
    ("adapter", OTHERS, "beside", ("recovery",), r"adapter\.recovery is .*PEFT has no LoRA beside adapter\.kind"),
    ("beside", ("recovery",), "base", ("file", "gguf"), "the recovery adapter .* was made for another checkpoint"),
    ("origin", ERRORS, "precision", ("bf16", "fp32"), "none of the layers .* is quantized"),
    ("origin", ERRORS, "beside", ("recovery",), NEITHER),
    ("beside", ("recovery",), "precision", ("bf16", "fp32"), "the recovery adapter .* was made for kind=nf4, not "),
    ("beside", ("class", "empty"), "origin", (*ERRORS, "start_loftq", "start_residual"), "which gives back what"),
    ("command", ("merge",), "precision", ("mixture", "nested"), "is a mixture of kinds, .*merge with precision=bf16"),
    ("command", ("save",), "precision", ("mixture", "nested"), "is a mixture of kinds, .*or save one kind"),
    ("command", ("recover",), "precision", ("bf16", "fp32"), "which loses nothing"),
    ("command", ("transfer",), "beside", ("recovery",), r"adapter\.recovery is .*belongs to one precision"),
]  # fmt: skip


def refusal(row: Row) -> str | None:
    """What is said of a row, or a part of one, that is refused."""
    for a, values, b, others, said in REFUSED:
        if row.get(a) in values and row.get(b) in others:
            return said
    return None


def allowed(row: Row) -> bool:
    return refusal(row) is None


@dataclass
class Place:
    """A folder with pictures and adapters to begin with."""

    folder: Path
    model: Model
    data: Data

    def base(self, row: Row) -> Model:
        """What the row's base is read from."""
        file = {"file": "base.safetensors", "gguf": "base.gguf"}.get(row["base"])
        return self.model if file is None else Model(str(self.folder / file), parts=self.model.path)

    def recovery(self, precision: str) -> str:
        """The recovery adapter of a precision; of one that is not quantized, NF4's."""
        return str(self.folder / f"recovery-{precision if PRECISIONS[precision].quantized else 'nf4'}")

    def job(self, row: Row, run: str) -> Train:
        """The training of a row."""
        kind, origin, beside = (row[name] for name in ("adapter", "origin", "beside"))
        return Train(
            model=self.base(row),
            precision=PRECISIONS[row["precision"]],
            adapter=Adapter(
                *(() if kind == "oft" else (RANK, 4.0)), kind=kind if kind in OTHERS else "lora",
                factor=4 if kind == "lokr" else 16, rslora=kind == "rslora", dora=kind == "dora", targets=TARGETS,
                init="default" if origin in BEGUN else origin,
                start=str(self.folder / BEGUN[origin]) if origin in BEGUN else None,
                recovery=self.recovery(row["precision"]) if beside == "recovery" else None,
                dropout=0.1 if beside == "dropout" else 0.0,
            ),
            data=replace(
                self.data, trigger="sks" if beside == "class" else None,
                references=[str(self.folder / "before")] if row["data"] == "references" else [],
                teach_references=row["data"] == "references",
            ),
            preserve=Preserve(beside, "ring" if beside == "class" else "") if beside in KINDS else Preserve(),
            flow=Flow(row["flow"], 0.0 if row["flow"] in ("uniform", "mode") else 0.2, **loss_of(row["loss"])),
            memory=MEMORY[row["memory"]],
            # Prodigy's own rate begins at 1e-6, which in two steps moves nothing that bf16 sees
            optim=Optim(row["optimizer"], lr=1e3 if row["optimizer"] == "prodigy" else 1e-3),
            ema=0.5 if beside == "average" else None, deterministic=row["repeats"] == "always",
            steps=2, save_every=1, keep=2, validate_every=0, validation_levels=1, previews=[], device="cpu",
            run=run,
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pictures").mkdir()
    for i in range(3):
        Image.radial_gradient("L").resize((64, 64)).rotate(30 * i).save(folder / f"pictures/{i}.png")
        (folder / f"pictures/{i}.txt").write_text(f"a grey ring {i}")
    (folder / "before").mkdir()
    for i in range(3):
        Image.linear_gradient("L").resize((64, 64)).rotate(30 * i).save(folder / f"before/{i}.png")
    model = Model(str(ROOT / "scripts/tiny/model"))
    whole = files.original(files.part(model.path, "transformer"))
    files.saved(folder / "base.safetensors", whole)
    if find_spec("gguf"):
        files.gguf_file(folder / "base.gguf", whole, "Q8_0")
    nf4 = PRECISIONS["nf4"]
    for name, init, own in (
        ("plain", "default", Precision("fp32")),
        ("dora", "default", Precision("fp32")),
        ("loftq", "loftq", nf4),
        ("residual", "residual", nf4),
    ):
        transformer = load_transformer(model, own, CPU)
        attach(transformer, Adapter(4, 4.0, dora=name == "dora", targets=TARGETS, init=init), seed=1)
        if init != "default":
            save_start(start_from_error(transformer, model, init).here, folder / name)
        randomise(transformer)
        notes: dict[str, Any] = {"adapter": {"init": init}, "precision": vars(own)}
        save_adapter(transformer, folder / name, notes)
        for other, theirs in PRECISIONS.items() if name == "plain" else ():
            notes = {"recovers": {"base": fingerprint(model, "transformer")}, "precision": vars(theirs)}
            save_adapter(transformer, folder / f"recovery-{other}", notes)
    data = Data(str(folder / "pictures"), 64, 1, validation=0.3, cache=str(folder / "cache"))
    return Place(folder, model, data)


def updates(pairs: Pairs) -> dict[str, torch.Tensor]:
    return {layer: pair.strength * (pair.up.float() @ pair.down.float()) for layer, pair in pairs.items()}


def learned(folder: Path) -> Pairs:
    """An adapter as it is right on unquantized weights."""
    pairs, start = read_pairs(str(folder)), folder / "start.safetensors"
    return minus(pairs, read_pairs(str(start))) if start.is_file() else pairs


def check_trained(place: Place, row: Row, folder: Path) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    most = 1e9 if row["loss"] == "sigma_sqrt" else 100  # it divides by sigma^2, and sigma may be 1e-4
    assert len(losses) == 2 and all(0 < loss < most for loss in losses)
    before, after = (load_file(folder / f"checkpoints/step-00000{step}/adapter.safetensors") for step in (1, 2))
    assert before.keys() == after.keys()
    moved = [key for key in after if not torch.equal(before[key], after[key])]
    layers = [{re.split(r"\.(lora|lokr|hada|oft)_", key)[0] for key in keys} for keys in (moved, after)]
    assert moved and layers[0] == layers[1]
    # what a checkpoint cannot tell: the file, loaded into a transformer of this precision, is another velocity
    transformer = load_transformer(place.base(row), PRECISIONS[row["precision"]], CPU)
    given = inputs(transformer.dtype)
    with torch.no_grad():
        base = transformer(**given)[0].float()
        load_adapter(transformer, str(folder / "adapter"), "mine", place.base(row))
        found = transformer(**given)[0].float()
    assert found.isfinite().all() and 0 < (found - base).norm() < base.norm()
    names = {"adapter", "adapter-ema"} if row["beside"] == "average" else {"adapter"}
    assert {path.name for path in folder.glob("adapter*") if path.is_dir()} == names


def resume_row(place: Place, row: Row, folder: Path) -> None:
    whole = load_file(folder / "adapter" / FILE)
    for gone in ("adapter", "adapter-ema", "checkpoints/step-000002"):
        shutil.rmtree(folder / gone, ignore_errors=True)
    again = load_file(train(place.job(row, folder.name)) / FILE)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def compare_row(place: Place, row: Row, folder: Path) -> None:
    precisions = {name: PRECISIONS[name] for name in dict.fromkeys(("bf16", row["precision"]))}
    recovery = {row["precision"]: place.recovery(row["precision"])} if row["beside"] == "recovery" else {}
    done = compare(
        Compare(
            place.base(row),
            precisions,
            None,
            Trained(str(folder / "adapter"), "mine"),
            recovery,
            ["a grey ring"],
            sampling=Sampling(2, height=64, width=64),
            memory=MEMORY[row["memory"]].without_auto(),
            run=folder.name,
            device="cpu",
        )
    )
    rows = json.loads((done / "results.json").read_text())["rows"]
    expected = [(name, adapter) for name in precisions for adapter in (None, "mine")]
    assert [(one["precision"], one["adapter"]) for one in rows] == expected
    pictures = {Path(done / one["image"]).read_bytes() for one in rows}
    assert len(pictures) == len(rows)
    sizes = {one["precision"]: one["weights_bytes"] for one in rows if one["adapter"] is None}
    assert row["precision"] in ("bf16", "fp32") or sizes[row["precision"]] < sizes["bf16"]


def gap_row(place: Place, row: Row, folder: Path) -> None:
    precisions = {name: PRECISIONS[name] for name in dict.fromkeys(("bf16", row["precision"]))}
    chosen = Trained(str(folder / "adapter"), "mine")
    done = gap(
        Gap(
            place.base(row),
            precisions,
            None,
            chosen,
            place.data,
            memory=MEMORY[row["memory"]].without_auto(),
            levels=2,
            device="cpu",
            run=folder.name,
        )
    )
    rows = json.loads((done / "gap.json").read_text())["rows"]
    assert {(one["precision"], one["adapter"]) for one in rows} == set(product(precisions, (None, "mine")))
    assert all((one["error"] == 0) == (one["precision"] == "bf16") and 0 < one["loss"] < 100 for one in rows)


def transfer_row(place: Place, row: Row, folder: Path) -> None:
    """Each adapter where it was trained: as its own run measured it at its end, whatever ran before it."""
    job = place.job(row, f"{folder.name}-transfer")
    precisions = {name: PRECISIONS[name] for name in dict.fromkeys(("nf4", row["precision"]))}
    done = transfer(
        Transfer(
            job.model,
            precisions,
            job.adapter,
            place.data,
            flow=job.flow,
            memory=job.memory.without_auto(),
            optim=job.optim,
            sampling=Sampling(1, height=64, width=64),  # of the runs' previews
            seeds=[0, 1],
            steps=1,
            levels=2,
            run=job.run,
            device="cpu",
        )
    )
    rows = json.loads((done / "transfer.json").read_text())["rows"]
    assert len(rows) == 2 * len(precisions) ** 2
    for one in rows:
        if one["trained"] == one["run"]:
            own = done / f"{one['trained']}-{one['seed']}" / "metrics.jsonl"
            last = [json.loads(line) for line in own.read_text().splitlines() if "validation_loss" in line][-1]
            assert one["loss"] == pytest.approx(last["validation_loss"], rel=0.01)


def merge_row(place: Place, row: Row, folder: Path) -> None:
    """Each merged layer is W and what was learned, rounded as loading rounds an unquantized checkpoint."""
    precision, chosen = PRECISIONS[row["precision"]], Trained(str(folder / "adapter"))
    outs = {
        name: merge(Merge(place.base(row), own, chosen, str(folder / name), device="cpu"))
        for name, own in (("exact", Precision("fp32")), ("merged", precision))
    }
    exact, own = Originals(Model(str(outs["exact"]))), Originals(place.base(row))
    if row["adapter"] == "oft":  # as PEFT merges it
        for layer, parts in read_adapter(str(folder / "adapter")).layers.items():  # type: ignore[union-attr]
            turn, weight = parts["oft_R.weight"], own.weight(layer)
            module = OFTRotationModule(*turn.shape, weight.shape[1] // len(turn), weight.shape[1])
            module.weight.data = turn
            torch.testing.assert_close(
                exact.weight(layer), weight @ module.get_weight().T.detach(), rtol=1e-4, atol=1e-5
            )
    else:
        for layer, pair in learned(folder / "adapter").items():
            expected = merged(own.weight(layer), [(pair, 1.0)])
            torch.testing.assert_close(exact.weight(layer), expected, rtol=1e-5, atol=1e-6)
    once = load_transformer(Model(str(outs["exact"])), replace(precision, compute_dtype="bf16"), CPU)
    found = load_transformer(Model(str(outs["merged"])), precision, CPU)
    for name, layer in base_layers(found).items():
        assert kind_of(layer) == kind_asked(precision, name)
        torch.testing.assert_close(dequantized(layer), dequantized(base_layers(once)[name]))
    for out in outs.values():
        shutil.rmtree(out)


def save_row(place: Place, row: Row, folder: Path) -> None:
    precision = PRECISIONS[row["precision"]]
    out = save(Save(place.base(row), precision, str(folder / "saved"), "cpu"))
    found, first = (load_transformer(model, precision, CPU) for model in (Model(str(out)), place.base(row)))
    for name, layer in base_layers(first).items():
        assert torch.equal(dequantized(layer), dequantized(base_layers(found)[name])), name
    shutil.rmtree(out)


def convert_row(place: Place, row: Row, folder: Path) -> None:
    """What it has learned, in every format that holds it."""
    if row["adapter"] == "oft":
        for form in FORMATS:
            with pytest.raises(ValueError, match="is OFT"):
                convert(
                    Convert(
                        Source(str(folder / "adapter")),
                        form,
                        str(folder / ("none" if form == "peft" else "none.safetensors")),
                    )
                )
        return
    expected = learned(folder / "adapter")
    for form in FORMATS:
        out = folder / (form if form == "peft" else f"{form}.safetensors")
        options = Convert(Source(str(folder / "adapter")), form, str(out))
        # kohya's names hold the layers of a fused one together, and to_v is not adapted here
        if row["adapter"] == "dora" and form in ("kohya", "comfyui", "ai-toolkit"):
            with pytest.raises(ValueError, match=r"hold no DoRA|magnitude of its rows is not known"):
                convert(options)
            continue
        found = read_pairs(str(convert(options)))
        assert found.keys() == expected.keys()
        for layer, update in updates(expected).items():
            torch.testing.assert_close(updates(found)[layer], update, rtol=1e-3, atol=1e-5)


def recover_row(place: Place, row: Row, folder: Path) -> None:
    """A recovery adapter belongs to the precision that it was made for, and the row's adapter runs beside it."""
    precision, run = PRECISIONS[row["precision"]], f"{folder.name}-recovery"
    sampling = Sampling(1, height=64, width=64)
    made = recover(
        Recover(place.base(row), precision, sampling, ["a ring"], ["a star"], rows=32, most=4, run=run, device="cpu")
    )
    figures = json.loads((made.parent / "recovery.json").read_text())
    assert 0 < figures["share"] <= 0.05 and figures["relative_velocity_error_after"] > 0
    kind = "lora" if row["adapter"] in OTHERS else row["adapter"]
    beside = place.job(row | {"adapter": kind, "origin": "default", "beside": "nothing"}, f"{folder.name}-beside")
    train(replace(beside, adapter=replace(beside.adapter, recovery=str(made)), steps=1))
    for other in PRECISIONS.keys() - {row["precision"], "llm_int8", "int8"}:
        with pytest.raises(ValueError, match="was made for"):
            train(
                replace(
                    beside, precision=PRECISIONS[other], adapter=replace(beside.adapter, recovery=str(made)), run="x"
                )
            )


COMMANDS: dict[str, Callable[[Place, Row, Path], None]] = {
    "resume": resume_row,
    "compare": compare_row,
    "gap": gap_row,
    "transfer": transfer_row,
    "merge": merge_row,
    "save": save_row,
    "convert": convert_row,
    "recover": recover_row,
}


def run_row(place: Place, row: Row, run: str) -> None:
    shutil.rmtree("runs", ignore_errors=True)
    folder = train(place.job(row, run)).parent
    check_trained(place, row, folder)
    if row["command"] in COMMANDS:
        COMMANDS[row["command"]](place, row, folder)


def name_of(row: Row) -> str:
    return "-".join(row.values())


# here each command with a few rows; among the slow tests, with every value of every factor
COSTS = {"transfer": 3, "recover": 3}  # rows of other commands that one of these counts as: they train several adapters
TRAINING = {name: values for name, values in MAIN.items() if name != "command"}
FEW = [row | {"command": "train"} for row in covering(TRAINING, allowed)]
for turn, row in enumerate(FEW):
    possible = [name for name in FACTORS["command"] if allowed(row | {"command": name})]
    cost = {name: sum(one["command"] == name for one in FEW[:turn]) * COSTS.get(name, 1) for name in possible}
    row["command"] = min(possible, key=lambda name: (cost[name], name))
# OFT cannot be read as LoRA's pairs, as most LoKr can, and its adapters are told apart from the run's memory settings
one = next(row for row in FEW if row["command"] == "transfer")
other = next(
    row
    for row in FEW
    if row["adapter"] == "oft" and row["memory"] != "plain" and allowed(one | {"command": row["command"]})
)
one["command"], other["command"] = other["command"], one["command"]
PARTS = 24


@cache
def many() -> list[Row]:
    return covering(FACTORS, allowed)


def check_covered(factors: dict[str, list[str]], rows: list[Row]) -> None:
    """Counted apart from the algorithm that made them."""
    assert all(allowed(row) and row.keys() == FACTORS.keys() for row in rows)
    for a, b in combinations(factors, 2):
        for x, y in product(factors[a], factors[b]):
            together = any(row[a] == x and row[b] == y for row in rows)
            assert together == allowed({a: x, b: y}), (a, x, b, y)


def test_every_main_pair_is_in_a_row() -> None:
    check_covered(TRAINING, FEW)
    assert {row["command"] for row in FEW} == set(FACTORS["command"])


@pytest.mark.parametrize("row", FEW, ids=name_of)
def test_main_pairs_work(row: Row, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    run_row(place, row, "main")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_all_pairs_work(part: int, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    check_covered(FACTORS, many())
    for row in many()[part::PARTS]:
        try:
            run_row(place, row, "all")
        except BaseException as error:
            error.add_note(name_of(row))
            raise


# pairs, and values that go with nothing here, that are refused before anything is loaded
ALONE: list[tuple[dict[str, Any], str]] = [
    ({"memory": Memory(budget_gib=8)}, "memory.budget_gib bounds a GPU's memory, but the device is cpu"),
    ({"memory": Memory(graph=True)}, "memory.graph=true captures CUDA steps, but the device is cpu"),
    ({"precision": Precision("nf4", layers={"no_such_layer": "int8"})}, "precision.layers names 'no_such_layer', but"),
    ({"precision": Precision("nf4", skip_modules=["nope"])}, "precision.skip_modules names 'nope', but no linear"),
    ({"adapter": Adapter(targets="nope")}, "adapter.targets 'nope' matches no linear layer"),
    ({"adapter": Adapter(targets="all", init="residual"), "model": "saved"}, "is quantized itself; give the unquant"),
    ({"model": "saved", "precision": Precision("int8")}, "is stored as nf4, and int8 is asked for; set precision=nf4"),
    ({"model": "saved", "precision": Precision("nf4", t5="bf16")}, "text_encoder_2 of .* is stored as nf4, and bf16"),
    ({"model": "saved", "precision": Precision("nf4", layers={"proj_out": "bf16"})}, "and a mixture of kinds is asked"),
    ({"model": "saved", "precision": Precision("nf4", double_quant=True)}, "precision.double_quant asks for True; set"),
    ({"model": "schnell", "flow": Flow(guidance=3.0)}, "flow.guidance is 3, which has no effect .*no guidance emb"),
    ({"model": "schnell", "sampling": Sampling(guidance=2.0)}, "sampling.guidance is 2, .*leave it at null"),
    ({"model": "schnell", "flow": Flow("shifted")}, "that of .* does not shift its noise levels; set flow.density=log"),
    ({"model": "static", "flow": Flow("shifted")}, "shifts by 3 whatever the picture's size"),
    ({"model": "curved", "flow": Flow("shifted")}, "has .*max_shift=1.5.*; set flow.density=logit_normal"),
    ({"keep_best": 1, "validation": 0}, "keep_best is 1, which has no effect: data.validation=0 holds no pictures out"),
    ({"validation_levels": 4, "validation": 0}, "validation_levels is 4, which has no effect"),
    ({"data": {"caption_column": "words"}}, "data.caption_column is words, .*no source is a table or has a metadata"),
    ({"preserve": Preserve("class", "ring")}, r"preserve.kind is class, but data.trigger is null"),
    ({"preserve": Preserve("class", "rong"), "data": {"trigger": "sks"}}, "preserve.word is 'rong', which no caption"),
    ({"data": {"image_column": "picture"}}, "data.image_column is picture, .*no source is a table"),
]


@pytest.fixture(scope="module")
def models(place: Place) -> dict[str, str]:
    """The bundled model with other configs, by links: quantized, without guidance, with other samplers."""
    found = {}
    schedulers = {
        "schnell": {"use_dynamic_shifting": False, "shift": 1.0},
        "static": {"use_dynamic_shifting": False},
        "curved": {"max_shift": 1.5},
        "saved": {},
    }
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
              "bnb_4bit_use_double_quant": False, "bnb_4bit_compute_dtype": "bfloat16"}  # fmt: skip
    for name, scheduler in schedulers.items():
        changed: dict[str, dict[str, Any]] = {"scheduler/scheduler_config.json": scheduler}
        if name == "schnell":
            changed["transformer/config.json"] = {"guidance_embeds": False}
        if name == "saved":
            changed |= {f"{part}/config.json": {"quantization_config": stored}
                        for part in ("transformer", "text_encoder_2")}  # fmt: skip
        for file in Path(place.model.path).rglob("*"):
            own = str(file.relative_to(place.model.path))
            target = place.folder / name / own
            target.parent.mkdir(parents=True, exist_ok=True)
            if own in changed:
                target.write_text(json.dumps(json.loads(file.read_text()) | changed[own]))
            elif file.is_file():
                target.symlink_to(file)
        found[name] = str(place.folder / name)
    return found


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be loaded: no weights, and no picture is decoded."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        pytest.fail("something is loaded before it is refused")

    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    for kind in (AutoencoderKL, FluxTransformer2DModel, CLIPTextModel, T5EncoderModel):
        monkeypatch.setattr(kind, "from_pretrained", refuse)
    monkeypatch.setattr("train.loop.load.build", refuse)
    monkeypatch.setattr("train.loop.load.prior_samples", refuse)


WORKS = {
    "adapter": "lora", "base": "folder", "data": "plain", "origin": "default",
    "precision": "nf4", "memory": "balanced", "optimizer": "adamw",
    "beside": "nothing", "flow": "logit_normal", "loss": "mse", "repeats": "whenever",
    "command": "train",
}  # fmt: skip


def test_refused_pairs_are_refused_before_anything_is_loaded(
    place: Place, sealed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each pair of the table, with options beside it that work."""
    monkeypatch.chdir(place.folder)
    for a, values, b, others, said in REFUSED:
        for x, y in product(values, others):
            row = WORKS | {a: x, b: y}
            with pytest.raises(ValueError, match=said):
                job = place.job(row, "refused")
                chosen = Trained(str(place.folder / "plain"))
                if row["command"] == "merge":
                    merge(Merge(place.model, job.precision, chosen, "merged", device="cpu"))
                elif row["command"] == "save":
                    save(Save(place.model, job.precision, "saved-as", "cpu"))
                elif row["command"] == "recover":
                    recover(Recover(place.model, job.precision, prompts=["a"], held_out=["b"], device="cpu"))
                elif row["command"] == "transfer":
                    Transfer(place.model, {"nf4": job.precision}, job.adapter, place.data)
                else:
                    train(job)


@pytest.mark.parametrize(("changes", "said"), ALONE, ids=[said[:40] for _, said in ALONE])
def test_what_goes_with_nothing_is_refused_before_anything_is_loaded(
    changes: dict[str, Any], said: str, place: Place, models: dict[str, str], sealed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(place.folder)
    given = dict(changes)
    data = replace(place.data, validation=given.pop("validation", place.data.validation), **given.pop("data", {}))
    model = Model(models[given.pop("model")]) if "model" in given else place.model
    job = replace(place.job(WORKS, "refused"), model=model, data=data)
    with pytest.raises(ValueError, match=said):
        train(replace(job, **({"validation_levels": 8} | given)))


def test_adapters_that_cannot_run_together_are_refused_before_anything_is_loaded(
    place: Place, sealed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.folder)
    mixture, nf4 = PRECISIONS["mixture"], PRECISIONS["nf4"]
    options = Compare(place.model, {"nf4": nf4}, prompts=["a"], run="refused", device="cpu")
    recovery = {"nf4": place.recovery("nf4")}
    (place.folder / "loose").mkdir(exist_ok=True)
    shutil.copy(place.folder / "loftq" / FILE, place.folder / "loose")
    other = {"precisions": {"mixed": mixture}, "recovery": {"mixed": place.recovery("nf4")}}
    for changes, said in (
        ({"recovery": {"nf4": place.recovery("fp4")}}, "was made for kind=fp4, not nf4"),
        (other, "was made for another mixture: "),
        ({"recovery": {"nf4": place.recovery("double")}}, "was made for double_quant=True, not False"),
        ({"recovery": {"nf4": str(place.folder / "plain")}}, "is no recovery adapter"),
        ({"memory": Memory(compile=True), "adapter": Trained(str(place.folder / "dora")), "recovery": recovery},
         "memory.compile=True needs the fast path, but DoRA beside another adapter; set memory.compile=null"),
        ({"memory": Memory(graph=True)}, "memory.graph=true captures CUDA steps"),
        ({"adapter": Trained(place.recovery("nf4"))}, "is a recovery adapter, which belongs to quantized weights"),
        ({"adapter": Trained(str(place.folder / "loose"))}, "needs start.safetensors beside it"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            compare(replace(options, **changes))
    dora = Trained(str(place.folder / "dora"))
    split = {"nf4": replace(nf4, layers={r".*\.to_q": "int8"}), "bf16": Precision("bf16")}
    with pytest.raises(ValueError, match=r"needs the fast path, but .*\.to_q, to_k, to_v read one"):
        gap(Gap(place.model, split, None, dora, place.data, memory=Memory(compile=True), device="cpu"))
    with pytest.raises(ValueError, match=r"at precisions\.bf16: adapter\.init=loftq starts from a"):
        transfer(
            Transfer(
                place.model,
                {"nf4": nf4, "bf16": Precision("bf16")},
                Adapter(init="loftq"),
                place.data,
                seeds=[0, 1],
                run="refused",
                device="cpu",
            )
        )
