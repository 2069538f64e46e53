"""What several tests share, and what keeps them quick."""

import gc
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from infer.checkpoint.model import Model
from infer.family import find
from infer.family import flux1_sizes as shapes
from infer.program.paths import ROOT
from tests.quantized_once import remember_quantized

if TYPE_CHECKING:
    from tests.browser import Browser


settings.register_profile("untimed", deadline=None)  # seconds are no property, and other work may run here
settings.load_profile("untimed")


DEAREST = (
    "infer/adapter/test_pairs.py",
    "infer/fast/test_fast.py",
    "infer/fast/test_half.py",
    "infer/fast/test_families.py",
    "infer/fast/test_attention.py",
    "infer/fast/test_eight_bit.py",
    "train/loop/test_train.py",
    "train/state/test_resume.py",
    "test_terminal.py",
    "scripts/test_proofs.py",
    "scripts/test_notebook.py",
    "infer/adapter/test_residual.py",
    "infer/quantize/test_compute.py",
    "train/loop/test_klein.py",
    "train/ranks",
    "train/probe",
    "test_config.py",
    "infer/program",
    "train/watch",
    "train/latents",
    "train/sweeps",
    "train/state",
    "train/loop",
    "infer/report",
)
"""Files and folders whose tests take longest. They come first: what is begun last is short, and no process waits long
for another one."""
_modules = 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        own = item.path.relative_to(ROOT / "tests").as_posix()
        return next((i for i, name in enumerate(DEAREST) if f"{own}/".startswith(f"{name}/")), len(DEAREST))

    items.sort(key=place)
    for item in items:
        if any(mark.kwargs.get("reason") == "needs a GPU" for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


def pytest_collection_finish() -> None:
    pytest_runtest_logfinish()
    if "bitsandbytes" in sys.modules:
        remember_quantized()
    os.fsync = lambda file: None  # no test takes the machine's power away; those of failing disks put in their own


def pytest_runtest_logfinish() -> None:
    """Leave what is imported by now out of every garbage collection: the trainer asks for them, and each would look
    through all objects of torch and of the tests again, for half a second."""
    global _modules
    if len(sys.modules) > _modules + 100:
        gc.collect()
        gc.freeze()
        _modules = len(sys.modules)


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The bundled checkpoint."""
    return Model(str(ROOT / "scripts" / "tiny" / "model"))


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random tiny FLUX.2 klein, base."""
    from tests.tiny_klein import make_klein

    return Model(str(make_klein(tmp_path_factory.mktemp("klein") / "base")))


SMALL = {
    "index": shapes.DEV["index"],
    "transformer": shapes.DEV["transformer"]
    | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "joint_attention_dim": 64},
    "vae": shapes.DEV["vae"] | {"block_out_channels": [32, 32, 32, 32], "sample_size": 64},
    "text_encoder": shapes.DEV["text_encoder"] | {"num_hidden_layers": 1},
    "text_encoder_2": shapes.DEV["text_encoder_2"] | {"d_model": 64, "d_ff": 128, "num_layers": 1, "num_heads": 1},
    "scheduler": shapes.DEV["scheduler"],
}


@pytest.fixture
def random_model(monkeypatch: pytest.MonkeyPatch) -> Model:
    """FLUX.1-dev's code paths at a small size."""
    monkeypatch.setitem(find.SIZES, "black-forest-labs/FLUX.1-dev", SMALL)
    return Model("black-forest-labs/FLUX.1-dev", weights="random")


@pytest.fixture
def loss_picture() -> None:
    """Trainings draw loss.png, which takes as long as several of their steps; see `no_loss_picture`."""


@pytest.fixture(autouse=True)
def no_loss_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings do not draw loss.png, but where a test that looks at it takes `loss_picture`."""
    if "loss_picture" not in request.fixturenames and "train.loop.fit" in sys.modules:
        monkeypatch.setattr("train.loop.fit.draw_loss", lambda run: None)


@pytest.fixture(scope="session")
def browser() -> "Iterator[Browser]":
    """A headless Chromium; see tests/browser.py."""
    from tests.browser import IN_CI, Browser, programs

    installed = programs()
    if installed is None:
        message = "no Chromium with its driver is installed (Debian: apt-get install chromium chromium-driver)"
        pytest.fail(message) if IN_CI else pytest.skip(message)
    opened = Browser(*installed)
    yield opened
    opened.close()
