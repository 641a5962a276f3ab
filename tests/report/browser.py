"""A headless browser, driven over its debugging protocol: opens a page, waits for words on it, takes a picture."""

import asyncio
import base64
import json
import shutil
import subprocess
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import urlopen

import aiohttp

Found = TypeVar("Found")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1400,1000", "--remote-debugging-port=0",
)  # fmt: skip

# Pages hide most of their text in shadow roots, which the document's own text leaves out.
_TEXT = """(function collect(node) {
  if (node.nodeType === 3) return node.textContent;
  if (["STYLE", "SCRIPT"].includes(node.nodeName)) return "";
  const inside = [...(node.shadowRoot ? [node.shadowRoot] : []), ...node.childNodes];
  return inside.map(collect).join(" ");
})(document.body)"""
_CURVES = """(function count(node) {
  const inside = [...(node.shadowRoot ? [node.shadowRoot] : []), ...(node.childNodes || [])];
  return inside.reduce((n, child) => n + count(child), node.nodeName === "path" && node.getAttribute("d") ? 1 : 0);
})(document.body)"""


class Page:
    """One open page. ``troubles`` are errors in its console and dialogs, from ``watch`` on."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._number = socket, 0
        self.troubles: list[str] = []

    async def watch(self) -> None:
        for domain in ("Runtime", "Log", "Page"):
            await self.call(f"{domain}.enable")

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            answer = await self._socket.receive_json(timeout=30)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _note(self, method: str | None, said: dict[str, Any]) -> None:
        bad = {
            "Runtime.exceptionThrown": True,
            "Runtime.consoleAPICalled": said.get("type") in {"error", "assert"},
            "Log.entryAdded": said.get("entry", {}).get("level") == "error",
            "Page.javascriptDialogOpening": True,
        }
        if method is not None and bad.get(method, False):
            self.troubles.append(json.dumps(said))

    async def open(self, url: str, *, width: int = 1400, height: int = 1000, dark: bool = False) -> None:
        """Go to a page and wait for all of it."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[colours])
        await self.call("Page.navigate", url=url)
        end = time.monotonic() + 40
        while await self.evaluate("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < end, f"{url} is not complete"
            await asyncio.sleep(0.1)

    async def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key and let it go."""
        keys = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **keys)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    async def evaluate(self, script: str) -> Any:
        return (await self.call("Runtime.evaluate", expression=script, returnByValue=True))["result"].get("value")

    async def text_with(self, words: Sequence[str], seconds: float = 40) -> tuple[str, int]:
        """All text, once it has all the words or the time is up, and the number of curves that are drawn."""
        end = time.monotonic() + seconds
        while True:
            text, curves = await self.evaluate(_TEXT), await self.evaluate(_CURVES)
            if all(word in (text or "") for word in words) or time.monotonic() > end:
                return text or "", curves or 0
            await asyncio.sleep(0.2)

    async def picture(self, path: Path) -> None:
        await asyncio.sleep(1)  # what has just arrived is still being drawn
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


def visit(steps: Callable[[Page], Awaitable[Found]], profile: Path) -> Found:
    """What ``steps`` finds on the page of a new browser."""
    assert BROWSER is not None
    process = subprocess.Popen(
        [BROWSER, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        return asyncio.run(_visit(profile / "DevToolsActivePort", steps))
    finally:
        process.terminate()
        process.wait(20)


def look(url: str, words: Sequence[str], picture: Path, profile: Path) -> tuple[str, int]:
    """Open ``url`` in a new browser; see ``Page.text_with``. Writes a picture as PNG."""

    async def steps(page: Page) -> tuple[str, int]:
        await page.call("Page.navigate", url=url)
        found = await page.text_with(words)
        await page.picture(picture)
        return found

    return visit(steps, profile)


async def _visit(address: Path, steps: Callable[[Page], Awaitable[Found]]) -> Found:
    end = time.monotonic() + 30
    while not (address.exists() and address.read_text().count("\n")) and time.monotonic() < end:
        await asyncio.sleep(0.1)
    port = address.read_text().split()[0]
    with urlopen(f"http://127.0.0.1:{port}/json/list", timeout=30) as answer:
        target = next(t for t in json.load(answer) if t["type"] == "page")["webSocketDebuggerUrl"]
    async with aiohttp.ClientSession() as session, session.ws_connect(target, max_msg_size=2**26) as socket:
        return await steps(Page(socket))
