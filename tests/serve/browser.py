"""A real Chromium without a window, led by its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_START_S = 60.0


class Page:
    """One tab; `asked` are the addresses of all that it ever requested."""

    def __init__(self, wire: aiohttp.ClientWebSocketResponse) -> None:
        self.wire, self.number = wire, 0
        self.asked: list[str] = []

    async def call(self, method: str, **arguments: Any) -> dict[str, Any]:
        """A command's result."""
        self.number += 1
        await self.wire.send_json({"id": self.number, "method": method, "params": arguments})
        while True:
            message = await self.wire.receive_json(timeout=60)
            if message.get("method") == "Network.requestWillBeSent":
                self.asked.append(message["params"]["request"]["url"])
            if message.get("id") == self.number:
                assert "error" not in message, message["error"]
                return dict(message["result"])

    async def run(self, script: str) -> Any:
        """What an expression gives; a promise is awaited."""
        found = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, script: str, within_s: float = 30.0) -> Any:
        """The first value of an expression that is not false."""
        deadline = time.monotonic() + within_s
        while not (value := await self.run(script)):
            assert time.monotonic() < deadline, f"never: {script}"
            await asyncio.sleep(0.1)
        return value

    async def drop(self, file: Path, x: int, y: int) -> None:
        """A file, dragged from a folder to a point of the page."""
        carried = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for step in ("dragEnter", "dragOver", "drop"):
            await self.call("Input.dispatchDragEvent", type=step, x=x, y=y, data=carried)

    async def screenshot(self, file: Path) -> None:
        """What it looks like, as PNG."""
        shot = await self.call("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(shot["data"]))


@asynccontextmanager
async def page(url: str, width: int, height: int) -> AsyncIterator[Page]:
    """The page at `url` in a window of so many pixels."""
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
        command += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={home}", "about:blank"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            port = await _port(Path(home) / "DevToolsActivePort")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                    tabs = await reply.json()
                address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
                async with session.ws_connect(address, max_msg_size=0) as wire:
                    tab = Page(wire)
                    await tab.call("Network.enable")
                    await tab.call(
                        "Emulation.setDeviceMetricsOverride",
                        width=width,
                        height=height,
                        deviceScaleFactor=1,
                        mobile=True,
                    )
                    await tab.call("Page.navigate", url=url)
                    await tab.until("document.readyState === 'complete' && location.protocol !== 'about:'")
                    yield tab
        finally:
            process.terminate()
            process.wait(20)


async def _port(file: Path) -> int:
    deadline = time.monotonic() + _START_S
    while not (file.is_file() and file.read_text().strip()):
        assert time.monotonic() < deadline, "Chromium did not start"
        await asyncio.sleep(0.1)
    return int(file.read_text().split()[0])
