"""A headless Chromium, driven over two pipes: the DevTools protocol, JSON with a NUL after each message.

No driver program and no port: Chromium reads commands from its descriptor 3 and writes answers and events to 4.
"""

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import attrs
import trio

# Puts our ends where Chromium looks for them; numbers above 9 first, for one of ours may be 3 or 4 itself.
LAUNCH: Final = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(text), fcntl.F_DUPFD, 10) for text in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # the tests run as root
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--no-first-run",
    "--no-default-browser-check",
    "--force-device-scale-factor=1",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP *.example 127.0.0.1",  # names of others that lead here
)


class ChromiumError(Exception):
    """A command that was refused, or an exception in the page."""


@attrs.define(eq=False)
class Browser:
    """One Chromium with one page. You get it from `open_browser`."""

    _commands: trio.lowlevel.FdStream
    _said: trio.lowlevel.FdStream
    complaints: list[str] = attrs.field(factory=list[str])
    """What the page's console, its log and its uncaught exceptions said, other than at the level of a note."""
    _session: str | None = None
    _last: int = 0
    _answers: dict[int, Any] = attrs.field(factory=dict[int, Any])
    _bells: dict[int, trio.Event] = attrs.field(factory=dict[int, trio.Event])
    _seen: set[str] = attrs.field(factory=set[str])
    _bell: trio.Event = attrs.field(factory=trio.Event)

    async def ask(self, method: str, **parameters: Any) -> Any:
        """Give a command, and wait for what it returns."""
        self._last += 1
        number = self._last
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        bell = self._bells[number] = trio.Event()
        await self._commands.send_all(json.dumps(message).encode() + b"\0")
        await bell.wait()
        answer = self._answers.pop(number)
        if "error" in answer:
            raise ChromiumError(f"{method}: {answer['error']}")
        return answer["result"]

    async def run(self) -> None:
        """Take what Chromium says, until it is gone."""
        rest = b""
        async for data in self._said:
            *messages, rest = (rest + data).split(b"\0")
            for text in messages:
                self._take(json.loads(text))
        raise ChromiumError("chromium has ended by itself")

    def _take(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._answers[message["id"]] = message
            self._bells.pop(message["id"]).set()
            return
        method, said = message["method"], message["params"]
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] not in ("verbose", "info"):
            self.complaints.append(f"{said['entry']['text']} ({said['entry'].get('url')})")
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(said["args"]))
        self._seen.add(method)
        self._bell.set()
        self._bell = trio.Event()

    async def attach(self) -> None:
        """Open the page, and listen to all that it complains of."""
        target = (await self.ask("Target.createTarget", url="about:blank"))["targetId"]
        self._session = (await self.ask("Target.attachToTarget", targetId=target, flatten=True))["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            await self.ask(f"{domain}.enable")

    async def go(self, url: str) -> None:
        """Load a page, and wait until it is."""
        self._seen.discard("Page.loadEventFired")
        answer = await self.ask("Page.navigate", url=url)
        if "errorText" in answer:
            raise ChromiumError(f"{url}: {answer['errorText']}")
        while "Page.loadEventFired" not in self._seen:
            await self._bell.wait()

    async def evaluate(self, expression: str) -> Any:
        """Return the value of an expression in the page; of a promise, what comes of it."""
        answer = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise ChromiumError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    async def until(self, expression: str, seconds: float = 30.0) -> Any:
        """Wait until an expression is true in the page, and return its value."""
        with trio.fail_after(seconds):
            while not (value := await self.evaluate(expression)):  # noqa: ASYNC110 - the page is asked
                await trio.sleep(0.02)
        return value

    async def look_as(self, width: int, height: int, scheme: str = "light", *, phone: bool = False) -> None:
        """Be a screen of this size, light or dark."""
        await self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )
        await self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    async def screenshot(self) -> bytes:
        """Take a picture of what is seen, as PNG."""
        return base64.b64decode((await self.ask("Page.captureScreenshot", format="png"))["data"])


@asynccontextmanager
async def open_browser(program: str, directory: Path) -> AsyncIterator[Browser]:
    """Start a Chromium with a profile of its own in a directory; at the end it is killed, with all its processes."""
    home = str(directory)
    (command_reads, command_writes), (answer_reads, answer_writes) = os.pipe(), os.pipe()
    async with trio.lowlevel.FdStream(command_writes) as commands, trio.lowlevel.FdStream(answer_reads) as said:
        ends = [str(command_reads), str(answer_writes)]
        try:
            process = await trio.lowlevel.open_process(
                [sys.executable, "-S", "-c", LAUNCH, *ends, program, *FLAGS, f"--user-data-dir={home}", "about:blank"],
                pass_fds=(command_reads, answer_writes),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home},
                start_new_session=True,
            )
        finally:
            os.close(command_reads)
            os.close(answer_writes)
        try:
            async with trio.open_nursery() as nursery:
                browser = Browser(commands, said)
                nursery.start_soon(browser.run)
                await browser.attach()
                yield browser
                nursery.cancel_scope.cancel()
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            with trio.CancelScope(shield=True):
                await process.wait()
