"""What several tests share."""

import pytest

from infer.command import ROOT
from infer.flux import Model


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The bundled checkpoint."""
    return Model(str(ROOT / "scripts" / "tiny" / "model"))
