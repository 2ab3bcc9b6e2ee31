"""A headless Chromium that a test drives over pipes, by its DevTools protocol.

https://chromedevtools.github.io/devtools-protocol/: messages are JSON, each ended by a NUL.
"""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.report.test_report import BROWSER, FLAGS

STAYING = tuple(flag for flag in FLAGS if not flag.startswith("--virtual-time"))  # else it ends
# What runs before the browser, in its process: it expects its pipes at 3 and 4.
PLUG = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """A browser process; a context manager."""

    def __init__(self, profile: Path) -> None:
        asked, said = os.pipe(), os.pipe()
        # Its own 3 and 4; from 10 on none of both is one of these already.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (asked[0], said[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-c", PLUG, *map(str, ends), BROWSER, *STAYING,
             f"--user-data-dir={profile}", "--remote-debugging-pipe"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, pass_fds=ends,
        )  # fmt: skip
        for end in (*ends, asked[0], said[1]):
            os.close(end)
        self._write, self._read = asked[1], os.fdopen(said[0], "rb")
        self._numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            os.close(self._write)
        self._process.kill()
        self._process.wait()
        self._read.close()

    def call(self, method: str, session: str = "", **params: Any) -> dict[str, Any]:
        """The result of a command; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            said = self._message()
            if said.get("id") == number:
                assert "error" not in said, said["error"]
                return said["result"]
            self.events.append(said)

    def _message(self) -> dict[str, Any]:
        data = bytearray()
        while (byte := self._read.read(1)) != b"\0":
            assert byte, "the browser has gone"
            data += byte
        return json.loads(data)

    def open(self, url: str, width: int = 1200, height: int = 900) -> Tab:
        """A page in a profile of its own."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call(
            "Target.createTarget", url="about:blank", browserContextId=context,
            width=width, height=height,
        )["targetId"]  # fmt: skip
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        tab.call("Page.navigate", url=url)
        return tab


class Tab:
    """A page of the browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command for this page."""
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is there."""
        said = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def wait(self, condition: str, seconds: float = 30.0) -> None:
        """Returns once a condition holds."""
        end = time.monotonic() + seconds
        holds = f"(() => {{ try {{ return Boolean({condition}) }} catch {{ return false }} }})()"
        while not self.value(holds):
            assert time.monotonic() < end, (condition, self.value("document.body.innerText"))
            time.sleep(0.01)

    def press(self, key: str) -> None:
        """A key goes down, as on a keyboard, and up."""
        special = {"Enter": ("\r", 13), "Tab": ("", 9), " ": (" ", 32)}
        text, code = special.get(key, (key, ord(key[0].upper())))
        about = {"key": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def type(self, text: str) -> None:
        """Text is put where the caret is."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path) -> None:
        """Writes what is seen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
