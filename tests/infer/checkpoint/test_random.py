"""model.weights=random through training and comparison, at a small size: what users run before they download."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from infer.checkpoint.model import Model
from infer.compare import compare
from infer.comparison.settings import Compare
from infer.fast.install import Memory
from infer.quantize.precision import Precision
from infer.sample.generate import Sampling
from scripts.tiny.make_style import make_style
from train.data.dataset import Data
from train.run.config import Train
from train.train import train


def test_training_and_comparing_need_no_checkpoint(
    random_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_style(Path("pictures"), 3, 0)
    data = Data(path="pictures", resolution=64, text_length=32, validation=0)
    job = Train(
        model=random_model, data=data, steps=2, save_every=0, validate_every=0, previews=[], device="cpu", run="random"
    )
    folder = train(job)
    lines = [json.loads(line) for line in Path("runs/random/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    options = Compare(
        model=random_model,
        precisions={kind: Precision(kind) for kind in ("bf16", "nf4")},
        prompts=["a fox"],
        sampling=Sampling(steps=2, height=64, width=64),
        text_length=32,
        device="cpu",
        run="random",
    )
    options.adapter.path = str(folder)
    rows = json.loads((compare(options) / "results.json").read_text())["rows"]
    assert len(rows) == 4
    with Image.open(Path("runs/random/compare") / rows[0]["image"]) as picture:
        assert picture.size == (64, 64) and np.unique(np.asarray(picture)).size > 50


def test_each_shape_is_compiled_once(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    from infer.adapter.attach import attach
    from infer.adapter.lora import Adapter
    from infer.checkpoint.load import load_transformer
    from infer.fast import install as fast
    from train.objective.flow_matching import predict

    monkeypatch.setattr(fast, "BACKEND", "eager")  # traced, and run as it is
    torch._dynamo.reset()
    transformer = load_transformer(tiny, Precision("nf4"), torch.device("cpu")).train()
    attach(transformer, Adapter(rank=4), 0)
    fast.install(transformer, Memory("nothing", compile=True), torch.device("cpu"))
    config = transformer.config

    def step(height: int, width: int) -> int:
        x = torch.randn(1, config.in_channels // 4, height, width)
        t5, pooled = torch.randn(1, 8, config.joint_attention_dim), torch.randn(1, config.pooled_projection_dim)
        before = counters["stats"]["unique_graphs"]
        predict(transformer, x, t5, pooled, torch.tensor([0.5]), 1.0, torch.bfloat16).sum().backward()
        return int(counters["stats"]["unique_graphs"] - before)

    first = [step(8, 8), step(8, 12)]
    assert first == [2, 0]  # a double and a single block, for every size
    assert [step(8, 8), step(8, 12), step(8, 8)] == [0, 0, 0]
