"""Every shipped YAML file through Hydra, and every wrong value through the message that it gives."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.choosing.settings import Choose
from infer.comparison.settings import Compare
from infer.convert import Convert
from infer.drawing.settings import Draw
from infer.fast.install import Memory
from infer.merging.settings import Merge
from infer.program.paths import ROOT
from infer.program.run_names import check_file_names, check_run_name
from infer.quantize.precision import KINDS, Precision
from infer.resident.settings import Serve
from infer.rounding.settings import Recover, Sensitivity
from infer.sample.generate import Sampling
from infer.save import Save
from infer.score.networks import Networks
from train.cache import Fill
from train.data.dataset import Data
from train.estimate.memory import footprint
from train.estimate.plan import Plan
from train.gap import Gap
from train.latents.settings import Encode
from train.look import Look
from train.objective.flow_matching import Flow
from train.objective.optim import Optim
from train.objective.preservation import Preserve
from train.run.config import Train
from train.run.sweep import Sweep
from train.state.identity import record_config
from train.trackers.options import Track
from train.trackers.tracker import SendComparison
from train.transfer import Transfer
from train.watch.settings import Page
from train.write_captions import WriteCaptions

CONFIGS = ROOT / "configs"
ROOTS: dict[str, Any] = {
    "train": Train,
    "cache": Fill,
    "look": Look,
    "write_captions": WriteCaptions,
    "choose": Choose,
    "compare": Compare,
    "draw": Draw,
    "serve": Serve,
    "save": Save,
    "convert": Convert,
    "merge": Merge,
    "recover": Recover,
    "page": Page,
    "plan": Plan,
    "track": SendComparison,
    "gap": Gap,
    "sensitivity": Sensitivity,
    "transfer": Transfer,
}
SEVERAL = ("compare", "gap", "transfer")  # roots with several precisions
GROUPS: dict[str, Any] = {
    "adapter": Adapter,
    "data": Data,
    "encode": Encode,
    "flow": Flow,
    "memory": Memory,
    "model": Model,
    "networks": Networks,
    "optim": Optim,
    "precision": Precision,
    "preserve": Preserve,
    "sampling": Sampling,
    "sweep": Sweep,
    "track": Track,
}
FILES = [(file.parent.name, file.stem) for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
ACCELERATE = sorted((CONFIGS / "accelerate").glob("*.yaml"))
PLUGINS = sorted((CONFIGS / "hydra").glob("*/*.yaml"))


def groups_of(root: str) -> set[str]:
    """What a root's defaults list names."""
    parts = yaml.safe_load((CONFIGS / f"{root}.yaml").read_text())["defaults"]
    return {key for part in parts if isinstance(part, dict) for key in part}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    for name, schema in ROOTS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@cache
def composed(root: str, *choices: str) -> DictConfig:
    return compose(root, list(choices))


def made(root: str, *overrides: str) -> Any:
    """The settings of a command line. Composing costs most: values are put into what was composed for these files, as
    Hydra itself does after composing."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [one for one in parsed if one.package or (CONFIGS / one.key_or_group).is_dir()]
    config = deepcopy(composed(root, *(str(one.input_line) for one in choices)))
    ConfigLoaderImpl._apply_overrides_to_config([one for one in parsed if one not in choices], config)
    options = OmegaConf.to_object(config)
    assert type(options) is ROOTS[root]
    return options


def read(group: str, name: str) -> dict[str, Any]:
    text = (CONFIGS / group / f"{name}.yaml").read_text().replace("${root:}", str(ROOT))
    values: dict[str, Any] = yaml.safe_load(text)
    return {
        key: value
        for part in values.pop("defaults", ["_self_"])
        for key, value in (values if part == "_self_" else read(group, part)).items()
    }


def rows_of(root: str) -> Iterator[dict[str, str]]:
    """The files of all groups that a root has, one of each group a row: composing costs most, and they do not meet."""
    named = groups_of(root)
    columns: dict[str, list[str]] = {}
    for group, name in FILES:
        if {group, f"{group}@precisions.nf4"} & named:
            columns.setdefault(group, []).append(name)
    for i in range(max(map(len, columns.values()), default=0)):
        yield {group: names[i] for group, names in columns.items() if i < len(names)}


COMPOSED = [(root, row) for root in ROOTS for row in rows_of(root)]


def test_every_shipped_file_is_tested() -> None:
    tested = {Path(f"{root}.yaml") for root in ROOTS}
    tested |= {Path(group, f"{name}.yaml") for _, row in COMPOSED for group, name in row.items()}
    tested |= {Path("experiment", f"{name}.yaml") for name in EXPERIMENTS}
    tested |= {file.relative_to(CONFIGS) for file in (*ACCELERATE, *PLUGINS)}
    tested.add(Path("wandb/sweep.yaml"))  # tests/train/trackers/test_track.py: W&B's own agent starts it
    assert {path.relative_to(CONFIGS) for path in CONFIGS.rglob("*") if path.is_file()} == tested


@pytest.mark.parametrize("root, row", COMPOSED, ids=lambda one: one if isinstance(one, str) else "-".join(one.values()))
def test_every_file_becomes_its_dataclass(root: str, row: dict[str, str]) -> None:
    own = {"precision": "+precision@precisions.own"} if root in SEVERAL else {}
    options, plain = made(root, *(f"{own.get(group, group)}={name}" for group, name in row.items())), made(root)
    for group, name in row.items():
        if group in own:
            chosen = options.precisions["own"]
            assert {**options.precisions, "own": None} == {**plain.precisions, "own": None}
            replace(plain, precisions=options.precisions)  # alone, beside the defaults, nothing refuses it either
        else:
            chosen = getattr(options, group)
            replace(plain, **{group: chosen})
        assert type(chosen) is GROUPS[group]
        assert asdict(chosen) == asdict(GROUPS[group]()) | read(group, name), (group, name)


@pytest.mark.parametrize("group, name", FILES)
def test_groups_say_every_field(group: str, name: str) -> None:
    assert read(group, name).keys() == {field.name for field in fields(GROUPS[group])}


@pytest.mark.parametrize("root", ROOTS)
def test_roots_say_every_field(root: str) -> None:
    own = yaml.safe_load((CONFIGS / f"{root}.yaml").read_text()).keys() - {"defaults", "hydra"}
    grouped = {key.split("@")[-1].split(".")[0] for key in groups_of(root)} & {*GROUPS, "precisions"}
    assert own | grouped == {field.name for field in fields(ROOTS[root])}


def differences(a: Any, b: Any, name: str = "") -> set[str]:
    if not is_dataclass(a):
        return set() if a == b else {name}
    return {
        d for f in fields(a) for d in differences(getattr(a, f.name), getattr(b, f.name), f"{name}.{f.name}".strip("."))
    }


def test_defaults_are_said_the_same_in_yaml_and_python() -> None:
    # the model is found from anywhere, not from the repository's root alone; auto asks the card of a run
    assert differences(made("train"), Train()) == {"model.path", "memory.keep"}
    assert not differences(made("convert"), Convert())
    recovery = made("recover")
    others = Recover(prompts=recovery.prompts, held_out=recovery.held_out, sampling=Sampling(steps=8))
    assert differences(recovery, others) == {"model.path"}
    assert differences(made("plan"), Plan()) == {"model.path", "memory.keep"}
    for root in ("cache", "draw", "look", "save", "merge", "sensitivity"):
        assert differences(made(root), ROOTS[root]()) == {"model.path"}
    assert made("track") == SendComparison(Track("wandb"))
    precisions = {name: Precision(name) for name in ("bf16", "int8", "fp4", "nf4")}
    for root in SEVERAL:
        assert made(root).precisions == precisions
    comparison = made("compare")
    drawn = Compare(precisions=precisions, prompts=comparison.prompts)
    assert differences(comparison, drawn) == {"model.path"}
    assert differences(made("gap"), Gap(precisions=precisions)) == {"model.path"}
    assert differences(made("transfer"), Transfer(precisions=precisions)) == {"model.path"}
    assert [Precision(kind).kind for kind in KINDS] == [made("train", f"precision={k}").precision.kind for k in KINDS]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments(name: str) -> None:
    root = next((root for root in ("compare", "transfer") if name.endswith(f"_{root}")), "train")
    options = made(root, f"experiment={name}")
    text = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text())

    def holds(part: Any, wanted: Any) -> None:
        for key, value in wanted.items():
            there = part[key] if isinstance(part, dict) else getattr(part, key)
            if isinstance(value, dict):
                holds(there, value)
            elif value and isinstance(value, list) and isinstance(value[0], dict):
                for entry, own in zip(there, value, strict=True):
                    holds(entry, own)
            else:
                assert there == (float(value) if isinstance(there, float) else value)

    holds(options, {key: value for key, value in text.items() if key not in ("defaults", "hydra")})
    assert made(root, f"experiment={name}", "run=x").run == "x"


@pytest.mark.parametrize("subject", ["person", "style", "object", "concept"])
def test_a_subject_goes_with_a_card(subject: str) -> None:
    alone, card = made("train", f"experiment={subject}"), made("train", "experiment=dev_12gb")
    for both in (made("train", f"experiment=[{names}]") for names in (f"{subject},dev_12gb", f"dev_12gb,{subject}")):
        assert (both.preserve, both.steps, both.ema) == (alone.preserve, alone.steps, alone.ema)
        for name in ("model", "precision", "memory", "accumulation"):
            assert getattr(both, name) == getattr(card, name)
        assert (both.optim.name, both.data.resolution) == (card.optim.name, card.data.resolution)


@pytest.mark.parametrize("file", PLUGINS, ids=lambda file: file.stem)
def test_launchers_and_sweepers_are_made(file: Path) -> None:
    if file.stem == "ray":
        pytest.importorskip("ray")
    kind = file.parent.name
    config = compose("train", [f"hydra/{kind}={file.stem}"], return_hydra_config=True)
    context = HydraContext(config_loader=GlobalHydra.instance().config_loader(), callbacks=Callbacks())
    make = getattr(Plugins.instance(), f"instantiate_{kind}")
    made = make(config=config, hydra_context=context, task_function=lambda config: None)
    assert f"{type(made).__module__}.{type(made).__name__}" == config.hydra[kind]["_target_"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("dev_")])
def test_experiments_for_a_card_fit_it(name: str) -> None:
    gigabytes = 16 if name == "dev_t4" else int(name.removeprefix("dev_").removesuffix("gb"))
    assert footprint(made("train", f"experiment={name}")).peak < 0.95 * gigabytes * 10**9


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file: Path) -> None:
    config = load_config_from_file(str(file))
    assert config.mixed_precision == "no"  # the loop casts by itself
    kinds = {
        "cpu": ("NO", 1, True),
        "one_gpu": ("NO", 1, False),
        "ddp": ("MULTI_GPU", 2, False),
        "fsdp2": ("FSDP", 2, False),
        "two_nodes": ("MULTI_GPU", 16, False),
        "zero2": ("DEEPSPEED", 2, False),
    }
    assert (config.distributed_type.value, config.num_processes, config.use_cpu) == kinds[file.stem]


WRONG = [
    ("train", "precision.kind=nf5", "precision.kind is 'nf5'; choose one of .*nf4"),
    ("train", "precision.t5=nf5", "precision.t5 is 'nf5'; choose same or"),
    ("train", "precision.compute_dtype=half", "precision.compute_dtype is 'half'; choose one of bf16"),
    (
        "train",
        "precision=int8 precision.compute_dtype=fp16 precision.llm_int8=true",
        "llm_int8=true multiplies gradients in fp16.*set precision.llm_int8=false",
    ),
    ("train", "precision.products=int4", "precision.products is 'int4'; choose one of bf16, fp8, int8"),
    (
        "train",
        "precision=fp32 precision.products=fp8",
        "products=fp8 takes the place of products in bf16, not of .*fp32",
    ),
    ("gap", "precisions.nf4.products=fp8 precisions.nf4.compute_dtype=fp16", "products in bf16, not of those in fp16"),
    (
        "train",
        "precision=int8 precision.products=int8 precision.llm_int8=true",
        "precision.products=int8 and precision.llm_int8=true are two ways to multiply; set precision.llm_int8=false",
    ),
    ("gap", "precisions.bf16.products=fp8", "int8, fp4, nf4 are all quantized or multiply in 8 bits; add bf16"),
    ("train", "precision.outlier_threshold=-1", "precision.outlier_threshold is -1.0; it must be 0 or more"),
    ("train", "precision.kind=auto", "precision.budget_gib is null; kind auto needs the transformer's bytes"),
    ("train", "precision=auto precision.budget_gib=0", "precision.budget_gib is 0.0; it must be above 0"),
    ("train", "precision.budget_gib=8", "precision.budget_gib belongs to kind auto, not nf4; set precision.kind=auto"),
    ("train", "precision=auto +precision.layers={proj_out:int8}", "precision.layers cannot be mixed with kind auto"),
    ("train", "precision=fp32 +precision.layers={proj_out:int8}", "precision.layers cannot be mixed with kind fp32"),
    ("train", "+precision.layers={proj_out:fp32}", "precision.layers gives 'proj_out' the kind 'fp32'; choose bf16"),
    ("train", r"+precision.layers={\(:bf16}", r"precision.layers names '\(', no regular expression"),
    ("train", "precision.llm_int8=true", "precision.llm_int8 is a way to multiply int8 weights, not nf4"),
    ("train", "adapter.rank=0", "adapter.rank is 0; it must be 1 or more"),
    ("train", "adapter.alpha=0", "adapter.alpha is 0.0; it must be above 0"),
    ("train", "adapter.alpha=nan", "adapter.alpha is nan; it must be above 0"),
    ("train", "adapter.dropout=1", "adapter.dropout is 1.0; it must be .*below 1"),
    ("train", "adapter.init=zero", "adapter.init is 'zero'; choose one of default"),
    (
        "train",
        "adapter.init=gaussian adapter.start=x",
        "adapter.init is gaussian and adapter.start is given; choose one",
    ),
    ("train", "adapter.init=loftq adapter=dora", "adapter.init=loftq is not made for adapter.dora"),
    ("train", "adapter.init=residual adapter.recovery=x", "adapter.init=residual is not made for adapter.recovery"),
    ("train", "adapter.kind=lora2", "adapter.kind is 'lora2'; choose one of lora, lokr, loha, oft"),
    ("train", "adapter=lokr adapter.dropout=0.1", "adapter.dropout is 0.1, which has no effect: .*belongs to LoRA"),
    ("train", "adapter=loha adapter.rslora=true", "adapter.rslora is true, .*adapter.kind is loha"),
    ("train", "adapter=oft adapter.init=loftq", "adapter.init is loftq, .*leave it at default"),
    ("train", "adapter=oft adapter.rank=4", "adapter.rank is 4, .*oft, whose size is adapter.block; leave it at 16"),
    (
        "train",
        "adapter=lokr adapter.recovery=x",
        "adapter.recovery is 'x', .*PEFT has no LoRA beside adapter.kind=lokr",
    ),
    ("train", "adapter.factor=4", "adapter.factor is 4, .*it belongs to lokr; leave it at 16"),
    ("train", "adapter=loha adapter.block=8", "adapter.block is 8, .*it belongs to oft"),
    ("train", "adapter=lokr adapter.factor=0", "adapter.factor is 0; it must be 1 or more, or -1"),
    ("train", "adapter=oft adapter.block=1", "adapter.block is 1; it must be 2 or more"),
    ("train", "stop.loss=-1", "stop.loss is -1; it must be 0"),
    ("train", "stop.copying=0", "stop.copying is 0.0; it must be above 0, or null"),
    ("train", "stop.copying=2", "stop.copying is 2.0; it must be 1 or less"),
    ("train", "stop.drift=0.2", "stop.drift is 0.2, .*scores_every is 0, so that nothing is scored; leave it at null"),
    ("train", "scores_every=5 previews=[]", "previews=.. leaves no prompts to draw"),
    ("train", "adapter.init=orthogonal adapter.rank=5", "adapter.rank is 5; orthogonal .*even"),
    ("train", "adapter.targets='attn(['", r"adapter.targets 'attn\(\[' is neither a preset \(attention.*expression"),
    (
        "train",
        "precision=int8 precision.double_quant=true",
        "precision.double_quant is true, which has no effect: .*no",
    ),
    ("train", "precision=bf16 precision.double_quant=true", "double_quant is true, .*; leave it at false"),
    ("train", "precision.outlier_threshold=5", "outlier_threshold is 5.0, .*nothing is multiplied by LLM.int8"),
    ("train", "precision=bf16 precision.skip_modules=[proj_out]", "skip_modules is .* no layer .* is quantized"),
    ("train", "precision=bf16 precision.compute_dtype=fp32", "compute_dtype is fp32, .*bf16 is its own compute dtype"),
    ("train", "flow.density=uniform flow.logit_mean=1", "flow.logit_mean is 1.0, .*uniform draws no .*leave it at 0.0"),
    ("train", "flow.density=uniform flow.logit_std=2", "flow.logit_std is 2.0, which has no effect"),
    ("train", "data.least=0.4", "data.least is 0.4, .*data.on_error=raise skips nothing; leave it at 0.5"),
    ("train", "data.prior.path=a data.prior.steps=3", "data.prior.steps is 3, .*draws no pictures"),
    ("gap", "flow.density=uniform", "flow.density is uniform, .*gap measures at evenly spaced noise levels"),
    ("gap", "memory.graph=true", "memory.graph is true, .*gap captures nothing"),
    ("transfer", "adapter.recovery=x", "adapter.recovery is 'x', which belongs to one precision"),
    ("compare", "unrelated=[a]", "unrelated is .*adapter.path is null"),
    ("compare", "adapter.weight=0.5", "adapter.weight is 0.5, which has no effect: adapter.path is null"),
    ("compare", "adapter.name=mine", "adapter.name is mine, which has no effect"),
    ("compare", "+recovery.nf4=x only=[bf16]", "recovery names 'nf4', which only=.* leaves out"),
    ("recover", "rate=1e-3", "rate is 0.001, .*polish, which is 0 steps; leave it at 0.0001"),
    ("train", "preserve.kind=klass", "preserve.kind is 'klass'; choose one of none, class, empty"),
    ("train", "preserve=class preserve.weight=0", "preserve.weight is 0.0; it must be above 0"),
    ("train", "preserve.weight=2", "preserve.weight is 2.0, which has no effect: preserve.kind=none preserves nothing"),
    ("train", "preserve=empty preserve.word=dog", "preserve.word is dog, which has no effect: preserve.kind=empty"),
    ("compare", "class_prompts=[a]", "class_prompts is .*adapter.path is null"),
    ("compare", "adapter.path=x class_prompts=[a] unrelated=[a]", "'a' is among unrelated and among class_prompts"),
    ("train", "flow.density=normal", "flow.density is 'normal'; choose one of uniform"),
    ("train", "flow.density=mode flow.logit_std=2", "flow.logit_std is 2.0, which has no effect"),
    ("train", "flow.loss=l3", "flow.loss is 'l3'; choose one of mse, huber"),
    ("train", "flow.loss=huber flow.loss_schedule=linear", "flow.loss_schedule is 'linear'; choose one of constant"),
    ("train", "flow.loss=huber flow.loss_scale=0", "flow.loss_scale is 0.0; it must be above 0"),
    ("train", "flow.loss=huber flow.loss_scale=2 flow.loss_schedule=exponential", "flow.loss_scale is 2.0; with"),
    ("train", "flow.loss_scale=0.2", "flow.loss_scale is 0.2, which has no effect: flow.loss=mse has no scale"),
    ("train", "flow.min_snr_gamma=3", "flow.min_snr_gamma is 3.0, which has no effect: flow.weighting=none"),
    ("train", "flow.weighting=all", "flow.weighting is 'all'; choose one of none"),
    ("train", "flow.logit_std=0", "flow.logit_std is 0.0; it must be above 0"),
    ("train", "optim.name=sgd", "optim.name is 'sgd'; choose one of adamw"),
    ("train", "optim.schedule=step", "optim.schedule is 'step'; choose one of constant"),
    ("train", "optim.lr=0", "optim.lr is 0.0; it must be above 0"),
    ("train", "optim.warmup=-1", "optim.warmup is -1; it must be 0 or more"),
    ("train", "optim.clip=-0.5", "optim.clip is -0.5; it must be 0 or more"),
    ("train", "data.resolution=100", "data.resolution is 100; .*multiples of 16, such as 96"),
    ("train", "data.resolution=0", "data.resolution is 0; .*multiples of 16, such as 16"),
    ("train", "data.batch_size=0", "data.batch_size is 0; it must be 1 or more"),
    ("train", "data.validation=1", "data.validation is 1.0; .*below 1"),
    ("train", "data.resolution=[]", r"data.resolution is \[\]; give a number, or several"),
    ("train", "data.resolution=big", "data.resolution is 'big'; give a number, or several"),
    ("train", "data.resolution=512.5", "data.resolution is 512.5; give a number, or several"),
    ("train", "data.resolution=[512,100]", r"data.resolution is \[512, 100\]; .*multiples of 16, such as 96"),
    ("train", "data.resolution=[512,512]", r"data.resolution is \[512, 512\]; name each once"),
    ("train", "data.path=a data.sources=[{path:b}]", "data.path and data.sources are both given; put the path among"),
    ("train", "data.sources=[{}]", "a source has no path; set it"),
    ("train", "data.sources=[{path:b,repeats:0}]", "repeats of b is 0.0; it must be above 0"),
    ("train", "data.sources=[{path:b,weight:-1}]", "weight of b is -1.0; it must be above 0"),
    ("train", "data.sources=[{path:b,caption:''}]", "caption of b is empty; write one, or set it to null"),
    ("train", "data.masks=m", "data.masks belongs to data.path; give each of data.sources its own"),
    ("train", "data.prior.count=-1", "data.prior.count is -1; it must be 0"),
    ("train", "data.prior.count=3", "data.prior.prompt is empty; say what the base draws"),
    ("train", "data.prior.prompt=dog", "data.prior.prompt is set, but there are no pictures; give data.prior.path, or"),
    ("train", "data.prior.count=3 data.prior.path=a", "data.prior has both a path and a count"),
    ("train", "data.prior.weight=0 data.prior.path=a", "data.prior.weight is 0.0; it must be above 0"),
    ("train", "data.prior.ratio=0 data.prior.path=a", "data.prior.ratio is 0.0; it must be above 0"),
    ("train", "data.prior.steps=0 data.prior.path=a", "data.prior.steps is 0; it must be 1 or more"),
    ("train", "data.background=blank", "data.background is 'blank'; give a name such as white, or #rrggbb"),
    ("train", "data.most_pixels=0", "data.most_pixels is 0; it must be from 1 to Pillow's own 178956970"),
    ("train", "data.aspect=0.5", r"data.aspect is 0.5; it must be 1 \(squares\) or more"),
    ("train", "data.bucket_step=24", "data.bucket_step is 24; it must be a multiple of 16 up to the resolution"),
    ("train", "data.bucket_step=64 data.resolution=48", "data.bucket_step is 64; it must be a multiple of 16"),
    ("train", "data.crops=0", "data.crops is 0; it must be 1 or more"),
    ("train", "data.tag_orders=0", "data.tag_orders is 0; it must be 1 or more"),
    ("train", "data.keep_tags=2", "data.keep_tags is 2, but tags stay as written; set data.tag_orders too"),
    ("train", "data.caption_dropout=1", "data.caption_dropout is 1.0; .*below 1"),
    ("train", "data.on_error=ignore", "data.on_error is 'ignore'; choose one of raise, skip"),
    ("train", "data.least=2", "data.least is 2.0; it is a share, from 0 to 1"),
    ("train", "data.text_length=0", "data.text_length is 0; it must be 1 or more, or null"),
    ("train", "track.kind=csv", "track.kind is 'csv'; choose one of none, wandb, tensorboard"),
    ("train", "sweep.objectives.seconds=least", "sweep.objectives.seconds is 'least'; choose one of minimize"),
    ("train", "sweep.gpus=[]", r"sweep.gpus is \[\]; name GPUs as in \[0,1\], or set it to null"),
    ("train", "track.mode=on", "track.mode is 'on'; choose one of auto"),
    ("train", "sampling.steps=0", "sampling.steps is 0; it must be 1 or more"),
    ("train", "sampling.height=250", "sampling.height is 250; .*multiples of 16, such as 256"),
    ("train", "model.path=''", "model.path is empty; give a diffusers folder"),
    *[
        ("train", f"{name}=0", f"{name} is 0; it must be 1 or more")
        for name in ("steps", "accumulation", "keep", "stop_after_bad", "validation_levels")
    ],
    *[("train", f"{name}=-1", f"{name} is -1.0; it must be 0 .never. or more") for name in ("save_minutes", "spikes")],
    ("train", "save_minutes=nan", "save_minutes is nan; it must be 0"),
    ("train", "keep_best=-1", "keep_best is -1; it must be 0 or more"),
    ("train", "ema=1", "ema is 1.0; it must be above 0 and below 1, such as 0.99, or null"),
    ("train", "ema=0", "ema is 0.0; it must be above 0"),
    ("train", "resume=200", "resume is '200'; give a checkpoint's name, such as step-000200, or null"),
    ("train", "resume=../step-1", "resume is '../step-1'; give a checkpoint's name"),
    *[
        ("train", f"{name}=-1", f"{name} is -1; it must be 0")
        for name in ("save_every", "validate_every", "preview_every")
    ],
    ("page", "port=-1", "port is -1; it must be 0"),
    ("choose", "weights=[1,0]", "weights has 0.0; give numbers but 0"),
    ("choose", "weights=[]", "weights is \\[\\]; give at least one"),
    ("choose", "take=last", "'last' is no checkpoint's name"),
    ("choose", "take=best weights=[0.7]", "weights is .*, which has no effect: take=best draws nothing"),
    ("choose", "take=best sampling.steps=4", "sampling.steps is 4, which has no effect: take=best draws nothing"),
    ("choose", "checkpoints=[200]", "'200' is no checkpoint's name"),
    ("choose", "sampling.model=distilled", "checkpoints are drawn on the run's own model"),
    ("plan", "fit_gib=-1", "fit_gib is -1.0; it must be above 0, or null"),
    ("compare", "prompts=[]", "compare needs at least one of prompts.*as in 'prompts="),
    ("compare", "seeds=[]", "compare needs at least one of prompts and of seeds"),
    ("draw", "seeds=[]", r"seeds is \[\]; give at least one"),
    ("draw", "seeds=[1,1]", "seeds has 1 twice; give each once"),
    ("draw", "prompt=a prompts=[b]", "prompt and prompts are both given"),
    ("draw", "weights=[0,1]", "weights is .*, which has no effect: adapter.path is null"),
    ("draw", "adapter.path=a weights=[0,1] adapter.weight=0.5", "adapter.weight is 0.5, .*weights says the strengths"),
    ("draw", "adapter.path=a weights=[nan]", "weights has nan; give numbers"),
    ("draw", "adapter.path=a adapter.name=b", "adapter.name is b, .*pictures are named by their prompts"),
    ("draw", "adapter.path=a adapters=[b]", "adapters and adapter.path are both given"),
    ("draw", "precision=int8 precisions=[nf4]", "precisions and precision are both given"),
    ("draw", "precisions=[nf5]", "precisions has 'nf5'; choose among auto, bf16"),
    ("draw", "adapters=[a,a]", "adapters has 'a' twice"),
    ("choose", "take=best resident=true", "resident is true, which has no effect: take=best draws nothing"),
    ("serve", "idle=0", "idle is 0; give seconds above 0"),
    ("draw", "text_length=0", "text_length is 0; it must be 1 or more"),
    ("draw", "out=''", "out is empty; give a folder"),
    ("compare", "only=[bf16,nf5]", r"only names \['nf5'\]; choose from bf16, int8, fp4, nf4"),
    ("compare", "precisions.nf4.kind=nf5", "precision.kind is 'nf5'; choose one of"),
    ("convert", "to=a1111", "to is 'a1111'; choose one of diffusers, peft, kohya, comfyui"),
    ("train", "push=mine", "push is 'mine'; write owner/name"),
    ("train", "mirror=mine", "mirror is 'mine', no address; write s3://"),
    ("compare", "+recovery.nf5=x", "recovery names 'nf5', which is none of bf16"),
    ("compare", "adapter.also=[{path:b}]", "adapter.also is given without adapter.path"),
    ("compare", "adapter.path=a adapter.weight=nan", "the weight of adapter a is nan; give a number"),
    (
        "merge",
        "adapter.path=a adapter.also=[{path:b,weight:inf}]",
        "adapter b: weight is inf; it must be 1,000,000 or less",
    ),
    ("recover", "share=0", "share is 0.0; it must be above 0"),
    ("recover", "rows=0", "rows is 0; it must be 1 or more"),
    ("recover", "rate=0", "rate is 0.0; it must be above 0"),
    ("recover", "held_out=[]", "recover needs prompts, and others as held_out"),
    ("compare", "prompts=[a] unrelated=[a]", "'a' is among prompts and among unrelated"),
    ("gap", "only=[nf4,int8]", "int8, nf4 are all quantized or multiply in 8 bits; add bf16"),
    ("gap", "only=[]", r"only names \[\]; choose from bf16"),
    ("gap", "levels=0", "levels is 0; it must be 1 or more"),
    ("gap", "pictures=0", "pictures is 0; it must be 1 or more"),
    ("sensitivity", "prompts=[]", "prompts is empty; give at least one"),
    ("sensitivity", "out=a.yaml", "out is 'a.yaml', but budget_gib is null; say how many bytes"),
    ("sensitivity", "budget_gib=-1", "budget_gib is -1.0; it must be above 0, or null"),
    ("transfer", "seeds=[1]", r"seeds is \[1\]; give two or more"),
    ("transfer", "seeds=[1,1]", r"seeds is \[1, 1\]; give two or more, each once"),
    ("transfer", "prompts=[a]", "prompts and scores go together"),
    ("transfer", "data.validation=0", "data.validation is 0.0, but the objective is measured on held-out"),
    ("save", "precision.kind=nf5", "precision.kind is 'nf5'; choose one of"),
]


@pytest.mark.parametrize("root, override, message", WRONG, ids=lambda value: value if "=" in value else "")
def test_wrong_values(root: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(root, *override.split())


OUTSIDE = [
    "", " ", "x ", ".", "..", "../x", "x/../../y", "/tmp/x", "//x", "~/../x", ".a", "a:b", "a\\b", "a\nb", "a*",
    # what another system, or a case that it does not tell apart, makes of it
    "CON", "nul.txt", "set/Com1", "mine.", "mine./x", "a /b", "a/ b", "a/.b", "a\tb", "a\x1b[2Jb", "a\u200bb", "\udcff",
    "x" * 201, "é" * 101, "/".join(["x" * 190] * 4), "Cache", "CACHE/x", "mine/Adapter", "mine/CHECKPOINTS/x",
    "mine/config.yaml", "mine/Metrics.JSONL/x", "set/report.html", "\u200d", "demo\u200d", "a\u200d b", "a\u00a0/b",
]  # fmt: skip


@pytest.mark.parametrize("run", OUTSIDE)
def test_runs_stay_in_their_folder(run: str) -> None:
    with pytest.raises(ValueError, match=r"^run is ") as caught:
        check_run_name(run)
    assert repr(run) in str(caught.value)


@pytest.mark.parametrize("name", ["a/b", ".a", "a.", "NUL", "com1.b", "a" * 201, ""])
def test_names_of_precisions_can_be_names_of_files(name: str) -> None:
    with pytest.raises(ValueError, match="becomes a part of a file's"):
        check_file_names("precisions", ["nf4", name])


@pytest.mark.parametrize(
    "run",
    [
        "demo",
        "neon-nf4_2",
        "set/neon",
        "ñ 日本",
        "v1.5",
        "console",
        "set/v1.5",
        "é" * 100,
        "a,b=c $x's",
        "adapter",
        "set/start-a.safetensors",
        "set/model-flux1-dev.yaml",
        "می\u200cخواهم",
        "👩\u200d🎨",
        "a\u00a0b",
    ],
)
def test_plain_runs_pass(run: str) -> None:
    assert check_run_name(run) == Path("runs", *run.split("/"))


CLAIMED = ["run=mine", "data.trigger='ß: {a}'", "previews=['a #1, \"b\"', '日本 🦩']", "optim.lr=1.7e-9"]


def test_a_run_is_claimed_once(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "mine"
    record_config(made("train", *CLAIMED, "adapter.rank=3"), folder, 1)
    record_config(made("train", *CLAIMED), folder, 1)  # nothing was trained yet: a corrected config takes its place
    written = (folder / "config.yaml").read_bytes()
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    (folder / "checkpoints" / "step-000200").mkdir(parents=True)
    for same in (
        [],
        ["track=wandb", "track.project=other"],
        ["device=cpu", "deterministic=true"],
        ["previews=[x]", "save_every=7", "keep=9", "save_minutes=1", "keep_best=2", "resume=step-000200"],
        ["spikes=3", "stop_after_bad=9"],
        ["steps=999"],
        ["steps=2000"],
    ):
        assert record_config(made("train", *CLAIMED, *same), folder, 1) == 1
    for override, was, now in (
        ("seed=1", "seed was 0", "is 1"),
        ("precision=fp4", "precision.kind was 'nf4'", "is 'fp4'"),
        ("precision.products=fp8", "precision.products was 'bf16'", "is 'fp8'"),
        ("optim.lr=1.8e-9", "optim.lr was 1.7e-09", "is 1.8e-09"),
        ("data.trigger=x", "data.trigger was 'ß: {a}'", "is 'x'"),
        ("ema=0.9", "ema was None", "is 0.9"),
        ("adapter.targets=all", "adapter.targets was 'attention'", "is 'all'"),
    ):
        with pytest.raises(ValueError, match=r"run 'mine' exists with another config .*run=.*or delete") as caught:
            record_config(made("train", *CLAIMED, override), folder, 1)
        assert f"({was}" in str(caught.value) and f"{now})" in str(caught.value)
    with pytest.raises(ValueError, match=r"\(adapter.rank was 16, is 3; .*\.\.\.\); choose"):  # the first five of more
        record_config(
            made("train", "run=mine", "data.resolution=64", "seed=1", "adapter.rank=3", "accumulation=5"), folder, 1
        )
    assert (
        record_config(made("train", *CLAIMED), folder, 2) == 1
    )  # it began with one process, and the batches stay those of one
    assert (folder / "config.yaml").read_bytes() == written
