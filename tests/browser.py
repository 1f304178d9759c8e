"""Chromium without a window, spoken to over a pipe: what a page shows, says and asks for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
_FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
_FLAGS += ["--disable-dev-shm-usage", "--disable-background-networking"]


class Browser:
    """One page at a time; ``complaints`` collects what its console says and what it asks for."""

    def __init__(self, out: int, back: int) -> None:
        self._out, self._back = out, back
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.complaints: list[str] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        attached = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        words = {"id": self._number, "method": method, "params": params}
        words |= {"sessionId": self._session} if self._session else {}
        text = json.dumps(words).encode() + b"\0"
        while text:
            text = text[os.write(self._out, text) :]
        while True:
            told = self._read()
            if told.get("id") == self._number:
                assert "error" not in told, told
                result: dict[str, Any] = told["result"]
                return result

    def open(self, page: Path, width: int, height: int = 900, *, dark: bool = False) -> None:
        phone = width < 700
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.ask("Emulation.setDeviceMetricsOverride", **metrics)
        self.ask("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while self._read().get("method") != "Page.loadEventFired":
            pass
        self.run("new Promise(done => setTimeout(done, 300))")

    def run(self, script: str) -> Any:
        asked = {"expression": script, "awaitPromise": True, "returnByValue": True}
        result = self.ask("Runtime.evaluate", **asked)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def drag(self, x: float, to_x: float, y: float) -> None:
        """Press at one point, move to another one at the same height, and let go."""
        held = {"button": "left", "buttons": 1, "clickCount": 1, "y": y}
        steps = [("Pressed", x), ("Moved", (x + to_x) / 2), ("Moved", to_x), ("Released", to_x)]
        for what, at in steps:
            self.ask("Input.dispatchMouseEvent", type=f"mouse{what}", x=at, **held)
        self.run("new Promise(done => setTimeout(done, 300))")

    def picture(self, file: Path, width: int) -> None:
        height = self.run("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(shot["data"]))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._back, 1 << 20)
            assert more, "chromium has ended"
            self._rest += more
        line, self._rest = self._rest.split(b"\0", 1)
        told: dict[str, Any] = json.loads(line)
        self._listen(told.get("method"), told.get("params", {}))
        return told

    def _listen(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {params['args']}")
        if method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']}")
        if method == "Log.entryAdded":
            self.complaints.append(f"log: {params['entry']['text']}")
        if method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "data:", "blob:", "about:")):
                self.complaints.append(f"asks for {url}")


@contextmanager
def browser() -> Iterator[Browser]:
    assert CHROMIUM is not None
    to_read, to_write = os.pipe(), os.pipe()

    theirs, ours = to_read[0], to_write[1]  # chromium reads from 3 and writes to 4
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:  # its children may live
        words = [CHROMIUM, *_FLAGS, "--remote-debugging-pipe", f"--user-data-dir={home}"]
        shell = f'exec "$@" 3<&{theirs} 4>&{ours}'
        process = subprocess.Popen(
            ["/bin/bash", "-c", shell, "sh", *words],
            pass_fds=(theirs, ours),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (theirs, ours):
            os.close(end)
        try:
            yield Browser(to_read[1], to_write[0])
        finally:
            process.kill()
            process.wait()
            os.close(to_read[1])
            os.close(to_write[0])
