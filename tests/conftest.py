"""What several tests share."""

import gc
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from infer.checkpoint.model import Model
from infer.family import find
from infer.family import flux1_sizes as shapes
from infer.program.paths import ROOT

if TYPE_CHECKING:
    from tests.browser import Browser


settings.register_profile("untimed", deadline=None)  # seconds are no property, and other work may run here
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every garbage collection: the trainer asks for them, and each would look
    through all objects of torch and of the tests again, for half a second."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(mark.kwargs.get("reason") == "needs a GPU" for mark in item.iter_markers("skipif")):
            item.add_marker("gpu")


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
