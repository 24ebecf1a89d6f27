"""A headless Chromium, driven through chromedriver by the W3C's WebDriver protocol: JSON over HTTP."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--hide-scrollbars", "--lang=en"),
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"
ESCAPE, ENTER, SHIFT, RIGHT, DOWN = "\ue00c", "\ue007", "\ue008", "\ue014", "\ue015"
CONTROL = "\ue009"
PATIENCE = 120.0


def installed() -> bool:
    return all(shutil.which(name) for name in ("chromium", "chromedriver"))


class Browser:
    """One window. Close it."""

    def __init__(self, profile: Path) -> None:
        """`profile`: a new folder for what Chromium keeps."""
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._driver.stdout is not None
        port = next(
            found[1]
            for line in self._driver.stdout
            if (found := re.search(r"successfully on port (\d+)", line))
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE)
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={profile}"],
            },
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        try:
            answer = self._http.post("/session", json={"capabilities": {"alwaysMatch": wanted}}).json()
            self._session = f"/session/{answer['value']['sessionId']}"
        except BaseException:
            self._driver.kill()
            raise

    def close(self) -> None:
        self._http.delete(self._session)
        self._http.close()
        self._driver.terminate()
        self._driver.wait(PATIENCE)

    def _do(self, method: str, path: str, **body: Any) -> Any:
        answer = self._http.request(
            method, f"{self._session}/{path}", json=body if method == "POST" else None
        )
        value = answer.json()["value"]
        if answer.status_code != 200:
            raise LookupError(f"{path}: {value['error']}: {value['message'].splitlines()[0]}")
        return value

    def go(self, url: str) -> None:
        self._do("POST", "url", url=url)

    def size(self, width: int, height: int, *, dark: bool = False, scale: float = 1) -> None:
        """The inside of the window, in CSS pixels."""
        mobile = width < 600
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": mobile}
        self._cdp("Emulation.setDeviceMetricsOverride", **metrics)
        self._cdp("Emulation.setTouchEmulationEnabled", enabled=mobile)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self._cdp("Emulation.setEmulatedMedia", features=features)

    def _cdp(self, command: str, **parameters: Any) -> Any:
        return self._do("POST", "goog/cdp/execute", cmd=command, params=parameters)

    def grant(self, permission: str) -> None:
        """What the user of a window allows by using it, and nobody does of a headless one."""
        self._cdp("Browser.grantPermissions", permissions=[permission])

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns."""
        return self._do("POST", "execute/sync", script=script, args=list(arguments))

    def text(self, css: str) -> str:
        """Of the first that there is, as it is shown; "" without one."""
        text: str = self.run("return document.querySelector(arguments[0])?.innerText ?? ''", css)
        return text

    def count(self, css: str) -> int:
        """Those that can be seen."""
        script = "return [...document.querySelectorAll(arguments[0])].filter(e => e.checkVisibility()).length"
        count: int = self.run(script, css)
        return count

    def _find(self, css: str) -> str:
        found: str = self._do("POST", "element", using="css selector", value=css)[ELEMENT]
        return found

    def click(self, css: str) -> None:
        self._do("POST", f"element/{self._find(css)}/click")

    def type(self, css: str, keys: str) -> None:
        self._do("POST", f"element/{self._find(css)}/value", text=keys)

    def point(self, css: str, x: int, y: int) -> None:
        """Move the mouse to a place of an element, from its upper left corner."""
        left, top = self.run(
            "const box = document.querySelector(arguments[0]).getBoundingClientRect();"
            "return [box.left, box.top]",
            css,
        )
        move = {"type": "pointerMove", "duration": 0, "x": round(left + x), "y": round(top + y)}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._do("POST", "actions", actions=[mouse])

    def remember(self, css: str) -> Callable[[], str]:
        """A function that gives all that the element has said since now, however shortly."""
        self.run(
            "const node = document.querySelector(arguments[0]); window.said = '';"
            "const watch = new MutationObserver(() => window.said += node.textContent + ' ');"
            "watch.observe(node, {childList: true})",
            css,
        )
        return lambda: str(self.run("return window.said"))

    def until(self, what: Callable[[], Any]) -> Any:
        """What it gives, once that is true."""
        deadline = time.monotonic() + PATIENCE
        while not (value := what()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return value

    def log(self) -> list[str]:
        """What the console said since the last call: errors, breaches of the page's policy."""
        return [entry["message"] for entry in self._do("POST", "se/log", type="browser")]

    def picture(self) -> bytes:
        """The window, as PNG."""
        return base64.b64decode(self._do("GET", "screenshot"))
