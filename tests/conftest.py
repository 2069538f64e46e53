"""What several tests share."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from infer.command import ROOT
from infer.flux import Model

if TYPE_CHECKING:
    from tests.browser import Browser


@pytest.fixture(scope="session")
def tiny() -> Model:
    """The bundled checkpoint."""
    return Model(str(ROOT / "scripts" / "tiny" / "model"))


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
