"""Two ranks: what they send each other, shared weights, and the death of one; and the launches that are refused."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from infer.adapter.lora import Adapter
from infer.adapter.read import FILE
from infer.fast.install import Memory
from infer.program.paths import ROOT
from infer.quantize.precision import Precision
from scripts.tiny.make_style import make_style
from train.loop.micro_step import graphs
from train.objective.optim import Optim
from train.ranks import peers
from train.ranks.launch import CODES, check_launch
from train.run.config import Train

UPDATES, ACCUMULATION = 3, 2
RANK = '''"""One rank: trains apart and with shared weights, tells what was sent, and dies while the other waits."""

import importlib
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, {root!r})
from infer.program.quiet import quieten

quieten()
from infer.adapter.attach import Adapter
from infer.fast.install import Memory
from infer.checkpoint.model import Model
from train.run.config import Train
from tests.quantized_once import remember_quantized
from train.data.dataset import Data
from train.train import train

remember_quantized()  # there are nine runs here
RUN, STEP, FIT = (importlib.import_module(f"train.loop.{{name}}") for name in ("run", "step", "fit"))
FIT.draw_loss = lambda run: None
rank = int(os.environ["RANK"])
told = {{"sent": [], "stored": {{}}}}


class Sent(TorchDispatchMode):
    """Notes every collective operation and how many bytes it is given."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and "wait" not in func.name():
            tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            told["sent"].append([func.name(), sum(x.numel() * x.element_size() for x in tensors)])
        return func(*args, **(kwargs or {{}}))


def bytes_of(transformer):
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in transformer.parameters()]
    return sum(p.numel() * p.element_size() for p in parts)


def noted(session):
    transformer = session.model.transformer
    told["stored"][job.run] = bytes_of(transformer)
    told["floating"] = all(p.is_floating_point() for p in transformer.parameters())
    with Sent() if job.run == "apart" else open(os.devnull):
        return fit(session)


fit, batch = RUN.fit, STEP.training_batch
RUN.fit = noted
Accelerator.end_training = lambda self: None  # there is another run to come
job = Train(
    model=Model({root!r} + "/scripts/tiny/model"),
    adapter=Adapter(rank=4, dora={dora}),
    data=Data({pictures!r}, 64, 1, validation=0.3, cache="cache"),
    run="apart",
    memory=Memory("nothing", fused=False),
    steps={updates},
    accumulation={accumulation},
    save_every=2,
    validation_levels=1,
    previews=["a red star"],
    device="cpu",
)
job.sampling.steps, job.sampling.height, job.sampling.width = 1, 64, 64
train(job)
os.environ |= {{"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
job = replace(job, run="shared", memory=Memory())
train(job)
Path(f"told-{{rank}}.json").write_text(json.dumps(told))
RUN.fit = fit
for kind in ("lokr", "loha", "oft"):
    for fsdp in ("false", "true"):
        os.environ["ACCELERATE_USE_FSDP"] = fsdp
        kept = {{"memory": Memory(), "previews": [], "validation_levels": 1, "steps": 2, "accumulation": 1}}
        own = Adapter(kind=kind, factor=8 if kind == "lokr" else 16)
        train(replace(job, run=f"{{kind}}-{{fsdp}}", adapter=own, **kept))


def dies(*args):
    if rank == 1:
        Path("died").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(*args)


os.environ["ACCELERATE_USE_FSDP"] = "false"
STEP.training_batch = dies
job = replace(job, run="dies")
train(job)
'''


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], float]:
    """Two machines of one process each, as far as torchrun can tell: their folder, their words, when rank 0 ended."""
    folder = tmp_path_factory.mktemp("two")
    make_style(folder / "pictures", 7, seed=1)
    said = {
        "root": str(ROOT), "pictures": str(folder / "pictures"), "updates": UPDATES, "accumulation": ACCUMULATION,
        "dora": False,
    }  # fmt: skip
    (folder / "rank.py").write_text(RANK.format(**said))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    at = ["--nnodes", "2", "--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    nodes = []
    for node in range(2):
        command = [str(Path(sys.executable).parent / "torchrun"), *at, "--node_rank", str(node), "rank.py"]
        with (folder / f"node-{node}.log").open("w") as log:
            nodes.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
    while not (folder / "died").is_file() and all(node.poll() is None for node in nodes):
        time.sleep(0.1)
    ends = lambda: (folder / "node-0.log").read_text()  # noqa: E731
    while "has ended before" not in ends() and nodes[0].poll() is None:
        time.sleep(0.05)
    ended = time.time()
    for node in nodes:
        node.terminate()
        node.wait(60)
    return folder, [(folder / f"node-{node}.log").read_text() for node in range(2)], ended


def test_only_the_adapter_is_sent_and_only_at_updates(two: tuple[Path, list[str], float]) -> None:
    folder, logs, _ = two
    assert (folder / "told-0.json").is_file(), logs[0][-3000:] + logs[1][-3000:]
    size = sum(tensor.nbytes for tensor in load_file(folder / "runs/apart/adapter" / FILE).values())
    for rank in range(2):
        sent = json.loads((folder / f"told-{rank}.json").read_text())["sent"]
        sums = [given for name, given in sent if name == "c10d::allreduce_"]
        assert sums.count(size) == UPDATES
        # the validation's loss and count, and those of its level; what all ranks know of an update: each sample's loss,
        # whether to stop, save or draw, the norm
        told = 8 * (2 * ACCUMULATION + 4)
        assert all(given <= 32 or given == told for given in sums if given != size)
        assert sums.count(told) == UPDATES
        start = sum(given for name, given in sent if name == "c10d::broadcast_")
        assert start == size  # rank 0's adapter, once
        kinds = {"c10d::allreduce_", "c10d::broadcast_", "c10d::barrier"}
        assert {name for name, _ in sent} <= kinds


def test_shared_weights_learn_the_same_and_are_stored_once(two: tuple[Path, list[str], float]) -> None:
    folder, logs, _ = two
    apart, shared = (load_file(folder / f"runs/{run}/adapter" / FILE) for run in ("apart", "shared"))
    assert apart.keys() == shared.keys() and all(torch.equal(apart[key], shared[key]) for key in apart)
    assert any(value.any() for key, value in apart.items() if "lora_B" in key)
    lines = {run: (folder / f"runs/{run}/metrics.jsonl").read_text().splitlines() for run in ("apart", "shared")}
    losses = {run: [json.loads(line).get("validation_loss") for line in text] for run, text in lines.items()}
    assert losses["apart"] == losses["shared"]
    drawn = [(folder / f"runs/{run}/previews/step-{UPDATES:06d}.png").read_bytes() for run in ("apart", "shared")]
    assert drawn[0] == drawn[1]
    for rank in range(2):
        told = json.loads((folder / f"told-{rank}.json").read_text())
        stored = told["stored"]
        assert told["floating"]  # torch 2.11 gives every part that is cut a gradient first
        adapter = sum(tensor.nbytes for tensor in apart.values())
        assert stored["shared"] - adapter < 0.52 * (stored["apart"] - adapter)
    assert "the fast path is off: it holds a block's weights in one piece" in logs[0]


@pytest.mark.parametrize(("kind", "zero"), [("lokr", "lokr_w1"), ("loha", "hada_w2_b"), ("oft", "oft_R")])
def test_other_kinds_learn_the_same_beside_shared_weights(
    kind: str, zero: str, two: tuple[Path, list[str], float]
) -> None:
    folder, _, _ = two
    apart, shared = (load_file(folder / f"runs/{kind}-{fsdp}/adapter" / FILE) for fsdp in ("false", "true"))
    assert apart.keys() == shared.keys() and all(torch.equal(apart[key], shared[key]) for key in apart)
    learned = [value for key, value in apart.items() if zero in key]  # these begin as zeros
    assert learned and all(value.any() for value in learned)


def test_the_death_of_a_rank_ends_the_other_with_one_paragraph(two: tuple[Path, list[str], float]) -> None:
    """The dead one is on another machine, whose launcher tells nobody."""
    folder, logs, ended = two
    assert ended - float((folder / "died").read_text()) < 10
    assert len(re.findall("error: rank 1 of 2 has ended before the work was done", logs[0])) == 1
    assert "Traceback" not in logs[0].split("has ended before")[0]


@pytest.mark.parametrize(("died", "says"), [(1, [0, 4]), (0, [1, 4]), (4, [0, 5])])
def test_one_rank_of_each_machine_says_which_has_died(
    died: int, says: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines of four ranks."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(peers, "OTHERS_WAIT", 0.0)
    monkeypatch.setattr(os, "_exit", leave)
    heard = []
    for rank in (each for each in range(8) if each != died):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 4))
        with pytest.raises(SystemExit) as ended:
            peers.exit_process(died, 8)
        assert ended.value.code == 1
        if f"rank {died} of 8 has ended" in capsys.readouterr().err:
            heard.append(rank)
    assert heard == says


def launched(**environment: str) -> dict[str, str]:
    return environment


FSDP = launched(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
ZERO = launched(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2")
REFUSED = [
    (Train(precision=Precision("int8")), FSDP, "precision.kind=int8 cannot be shared by FSDP: .*scales.*precision=nf4"),
    (Train(precision=Precision("nf4", products="fp8")), FSDP, "products=fp8 needs the fast path, .*FSDP .*ddp.yaml"),
    (Train(precision=Precision("auto", budget_gib=8)), FSDP, "a mixture of precisions with int8 layers cannot"),
    (Train(precision=Precision("nf4", layers={"proj_out": "int8"})), FSDP, "a mixture .*which loses their scales"),
    (Train(adapter=Adapter(recovery="a")), FSDP, "adapter.recovery and .*need whole layers; launch without FSDP"),
    (Train(adapter=Adapter(init="loftq")), FSDP, "init=residual or loftq need whole layers; launch without FSDP"),
    (Train(memory=Memory(graph=True)), FSDP, "memory.graph=True needs the fast path, which .*FSDP cuts them apart"),
    (Train(memory=Memory(compile=True)), FSDP, "memory.compile=True needs the fast path"),
    (Train(memory=Memory(budget_gib=8)), FSDP, "memory.budget_gib=8 needs the fast path"),
    (Train(), FSDP | launched(FSDP_VERSION="1"), "launched for FSDP 1, which flattens.*set fsdp_version: 2"),
    (Train(), FSDP | launched(FSDP_OFFLOAD_PARAMS="true"), "fsdp_offload_params: true, which is not .*budget"),
    (Train(), FSDP | launched(FSDP_ACTIVATION_CHECKPOINTING="true"), "set it to false: memory.keep=nothing does that"),
    (Train(), ZERO | launched(ACCELERATE_DEEPSPEED_ZERO_STAGE="3"), "ZeRO-3, .*saves empty adapters; .*fsdp2.yaml"),
    (Train(), ZERO | launched(ACCELERATE_DEEPSPEED_CONFIG_FILE="ds.json"), "a DeepSpeed config file is not read; take"),
    (Train(), ZERO | launched(ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE="cpu"), "optimizer_device is cpu, but"),
    (Train(optim=Optim("adamw8bit")), ZERO, "optim.name=adamw8bit cannot be shared by ZeRO-2, .*use optim=adamw, or"),
]  # fmt: skip


@pytest.mark.parametrize(
    "job, environment, message", REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_what_cannot_work_is_refused(job: Train, environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_launch(job, environment)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="pip install deepspeed")
def test_zero_two_learns_what_replicas_learn(tmp_path: Path) -> None:
    """Bit for bit, and after a checkpoint too: what is kept is one process's state."""
    make_style(tmp_path / "pictures", 7, seed=1)
    options = [
        "data.path=pictures", "data.resolution=64", "data.validation=0.2", "data.cache=cache", "precision=nf4",
        "adapter.rank=4", "optim.schedule=linear", "steps=4", "save_every=2", "validation_levels=1",
        "previews=[]", "device=cpu",
    ]  # fmt: skip
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def run(name: str, **more: str) -> dict[str, torch.Tensor]:
        command = [*torchrun, str(ROOT / "train/train.py"), f"run={name}", *options]
        made = subprocess.run(
            command, cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300
        )
        assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-4000:]
        return load_file(tmp_path / "runs" / name / "adapter" / FILE)

    apart, shared = run("apart"), run("shared", **ZERO)
    assert all(torch.equal(apart[key], shared[key]) for key in apart)
    shutil.rmtree(tmp_path / "runs/shared/adapter")
    shutil.rmtree(tmp_path / "runs/shared/checkpoints/step-000004")
    resumed = run("shared", **ZERO)
    assert all(torch.equal(apart[key], resumed[key]) for key in apart)
    kept = [
        load_file(tmp_path / f"runs/{run}/checkpoints/step-000002/optimizer.safetensors") for run in ("apart", "shared")
    ]
    assert kept[0].keys() == kept[1].keys() and all(torch.equal(kept[0][key], kept[1][key]) for key in kept[0])


@pytest.mark.parametrize("processes", [1, 4])
def test_steps_of_replicas_are_captured_like_one_process_s(processes: int) -> None:
    accelerator: Any = SimpleNamespace(device=torch.device("cuda"), num_processes=processes)
    assert graphs(Train(), accelerator) and graphs(Train(memory=Memory(graph=True)), accelerator)
    assert not graphs(Train(memory=Memory(graph=False)), accelerator)
    assert not graphs(Train(memory=Memory("nothing", fused=False)), accelerator)  # as FSDP has it


def test_no_library_speaks_once_a_rank(two: tuple[Path, list[str], float]) -> None:
    _, logs, _ = two
    assert not [line for log in logs for line in log.splitlines() if "Warning" in line or "context_fn" in line]
    for log in logs:  # once a run and machine
        assert log.count("the fast path is off: it holds a block's weights") == 4
        assert log.count("the fast path is off: it has no adapters of kind oft") == 1


def patterns() -> torch.Tensor:
    """Four bytes each: all that the upper two can be, with some lower ones."""
    upper = torch.arange(2**16, dtype=torch.int64)[:, None] << 16
    return (upper + torch.tensor([0, 1, 0x7FFF, 0xFFFF])).to(torch.uint32).flatten()


def test_codes_outlive_a_copy_through_fp32() -> None:
    """As a GPU copies a list of tensors (aten/src/ATen/native/cuda/ForeachBinaryOpList.cu, `opmath_t`)."""
    codes = patterns().view(CODES)
    copied = torch.stack([one.to(torch.float32).to(CODES) for one in codes.chunk(4)])
    assert torch.equal(copied.flatten().view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codes_outlive_the_copies_of_fsdp() -> None:
    codes = patterns().view(CODES).cuda()
    copied = [torch.zeros_like(part) for part in codes.chunk(4)]
    torch._foreach_copy_(copied, list(codes.chunk(4)))
    assert torch.equal(torch.cat(copied).view(torch.uint8), codes.view(torch.uint8))


def test_what_works_passes() -> None:
    check_launch(Train(), ZERO)
    for kind in ("nf4", "fp4", "bf16", "fp32"):
        check_launch(Train(precision=Precision(kind)), FSDP)
    check_launch(Train(precision=Precision("int8"), memory=Memory(graph=True, budget_gib=8)), {})
