"""A model of each family."""

import pytest

from infer.checkpoint.model import Model


@pytest.fixture(params=["flux1", "flux2"])
def model(request: pytest.FixtureRequest) -> Model:
    """The bundled FLUX.1, and a random tiny FLUX.2."""
    found: Model = request.getfixturevalue("tiny" if request.param == "flux1" else "klein")
    return found
