"""Every numeric setting of every command has a lower and an upper bound, and refuses what is no number."""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from infer.adapter.attach import shapes_of
from infer.adapter.targets import match_targets
from infer.checkpoint.load import load_transformer
from infer.checkpoint.model import Model
from infer.program.bounds import check_most
from infer.program.command import run_command
from infer.program.literal import required
from infer.program.paths import ROOT
from infer.program.secrets import check_values
from infer.program.settings import explain
from infer.quantize.precision import Precision
from tests.test_config import ROOTS

HUGE = 10**30


def numbers(kind: Any, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Each numeric setting below a type: its name, how a value of it is written on the command line, and its type."""
    for field, own in get_type_hints(kind).items():
        own, _ = required(own)
        where = f"{name}.{field}".lstrip(".")
        if own in (int, float):
            yield where, where + "={}", own
        elif where == "data.resolution":
            yield where, where + "={}", int
            yield where, where + "=[64,{}]", int
        elif is_dataclass(own):
            yield from numbers(own, where)
        elif get_origin(own) is list and get_args(own)[0] in (int, float):
            yield where, where + "=[0,{}]", get_args(own)[0]
        elif get_origin(own) is list and is_dataclass(get_args(own)[0]):
            for entry, form, inner in numbers(get_args(own)[0]):
                yield f"{where}.{entry}", f"{where}=[{{{{path:a,{form}}}}}]".replace("={}", ":{}"), inner
        elif get_origin(own) is dict and is_dataclass(get_args(own)[1]):
            yield from numbers(get_args(own)[1], f"{where}.nf4")


SETTINGS = [(root, name, form, kind) for root, schema in ROOTS.items() for name, form, kind in numbers(schema)]
# the whole of train; of the others what train has not
KNOWN = {name for root, name, _, _ in SETTINGS if root == "train"}
CHOSEN = [one for one in SETTINGS if one[0] == "train" or one[1] not in KNOWN]
MORE = {
    "sensitivity": ["budget_gib=1"],
    "compare": ["adapter.path=a"],
    "merge": ["adapter.path=a"],
    "gap": ["adapter.path=a"],
}
PRIOR = ["data.prior.count=2", "data.prior.prompt=dog"]


@pytest.fixture(scope="module")
def composed() -> Iterator[Callable[[str, bool], Any]]:
    for name, schema in ROOTS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        yield cache(lambda root, prior: compose(root, [*MORE.get(root, []), *(PRIOR if prior else [])]))
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("root, name, form, kind", CHOSEN, ids=[f"{root} {form}" for root, _, form, _ in CHOSEN])
def test_a_number_out_of_bounds_or_none_is_refused(
    composed: Callable[[str, bool], Any], root: str, name: str, form: str, kind: Any
) -> None:
    prior, last = ".prior." in name and not name.endswith(".count"), name.rpartition(".")[2]
    for value in (HUGE, -HUGE, "nan", "inf", "many", "true", *([1.5] if kind is int else [])):
        (override,) = OverridesParser.create().parse_overrides([form.format(value)])
        config = copy.deepcopy(composed(root, prior))
        try:
            OmegaConf.update(config, override.key_or_group, override.value())
            check_values(OmegaConf.to_object(config))
        except OmegaConfBaseException as error:
            said = explain(error, ROOTS[root])
        except ValueError as error:
            said = str(error)
        else:
            pytest.fail(f"{form.format(value)} is taken")
        assert last in said or "share" in said or "budget" in said, (value, said)
        assert len(said) < 400


@pytest.mark.parametrize(
    "argument", ["steps=" + "9" * 5000, "optim.lr=" + "9" * 5000, "data.resolution=[" + "1" * 5000]
)
def test_a_number_too_long_to_read_is_refused(
    argument: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", argument])
    with pytest.raises(SystemExit) as stop:
        run_command("train", ROOTS["train"], lambda _: pytest.fail("it ran"))
    GlobalHydra.instance().clear()
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and argument.partition("=")[0] in said and len(said) < 400


def test_what_is_within_bounds_passes() -> None:
    class Holder:
        seed, steps, seeds, none = -5, 10, [1, -2], None

    check_most(Holder, "", seed=5, steps=10, seeds=2, none=1)
    for name, limit, said in (
        ("seed", 4, "x.seed is -5; it must be -4 or more"),
        ("steps", 9, "x.steps is 10; it must be 9"),
    ):
        with pytest.raises(ValueError, match=said):
            check_most(Holder, "x.", **{name: limit})


def test_every_dataclass_with_numbers_is_met() -> None:
    met = {name.rpartition(".")[2] for _, name, _, _ in SETTINGS}
    assert {"rank", "lr", "seed", "seeds", "text_length", "resolution", "weight", "share", "fit_gib", "gpus"} <= met
    assert len(CHOSEN) > 70 and all(is_dataclass(schema) and fields(schema) for schema in ROOTS.values())


def test_a_rank_is_no_wider_than_a_layer(tiny: Model) -> None:
    import torch

    transformer = load_transformer(tiny, Precision("bf16"), torch.device("cpu"))
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, torch.nn.Linear)}
    least = min(min(layer.in_features, layer.out_features) for layer in layers.values())
    assert match_targets(shapes_of(transformer), "all", least)
    with pytest.raises(ValueError, match=rf"adapter.rank is {least + 1}, but .* set adapter.rank={least} or less"):
        match_targets(shapes_of(transformer), "all", least + 1)
    width = transformer.inner_dim
    assert match_targets(shapes_of(transformer), "attention", width)
    with pytest.raises(ValueError, match=f"set adapter.rank={width} or less"):
        match_targets(shapes_of(transformer), "attention", width + 1)
