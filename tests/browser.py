"""A headless Chromium that opens our pages as a person would: clicks, keys, sizes, colour schemes, screenshots.

Take the fixture `browser` (tests/conftest.py), which starts it once. Where there is no Chromium the tests that need it
are skipped, except under CI=true, where its absence is a failure. On Debian and Ubuntu:

    apt-get install -y --no-install-recommends chromium chromium-driver
"""

import io
import json
import os
import shutil
import time
from base64 import b64decode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

FLAGS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--force-color-profile=srgb",
    "--font-render-hinting=none",
)
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")


def programs() -> tuple[str, str] | None:
    """Paths of Chromium (or Chrome) and of its driver; None if one of them is not installed."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    return (found, driver) if found and driver else None


class Browser:
    """One tab."""

    def __init__(self, chromium: str, driver: str) -> None:
        options = ChromeOptions()
        options.binary_location = chromium
        for flag in FLAGS:
            options.add_argument(flag)
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # Chromium refuses to run sandboxed as root
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = Chrome(options, ChromeService(driver))  # a path given: selenium looks for no download

    def open(self, page: Path, fragment: str = "") -> None:
        """Load a file afresh: nothing stored, logs empty, 1280 x 900 pixels, light, no element focused."""
        self.driver.get("about:blank")
        self.cdp("Storage.clearDataForOrigin", origin="file://", storageTypes="all")
        self.size(1280, 900)
        self.scheme("light")
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.driver.get(page.resolve().as_uri() + (f"#{fragment}" if fragment else ""))

    def cdp(self, command: str, **arguments: Any) -> Any:
        """A command of the DevTools protocol."""
        return self.driver.execute_cdp_cmd(command, arguments)

    def size(self, width: int, height: int, phone: bool = False) -> None:
        """Size of the page in CSS pixels; a phone has two pixels for each of them, and touch."""
        scale = 2 if phone else 1
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        self.cdp("Emulation.setTouchEmulationEnabled", enabled=phone)

    def scheme(self, name: str) -> None:
        """What the system prefers: light or dark."""
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def js(self, code: str, *arguments: Any) -> Any:
        """What the body of a function returns; an expression needs `return`."""
        return self.driver.execute_script(code, *arguments)

    def wait(self, expression: str, *arguments: Any, seconds: float = 10) -> Any:
        """The value of a JavaScript expression as soon as it is true.

        Raises:
            AssertionError: it was not within that time.
        """
        end = time.monotonic() + seconds
        while not (value := self.js(f"return {expression}", *arguments)):
            assert time.monotonic() < end, f"not within {seconds} s: {expression}"
            time.sleep(0.02)
        return value

    def press(self, *keys: str) -> None:
        """Keys to whatever has the focus."""
        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def drag(self, start: tuple[float, float], *points: tuple[float, float]) -> None:
        """The left button goes down at one point of the page, in CSS pixels from the top left, and up at the last."""
        actions = ActionChains(self.driver, duration=10)
        pointer = actions.w3c_actions.pointer_action
        pointer.move_to_location(*map(round, start)).pointer_down()
        for point in points:
            pointer.move_to_location(*map(round, point))
        pointer.pointer_up()
        actions.perform()

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element within the window, in CSS pixels."""
        code = "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
        left, top, width, height = self.js(f"{code} return [b.x, b.y, b.width, b.height]", selector)
        return left, top, width, height

    def shot(self, path: Path, whole: bool = False) -> None:
        """A PNG of the window, or of the whole page."""
        answer = self.cdp("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b64decode(answer["data"]))

    def pixels(self) -> np.ndarray:
        """The window as it is seen, [height, width, 3] of uint8, in pixels of the device."""
        png = b64decode(self.cdp("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))

    def touch(self, *moments: Sequence[tuple[float, float]]) -> None:
        """Fingers go down at the first moment's points, move through the others' and leave."""
        for i, points in enumerate(moments):
            places = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(points)]
            self.cdp("Input.dispatchTouchEvent", type="touchMove" if i else "touchStart", touchPoints=places)
        self.cdp("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def requests(self) -> list[str]:
        """Addresses asked for since the last call (or `open`), the page itself included, what it embeds left out."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [e["params"]["request"]["url"] for e in entries if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("data:", "about:"))]

    def problems(self) -> list[str]:
        """What the console says since the last call (or `open`): errors of scripts, refused requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def overflow(self) -> float:
        """CSS pixels by which the page is wider than the window; 0 where nothing must be scrolled sideways."""
        return float(self.js("const r = document.documentElement; return r.scrollWidth - r.clientWidth"))

    def tab_stops(self, most: int = 200) -> Sequence[str]:
        """What Tab reaches from the top, each as its accessible name or its markup's start, up to the first again."""
        # Tab goes on from what had the focus last, even after blur(): the body gets it for a moment.
        self.js("const b = document.body; b.tabIndex = -1; b.focus(); b.removeAttribute('tabindex'); scrollTo(0, 0)")
        stops: list[str] = []
        name = (
            "const e = document.activeElement; return e === document.body ? '' : e.ariaLabel || e.textContent.trim()"
            " || e.querySelector('img')?.alt || e.outerHTML.slice(0, 80)"
        )
        for _ in range(most):
            self.press("\ue004")
            stop = str(self.js(name))
            if not stop:
                break
            stops.append(stop)
        return stops

    def close(self) -> None:
        self.driver.quit()
