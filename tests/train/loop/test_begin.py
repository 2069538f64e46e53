"""What a run does before anything is loaded: kernels are compiled for those that will run them."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infer.adapter.lora import Adapter
from infer.checkpoint.model import Model
from infer.fast.kernel_calls import Use
from infer.fast.memory import Memory
from infer.quantize.precision import Precision
from train.data.dataset import Data
from train.loop.session import Run
from train.ranks.launch import make_accelerator
from train.run.config import Train
from train.state.signals import StopSignals

BEGIN = importlib.import_module("train.loop.begin")
LORA = Adapter(rank=4, alpha=4.0)


@pytest.mark.parametrize(
    ("changes", "use"),
    [
        ({}, Use(4, learns=True)),
        ({"deterministic": True}, Use(4, learns=True, repeatable=True)),
        ({"adapter": replace(LORA, dora=True)}, Use(4, learns=True, dora=True)),
        ({"adapter": replace(LORA, dropout=0.1)}, None),
        ({"adapter": replace(LORA, kind="loha")}, None),
        ({"memory": Memory("nothing", fused=False)}, None),
        ({"precision": Precision("int8", llm_int8=True)}, None),
    ],
)
def test_kernels_are_prepared_for_the_fast_path_alone(
    changes: dict[str, Any], use: Use | None, tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    asked: list[Use] = []
    monkeypatch.setattr(BEGIN, "prepare_kernels", lambda config, precision, memory, device, use: asked.append(use))
    job = Train(
        model=tiny, precision=Precision("nf4"), adapter=LORA, memory=Memory(), data=Data("pictures", 64), device="cpu"
    )
    job = replace(job, **changes)
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    BEGIN.begin(Run(job, folder, make_accelerator(job), StopSignals(), None))
    assert asked == ([] if use is None else [use])
