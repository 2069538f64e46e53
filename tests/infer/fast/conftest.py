"""A model of each family."""

import pytest

from infer.checkpoint.load import Model
from tests.infer.fast.families import make_klein


@pytest.fixture(scope="session")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A random tiny FLUX.2."""
    return make_klein(tmp_path_factory.mktemp("klein"))


@pytest.fixture(params=["flux1", "flux2"])
def model(request: pytest.FixtureRequest) -> Model:
    """The bundled FLUX.1, and a random tiny FLUX.2."""
    found: Model = request.getfixturevalue("tiny" if request.param == "flux1" else "klein")
    return found
