"""Which kernels are compiled while a model is loaded: each once a process, and none for a run that needs none."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

from infer.checkpoint.files import known_config
from infer.checkpoint.model import Model
from infer.fast import ready_kernels
from infer.fast.kernel_calls import Call, Use, kernel_calls
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from tests.infer.fast.families import CPU

CUDA = torch.device("cuda")
DEV, KLEIN = "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-4B"
NF4, NESTED, INT8 = Precision("nf4"), Precision("nf4", double_quant=True), Precision("int8")
TRAINED = Use(4, learns=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What is given to the threads, by name; nothing is compiled."""
    counted: Counter[str] = Counter()

    class Pool:
        def submit(self, apart: Callable[..., object], device: torch.device, call: Call) -> None:
            counted[call[0].__name__.lstrip("_")] += 1

    monkeypatch.setattr(ready_kernels, "_running", [])
    monkeypatch.setattr(ready_kernels, "_begun", set())
    monkeypatch.setattr(ready_kernels, "_pool", Pool)
    monkeypatch.setattr(ready_kernels, "prepare_compiler", lambda device, pool: None)
    yield counted


def prepare(model: str, precision: Precision, memory: Memory | None = None, use: Use = TRAINED) -> None:
    ready_kernels.prepare_kernels(known_config(Model(model), "transformer"), precision, memory or Memory(), CUDA, use)


def test_what_precisions_have_in_common_is_compiled_once(asked: Counter[str]) -> None:
    prepare(DEV, NF4)
    first = Counter(asked)
    assert first["heads"] == 2 and first["adapter"] == 3  # of one stream and of two; of one layer, three and four
    assert set(first.values()) == {1, 2, 3}
    for precision, more in (
        (Precision("fp4"), {"weights"}),
        (INT8, {"weights", "modulation"}),
        (NESTED, {"weights"}),
        (Precision("bf16"), set()),
        (NF4, set()),
    ):
        before = Counter(asked)
        prepare(DEV, precision)
        assert set(asked - before) == more, precision
    before = Counter(asked)
    prepare(KLEIN, NF4)  # as wide as FLUX.1, of another activation
    assert set(asked - before) == {"activation", "activation_gradient"}


@pytest.mark.parametrize(("use", "gradients"), [(TRAINED, True), (Use(16), False)])
def test_gradients_are_of_trained_adapters(asked: Counter[str], use: Use, gradients: bool) -> None:
    prepare(DEV, NF4, use=use)
    assert {name.endswith("gradient") for name in asked} == {False, gradients}


@pytest.mark.parametrize("model", [DEV, KLEIN])
def test_products_in_8_bits_have_kernels_of_their_own(asked: Counter[str], model: str) -> None:
    prepare(model, NF4)
    before = Counter(asked)
    prepare(model, Precision("nf4", products="fp8"))
    config = known_config(Model(model), "transformer")
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # rows of the widths that blocks sum over, by the power of two that each fits in: q, k, v and the MLP's two sides
    forward = {"gelu": (1, 4, 5), "swiglu": (1, 3, 4)}["gelu" if model == DEV else "swiglu"]
    back = {DEV: (1, 3, 4, 7), KLEIN: (1, 3, 6, 9)}[model]
    sizes = [{(count * width - 1).bit_length() for count in sums} for sums in (forward, back)]
    assert asked - before == {"rounded": sum(map(len, sizes))}
    before = Counter(asked)
    prepare(model, Precision("nf4", products="int8"))
    assert set(asked - before) == {"rounded", "wide_int8"}


def test_dora_has_kernels_of_its_own(asked: Counter[str]) -> None:
    prepare(DEV, NF4)
    before = Counter(asked)
    prepare(DEV, NF4, use=TRAINED._replace(dora=True))
    assert asked - before == {"gains": 3}


def test_repeatable_attention_has_kernels_of_its_own(asked: Counter[str]) -> None:
    prepare(DEV, NF4)
    before = Counter(asked)
    prepare(DEV, NF4, use=TRAINED._replace(repeatable=True))
    assert asked - before == {"attention": 1}


@pytest.mark.parametrize(
    ("memory", "precision"),
    [
        (Memory("nothing", fused=False), NF4),  # the plain path
        (Memory("products"), NF4),  # by torch.compile
        (Memory(), Precision("nf4", compute_dtype="fp16")),
    ],
)
def test_nothing_is_compiled_for_other_ways(asked: Counter[str], memory: Memory, precision: Precision) -> None:
    prepare(DEV, precision, memory)
    assert not asked


PRECISIONS = [
    *(Precision(kind, products=products) for kind in ("nf4", "int8") for products in ("bf16", "fp8", "int8")),
    NESTED,
    Precision("bf16"),
    Precision("nf4", layers={r".*ff\..*": "int8", r".*proj_out": "bf16"}),
]


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("use", [TRAINED._replace(dora=True, repeatable=True), Use(16)], ids=["training", "sampling"])
def test_each_call_can_be_made(precision: Precision, use: Use, model: Model) -> None:
    """On a CPU they compile nothing."""
    for function, arguments in kernel_calls(known_config(model, "transformer"), precision, use, CPU):
        function(*arguments)


def test_a_call_that_fails_costs_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(device: torch.device, call: Call) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(ready_kernels, "_begun", set())
    monkeypatch.setattr(ready_kernels, "_apart", short)
    monkeypatch.setattr(ready_kernels, "prepare_compiler", lambda device, pool: None)
    prepare(DEV, NF4)
    assert ready_kernels._running
    ready_kernels.wait()
    assert not ready_kernels._running
