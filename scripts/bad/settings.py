"""Settings that are misspelt, of the wrong type, out of range, or at odds with each other."""

from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from scripts.bad.case import Case, good
from train.run.config import Train

SET = ["data.path=set", "data.resolution=64", "device=cpu", "steps=1", "previews=[]"]
WRONG: dict[Any, str] = {int: "many", float: "much", bool: "maybe", str: "null", list: "3"}
NOT_A_NUMBER = ("optim.lr", "adapter.alpha", "sampling.guidance", "flow.guidance", "optim.weight_decay", "optim.clip",
                "data.aspect", "data.validation", "data.caption_dropout", "encode.flush_seconds", "optim.beta1",
                "optim.eps", "flow.logit_std", "precision.outlier_threshold", "data.least",
                "adapter.dropout")  # fmt: skip
FAR = ("optim.lr=inf", "sampling.guidance=inf", "flow.guidance=-inf", "optim.weight_decay=-1", "optim.beta1=1",
       "optim.beta2=1.5", "optim.eps=-1", "optim.eps=0", "encode.flush_seconds=-1", "encode.shard_mib=0",
       "encode.workers=0", "encode.decode_pixels=0", "encode.tile=33", "encode.batch_pixels=0", "adapter.rank=0",
       "adapter.alpha=-1", "adapter.dropout=1", "adapter.init=zero", "adapter.targets='('", "adapter.targets=nothing",
       "precision.kind=nf5", "precision.t5=nf5", "precision.llm_int8=true",
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
       "data.path=''", *(f"{name}=1{30 * '0'}" for name in (
           "steps", "seed", "accumulation", "adapter.rank", "adapter.alpha", "data.batch_size", "data.text_length",
           "data.crops", "data.prior.seed", "encode.workers", "encode.shard_mib", "optim.lr", "optim.warmup",
           "sampling.steps", "sampling.height", "validation_levels", "keep", "save_every", "memory.budget_gib",
           "precision.outlier_threshold", "flow.guidance")),
       "adapter.rank=2000", "sweep.gpus=[-1]", "seed=-1e30", "adapter.kind=glora", "flow.loss=l3", "flow.loss_scale=0",
       "flow.loss_schedule=linear", "preserve.kind=all", "preserve.weight=0", "scores_every=-1", "stop.loss=-2",
       "stop.likeness=-1", "stop.copying=2", "stop.drift=0")  # fmt: skip
TOGETHER = (
    ("LoKr with dropout", ["adapter=lokr", "adapter.dropout=0.1"], "adapter.dropout is 0.1, which has no effect"),
    ("LoHa from an error", ["adapter=loha", "adapter.init=residual"], "adapter.init is residual, which has no effect"),
    ("OFT of a rank", ["adapter=oft", "adapter.rank=8"], "adapter.rank is 8, .*whose size is adapter.block"),
    ("OFT whose blocks do not fit", ["adapter=oft", "adapter.block=48"], "adapter.block is 48, which does not divide"),
    ("LoKr within CUDA graphs", ["adapter=lokr", "memory.graph=true"], "graph=true captures CUDA steps"),
    ("LoKr compiled", ["adapter=lokr", "memory.compile=true"], "it has no adapters of kind lokr"),
    ("LoHa with products in 8 bits", ["adapter=loha", "precision.products=int8"], "no adapters of kind loha"),
    ("a factor for LoRA", ["adapter.factor=4"], "adapter.factor is 4, .*it belongs to lokr"),
    ("a class without a trigger", ["preserve=class", "preserve.word=dog"], "data.trigger is null"),
    ("a class that no caption holds", ["preserve=class", "preserve.word=dgo", "data.trigger=sks"], "preserve.word is"),
    ("a word for the empty caption", ["preserve=empty", "preserve.word=dog"], "preserve.word is dog, which has no"),
    ("a scale of mse", ["flow.loss_scale=0.5"], "flow.loss_scale is 0.5, which has no effect"),
    ("a gamma of another weighting", ["flow.min_snr_gamma=2"], "flow.min_snr_gamma is 2.0, which has no effect"),
    ("scores of nothing", ["scores_every=1"], "previews=.. leaves no prompts to draw"),
    ("networks without scores", ["networks=hub"], "networks.clip is .*scores_every is 0"),
    ("an end by scores that are not", ["stop.drift=0.1"], "stop.drift is 0.1, .*scores_every is 0"),
    ("an end by no held-out picture", ["stop.loss=2", "data.validation=0"], "data.validation=0 holds no pictures out"),
    ("references of nothing", ["data.references=[gone]"], "gone"),
    ("a share without references", ["data.reference_dropout=0.5"], "no sample has references"),
    ("references that are the pictures", ["data.references=[set]"], "is that folder itself; name the one of the bef"),
    ("references where none are taught", ["data.references=[befores]"], "teach_references"),
    ("edits without references", ["edits=[{prompt: blue, references: []}]"], "references"),
    ("an edit of a picture that is not there", ["edits=[{prompt: blue, references: [gone.png]}]"], "gone.png"),
)
RUNS = ("", " ", ".", "..", "../out", "a/../../b", "/tmp/x", "//x", "~/../x", ".hidden", "a:b", "a*", "a?", "<a>",
        "a|b", "x" * 300, "cache", "cache/mine", "mine/adapter", "mine/checkpoints", "CON", "set/nul.txt", "mine.",
        "a /b", "a\tb", "a\x1b[2Jb", "a\u200bb", "é" * 101, "Cache", "mine/Adapter", "mine/config.yaml")  # fmt: skip
WRITTEN = (
    ("no =", ["steps"], "'steps' has no name; write name=value"),
    ("an open bracket", ["previews=[a"], "cannot be read"),
    ("two values", ["data.path=a=b"], "'a=b' does not exist"),
    ("a brace", ["data.path={"], "'{' does not exist"),
    ("a brace that is none", ["data.sources={"], "cannot be read"),
    ("a number as a path", ["data.path=1e3"], "data.path '1e3' does not exist"),
    ("a number with underscores as a path", ["data.path=2024_08_20"], "data.path '2024_08_20' does not exist"),
    ("a word of YAML as a path", ["data.path=true"], "data.path 'true' does not exist"),
    ("letters beyond ASCII", ["data.path=photosété"], "data.path 'photosété' does not exist"),
    ("letters beyond ASCII in a source", ["data.sources=[{path:läufe}]"], "both given"),
    ("letters beyond ASCII as a model", ["model=läufe"], "no model=läufe; "),
    ("letters beyond ASCII as a number", ["steps=viele ä"], "steps is 'viele ä' .*whole number"),
    ("no group", ["adapter=null"], "no adapter=null; .*dora, loha, lokr, lora, oft, rslora"),
    ("a number as a group", ["precision=4"], "no precision=4; "),
    ("a truth as a group", ["optim=true"], "no optim=true; "),
    ("a group taken away", ["~data"], "data is taken away"),
    ("a group taken away by its option", ["~optim=adamw"], "optim is taken away"),
    ("null for a text", ["data.prefix=null"], "for the word itself 'data.prefix=\"null\"'"),
    ("a part of a name", ["data.batch=4"], r"did you mean data.batch_size\?"),
    ("the end of a name", ["adapter.size=4"], "no setting 'adapter.size'; choose one of"),
    ("a number of many digits", [f"steps={'9' * 5000}"], "steps has a number of more than a thousand digits"),
    ("nothing", [""], "'' has no name; write name=value"),
    ("no name", ["=3"], "has no name"),
    ("a flag", ["--steps", "5"], "steps"),
    ("a flag with its value", ["--steps=5"], "'--steps=5' is no flag; .*steps=5"),
    ("a comma", ["track.tags=a,b"], "could be a list or text"),
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
    ("a name of diffusers' scripts", ["learning_rate=1e-4"], "here it is called optim.lr"),
    ("a name of kohya's", ["network_dim=8"], "here it is called adapter.rank"),
    ("a flag of diffusers' scripts", ["--max_train_steps", "5"], "as steps=5"),
    ("a folder as a group", ["data=set"], "is given as data.path=set"),
    ("a file as a model", ["model=flux1-dev.safetensors"], "is given as model.path=flux1-dev.safetensors"),
    ("an adapter's folder as a group", ["adapter=runs/a/adapter"], "is given as adapter.start=runs/a/adapter"),
    ("a word without a name", ["set"], "has no name; write name=value, as in data.path=set"),
    ("a part of a path", ["data.path=sett"], "does not exist; did you mean 'set'"),
    ("capitals", ["data.path=Set"], "does not exist; did you mean 'set'"),
    ("a variable in quotation marks", ["data.path='$HOME/set'"], "outside of single quotation marks|HOME"),
    ("an address", ["data.path=https://example.com/a.zip"], "an address like this is not read here"),
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
    if any("befores" in argument for argument in arguments):
        good(folder / "befores")
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
    for name, arguments, said in TOGETHER:
        yield told(name, arguments, said)
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
        ("+scores.psnr=math.sqrt", "scores.psnr has the name of a score"),
        ("prompts=[a,a]", "prompts has 'a' twice"),
        ("seeds=[1,1]", "seeds has 1 twice"),
        ("+precision@precisions.base=nf4", "precisions has the name 'base'"),
        ("adapter=null", "adapter|null"),
        ("~precisions", "precisions is taken away"),
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
