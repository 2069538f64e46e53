"""Settings that are misspelt, of the wrong type, out of range, or at odds with each other."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from scripts.bad.case import Case, good
from train.config import Train

SET = ["data.path=set", "data.resolution=64", "device=cpu", "steps=1"]
WRONG: dict[Any, str] = {int: "many", float: "much", bool: "maybe", str: "null", list: "3"}
NOT_A_NUMBER = ("optim.lr", "adapter.alpha", "sampling.guidance", "flow.guidance", "optim.weight_decay", "optim.clip",
                "data.aspect", "data.validation", "data.caption_dropout", "encode.flush_seconds", "optim.beta1",
                "optim.eps", "flow.logit_std", "precision.outlier_threshold", "data.least",
                "adapter.dropout")  # fmt: skip
FAR = ("optim.lr=inf", "sampling.guidance=inf", "flow.guidance=-inf", "optim.weight_decay=-1", "optim.beta1=1",
       "optim.beta2=1.5", "optim.eps=-1", "optim.eps=0", "encode.flush_seconds=-1", "encode.shard_mib=0",
       "encode.workers=0", "encode.decode_pixels=0", "encode.tile=33", "encode.batch_pixels=0", "adapter.rank=0",
       "adapter.alpha=-1", "adapter.dropout=1", "adapter.init=zero", "adapter.targets='('", "adapter.targets=nothing",
       "precision.kind=nf5", "precision.t5=nf5", "precision.compute_dtype=fp16", "precision.llm_int8=true",
       "memory.keep=all", "memory.budget_gib=0", "memory.budget_gib=nan", "optim.name=sgd", "optim.schedule=step",
       "optim.warmup=-1", "flow.density=normal", "flow.weighting=all", "data.resolution=0", "data.resolution=100",
       "data.resolution=1000000000000", "data.resolution=[]", "data.resolution=[64,64]", "data.resolution=[64,a]",
       "data.batch_size=0", "data.aspect=0.5", "data.bucket_step=8", "data.crops=0", "data.tag_orders=0",
       "data.keep_tags=1", "data.validation=1", "data.validation=-0.1", "data.caption_dropout=1", "data.on_error=stop",
       "data.least=1.1", "data.text_length=0", "data.background=blurple", "data.most_pixels=0", "data.masks=''",
       "data.prior.count=2", "data.prior.count=-1", "data.prior.prompt=dog", "data.prior.path=none", "track.kind=tb",
       "track.mode=on", "sampling.steps=0", "sampling.height=100", "sampling.width=-16", "steps=0", "steps=-5",
       "accumulation=0", "keep=0", "validation_levels=0", "save_every=-1", "validate_every=-1", "preview_every=-1",
       "device=tpu", "device=cuda:x", "device=''", "device=meta", "data.sources=[{}]",
       "data.sources=[{path:a,weight:0}]",
       "data.sources=[{path:a,repeats:-1}]", "data.sources=[{path:a,repeats:nan}]",
       "data.path=''")  # fmt: skip
RUNS = ("", " ", ".", "..", "../out", "a/../../b", "/tmp/x", "//x", "~/../x", ".hidden", "a:b", "a*", "a?", "<a>",
        "a|b", "x" * 300)  # fmt: skip
WRITTEN = (
    ("no =", ["steps"], "cannot be read"),
    ("an open bracket", ["previews=[a"], "cannot be read"),
    ("two values", ["data.path=a=b"], "cannot be read"),
    ("a brace", ["data.path={"], "cannot be read"),
    ("nothing", [""], "cannot be read"),
    ("no name", ["=3"], "has no name"),
    ("a flag", ["--steps", "5"], "steps"),
    ("a flag with its value", ["--steps=5"], "'--steps=5' is no flag; .*steps=5"),
    ("a comma", ["data.trigger=a,b"], "could be a list or text"),
    ("added", ["+foo=1"], "no setting 'foo'"),
    ("added to a group", ["+optim.momentum=1"], "no setting 'optim.momentum'"),
    ("taken away", ["~steps"], "steps is taken away"),
    ("taken away from a group", ["~optim.lr"], "optim.lr is taken away"),
    ("an absent reference", ["data.path=${nope}"], "data.path: .*nope"),
    ("a reference to itself", ["steps=${steps}"], "steps: "),
    ("an absent environment variable", ["data.path=${oc.env:NO_SUCH_VARIABLE}"], "NO_SUCH_VARIABLE"),
    ("no value", ["data.path=???"], "data.path has no value"),
    ("an unknown option", ["precision=nf5"], "did you mean nf4"),
    ("an unknown model", ["model=deev"], "did you mean dev"),
    ("an unknown optimizer", ["optim=adam"], "did you mean adamw"),
    ("an unknown experiment", ["experiment=demoo"], "did you mean demo"),
    ("an unknown group", ["precison=nf4"], "did you mean precision"),
    ("a group elsewhere", ["+precision@other=nf4"], "no setting|other"),
    ("a key of a source", ["data.sources=[{pth:a}]"], "no 'pth' in a Source; did you mean path"),
    ("another config", ["--config-name=other"], "--config-name"),
    ("a config folder that is not there", ["--config-dir=/nowhere"], "/nowhere"),
    ("bytes that are no text", ["data.trigger='a\udcff'"], "no UTF-8"),
    ("an own setting of Hydra", ["hydra.nope=1"], "hydra.nope"),
)


def leaves(schema: Any, within: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that is no group, and its type."""
    for name, kind in get_type_hints(schema).items():
        if is_dataclass(kind):
            yield from leaves(kind, f"{within}{name}.")
        else:
            yield within + name, kind


def told(name: str, arguments: list[str], said: str) -> Case:
    return Case("setting", name, partial(_beside, [*SET, *arguments]), said, "train")


def _beside(arguments: list[str], folder: Path) -> list[str]:
    good(folder / "set")
    return arguments


def misspelt(name: str) -> str:
    """Two letters of the last word in each other's place."""
    word = name.rpartition(".")[2]
    i = len(word) // 2
    return name.removesuffix(word) + word[: i - 1] + word[i] + word[i - 1] + word[i + 1 :]


def cases() -> Iterator[Case]:
    for name, kind in leaves(Train):
        value = WRONG.get(kind, WRONG.get(getattr(kind, "__origin__", Any)))
        if value is not None:
            yield told(f"{name}={value}", [f"{name}={value}"], rf"{name} is .*; give ")
        own = name.rpartition(".")[2]
        if len(own) > 3 and misspelt(name) != name:
            yield told(f"{misspelt(name)} for {name}", [f"{misspelt(name)}=1"], rf"did you mean {name}\?")
    for name in NOT_A_NUMBER:
        yield told(f"{name}=nan", [f"{name}=nan"], rf"{name} is nan")
    for argument in FAR:
        name = argument.partition("=")[0].rpartition(".")[2]
        yield told(argument, [argument], rf"{name}|data.prior|a source|(weight|repeats) of a|'none'")
    for run in RUNS:
        yield told(f"run={run[:20]!r} of {len(run)}", [f"run='{run}'"], "run is|name too long|shorter name")
    for what, arguments, said in WRITTEN:
        yield told(f"{what}: {' '.join(arguments)!r}", arguments, said)
    for argument, said in (
        ("prompts=[]", "at least one of prompts"),
        ("seeds=[]", "at least one of prompts and of seeds"),
        ("seeds=[100000000000000000000]", "seed"),
        ("only=[nf5]", "only names .'nf5'"),
        ("only=[]", "only"),
        ("precisions.nf4.kind=nf5", "precision.kind is 'nf5'"),
        ("precisions.nf5.kind=nf4", "no 'precisions.nf5'; did you mean nf4"),
        ("precision=nf4", "no group 'precision'"),
        ("+scores.own=no.such.thing", "scores.own is 'no.such.thing'"),
        ("+scores.own=math", "scores.own"),
        ("+scores.own=math.sqrt", "scores.own"),
        ("adapter.path=nowhere", "no adapter at nowhere"),
        ("text_length=0", "text_length is 0"),
        ("text_length=-3", "text_length is -3"),
        ("sampling.height=0", "sampling.height"),
    ):
        yield Case("setting", f"compare {argument}", partial(_beside, ["device=cpu", argument]), said, "compare")
    for argument, said in (
        ("out=''", "out is ''"),
        ("out=set", "out is 'set'"),
        ("model.path=''", "model.path is empty"),
        ("model.path=nowhere", "no folder here"),
        ("model.path=/nowhere", "no folder here"),
        ("model.path=a/b/c", "no folder here"),
        ("model.weights=none", "model.weights"),
    ):
        yield Case("setting", f"save {argument}", partial(_beside, ["device=cpu", "out=o", argument]), said, "save")
    for argument in ("shown=0", "workers=0", "decode_pixels=0", "data.path=nowhere"):
        said = argument.partition("=")[0]
        yield Case("setting", f"look {argument}", partial(_beside, ["data.path=set", argument]), said, "look")
