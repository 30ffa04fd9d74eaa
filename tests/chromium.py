"""A page as a real browser shows it: headless Chromium through its debugging pipe, with nothing installed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

#: The browser reads its commands at descriptor 3 and answers at 4, whatever numbers these have here.
_PLUMBING = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@dataclass
class Page:
    """What came of opening a page."""

    messages: list[str] = field(default_factory=list)  #: warnings, errors, exceptions and refusals by the page's policy
    requests: list[str] = field(default_factory=list)  #: addresses that were asked for, the page and data: left out
    width: int = 0  #: CSS pixels that the page is wide
    height: int = 0
    text: str = ""  #: as it is seen
    values: list[Any] = field(default_factory=list)  #: of the expressions that were asked for
    screenshot: bytes = b""  #: PNG of the whole page


class Browser:
    """One Chromium. Pages are opened one after the other."""

    def __init__(self, to_browser: int, from_browser: int):
        self._to, self._from = to_browser, from_browser
        self._buffer, self._sent = b"", 0
        self._events: list[dict[str, Any]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, width: int = 1280, ask: tuple[str, ...] = (), screenshot: bool = False) -> Page:
        """Open a file at a viewport of that width. ask: JavaScript expressions whose values to give back."""
        mobile = width < 600
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=mobile)
        self._events.clear()
        url = file.absolute().as_uri()
        self._call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        page = Page(width=self._value("document.documentElement.scrollWidth"))
        page.height = self._value("document.documentElement.scrollHeight")
        page.text = self._value("document.body.innerText")
        page.values = [self._value(expression) for expression in ask]
        if screenshot:
            clip = {"x": 0, "y": 0, "width": width, "height": page.height, "scale": 1}
            shot = self._call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
            page.screenshot = base64.b64decode(shot["data"])
        for event in self._events:
            method, told = event["method"], event["params"]
            if method in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"):
                page.messages.append(json.dumps(told))
            elif method == "Network.requestWillBeSent":
                address = told["request"]["url"]
                page.requests += [] if address == url or address.startswith("data:") else [address]
        return page

    def _value(self, expression: str) -> Any:
        told = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        number = self._sent
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                found: dict[str, Any] = answer["result"]
                return found

    def _read(self) -> dict[str, Any]:
        """The next message; an event is kept as well."""
        while b"\0" not in self._buffer:
            data = os.read(self._from, 1 << 20)
            assert data, "Chromium has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self._events.append(message)
        return message


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder. Skips the test where there is no Chromium."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium here")
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    quiet = ("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update")
    plumbing = (sys.executable, "-c", _PLUMBING, str(commands), str(answers))
    process = subprocess.Popen(
        [*plumbing, found, *options, *quiet, f"--user-data-dir={profile}", "--remote-debugging-pipe"],
        pass_fds=(commands, answers),
        stderr=subprocess.DEVNULL,
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        os.close(to_browser)  # it ends when its commands do
        os.close(from_browser)
        process.wait(30)
