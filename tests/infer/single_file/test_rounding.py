"""What a file's own rounding costs: the figures that users are told, measured on the bundled model's weights."""

import pytest
import torch
from torch import Tensor

from infer.quantize.layer import quantized_layer
from infer.quantize.precision import Precision
from infer.single_file.rounding import LIKE, ROUNDED, TO, rounded_twice
from tests.infer.single_file import files

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    """The matrices of the blocks, as Black Forest Labs' files have them."""
    whole = files.original(files.part("scripts/tiny/model", "transformer"))
    return [value.float() for name, value in whole.items() if "blocks" in name and value.ndim == 2]


def rounded(value: Tensor, kind: str) -> Tensor:
    if kind in ("e4m3", "e5m2"):
        return value.to({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[kind]).float()
    import gguf

    wanted = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), wanted), wanted))


def made(value: Tensor, kind: str) -> Tensor:
    """A weight as it is stored at a precision."""
    import bitsandbytes as bnb

    layer = quantized_layer(value, Precision(kind), CPU)
    if kind == "int8":
        state = layer.state_dict()
        return state["weight"].float() * state["SCB"][:, None] / 127
    return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def error(found: list[Tensor], true: list[Tensor]) -> float:
    off = sum(float((a - b).square().sum()) for a, b in zip(found, true, strict=True))
    return float(100 * (off / sum(float(b.square().sum()) for b in true)) ** 0.5)


@pytest.mark.parametrize("kind", ROUNDED)
def test_what_a_kind_of_file_has_rounded(weights: list[Tensor], kind: str) -> None:
    assert error([rounded(value, kind) for value in weights], weights) == pytest.approx(ROUNDED[kind], rel=0.1)


@pytest.mark.parametrize("kind", TO)
def test_what_a_precision_rounds(weights: list[Tensor], kind: str) -> None:
    assert error([made(value, kind) for value in weights], weights) == pytest.approx(TO[kind], rel=0.1)


def test_two_roundings_add_up_by_squares(weights: list[Tensor]) -> None:
    for kind in ("e4m3", "Q8_0", "Q5_0", "Q4_0"):
        found = error([made(rounded(value, kind), "nf4") for value in weights], weights)
        note = rounded_twice("a.gguf", [kind] * 3 + ["fp32"], Precision("nf4"))
        assert note is not None and f"stores 3 of 4 weights as {kind}, which has rounded them by about" in note
        told = float(note.split("as nf4 they are about ")[1].split(" %")[0])
        assert found == pytest.approx(told, rel=0.12), kind


def test_what_is_not_known_is_not_said() -> None:
    assert rounded_twice("a", ["bf16", "fp32"], Precision("nf4")) is None
    for kind, said in (("Q6_K", "what that cost is not known"), ("Q5_K", "by about 3.7 % already: as nf4")):
        note = rounded_twice("a", [kind], Precision("nf4"))
        assert note is not None and said in note
    assert "as bf16" not in (rounded_twice("a", ["e4m3"], Precision("bf16")) or "as bf16")
    assert all(other in ROUNDED for other in LIKE.values())
