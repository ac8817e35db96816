"""A terminal for tests: programs run in tmux, with a server of its own that ends with the block."""

import contextlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence

import trio

from tests.support import require

PATIENCE = 45.0
"""Seconds that a terminal has to show what is expected: for a loaded machine."""


class Terminal:
    """A shell in a window of tmux."""

    def __init__(self, tmux: Sequence[str]) -> None:
        self._tmux = tmux

    async def tell(self, *arguments: str) -> str:
        """Run a command of tmux and return what it prints."""
        done = await trio.run_process([*self._tmux, *arguments], capture_stdout=True, capture_stderr=True, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout.decode()

    async def keys(self, *keys: str) -> None:
        """Press keys, by tmux' names."""
        await self.tell("send-keys", *keys)

    async def type(self, line: str) -> None:
        """Type a line for the shell, and Enter."""
        await self.tell("send-keys", "-l", line)
        await self.keys("Enter")

    async def resize(self, columns: int, rows: int) -> None:
        """Make the window as large as that."""
        await self.tell("resize-window", "-x", str(columns), "-y", str(rows))

    async def lines(self) -> list[str]:
        """What is on the screen, without blanks at the ends of lines."""
        return (await self.tell("capture-pane", "-p")).splitlines()

    async def flag(self, name: str) -> str:
        """A format of tmux, such as `alternate_on` and `cursor_flag`."""
        return (await self.tell("display-message", "-p", f"#{{{name}}}")).strip()

    async def until(self, condition: Callable[[list[str]], object], seconds: float = PATIENCE) -> list[str]:
        """Wait until the screen is as wanted, and return it; else fail, with what is on it."""
        lines: list[str] = []
        with trio.move_on_after(seconds):
            while True:
                lines = await self.lines()
                if condition(lines):
                    return lines
                await trio.sleep(0.05)
        raise AssertionError("the screen never became what was expected; it is:\n" + "\n".join(lines))

    async def shows(self, text: str) -> list[str]:
        """Wait until a text is somewhere on the screen."""
        return await self.until(lambda lines: any(text in line for line in lines))


@contextlib.asynccontextmanager
async def open_terminal(
    columns: int = 120, rows: int = 24, environment: dict[str, str] | None = None
) -> AsyncIterator[Terminal]:
    """Start a shell in a window of that size. Skips the test where tmux is missing, and fails it under `CI=true`."""
    program = require("tmux")
    # A server of its own, at a path that is short enough for a socket.
    with tempfile.TemporaryDirectory(prefix="tmux-") as directory:
        tmux = [program, "-S", f"{directory}/socket", "-f", "/dev/null"]
        command = ["new-session", "-d", "-x", str(columns), "-y", str(rows), "exec /bin/sh -i"]
        clean = {key: value for key, value in os.environ.items() if not key.startswith("TMUX")}
        clean |= {"LC_ALL": "C.UTF-8", "ENV": "", **(environment or {})}
        started = await trio.run_process([*tmux, *command], env=clean, capture_stderr=True, check=False)
        assert started.returncode == 0, started.stderr.decode()
        try:
            terminal = Terminal(tmux)
            await terminal.tell("set-option", "-g", "status", "off")
            await terminal.tell("set-option", "-g", "window-size", "manual")
            await terminal.resize(columns, rows)
            await terminal.until(lambda lines: any(line.rstrip().endswith(("$", "#")) for line in lines))
            yield terminal
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(10):
                await trio.run_process([*tmux, "kill-server"], capture_stderr=True, check=False)
