"""The keyboard and the screen of a terminal, for a command that draws itself anew: raw bytes, no thread."""

import contextlib
import os
import re
import select
import termios
from typing import Final

import trio

_NAMES: Final = {
    b"A": "up", b"B": "down", b"5~": "page up", b"6~": "page down",
    b"H": "home", b"1~": "home", b"7~": "home", b"F": "end", b"4~": "end", b"8~": "end",  # terminals differ
}  # fmt: skip
_SEQUENCE: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~])")
"""What a key sends that is no letter: ECMA-48's control sequence, or `ESC O` and a letter."""
_BEGUN: Final = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|O)?\Z")
_LONGEST_SEQUENCE: Final = 32

# Alternate screen, cursor off, no line goes on in the next: a text whose width the terminal sees otherwise than we do
# spoils its own line at most.
_ENTER: Final = b"\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J"
_LEAVE: Final = b"\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
_LEAVE_WITHIN: Final = 1000
"""Milliseconds that a terminal which takes nothing may keep a command from its end."""


class KeyReader:
    """Makes keys of the bytes that a terminal sends: letters as themselves, others by name, unknown ones left out."""

    def __init__(self) -> None:
        self._rest: bytes = b""

    def receive(self, data: bytes) -> list[str]:
        """Take bytes, and return the keys that are complete."""
        data = self._rest + data
        self._rest = b""
        keys: list[str] = []
        while data:
            if data[0] != 0x1B:
                if 0x20 <= data[0] < 0x7F:
                    keys.append(chr(data[0]))
                data = data[1:]
            elif found := _SEQUENCE.match(data):
                name = _NAMES.get(found[0][2:])
                if name is not None:
                    keys.append(name)
                data = data[found.end() :]
            elif _BEGUN.match(data) and len(data) < _LONGEST_SEQUENCE:
                self._rest = data
                break
            else:
                data = data[1:]  # the escape key itself, before another
        return keys


class Screen:
    """The alternate screen and the keyboard of the terminal at two file descriptors, from `enter` to `leave`."""

    def __init__(self, keyboard: int, screen: int) -> None:
        self._keyboard = keyboard
        self._screen = screen
        self._before: list[object] | None = None

    def enter(self) -> None:
        """Hear each key by itself and show none; Ctrl-C and Ctrl-Z stay signals, Ctrl-S stops nothing."""
        # Kept from the first time on: another `enter` may be after a stop, and then the shell's mode is not ours.
        mode = termios.tcgetattr(self._keyboard)
        self._before = [*mode[:6], list(mode[6])]
        mode[0] &= ~termios.IXON
        mode[3] = mode[3] & ~(termios.ECHO | termios.ICANON) | termios.ISIG
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._keyboard, termios.TCSANOW, mode)
        self._put(_ENTER)

    def leave(self) -> None:
        """Give the terminal back as it was found. Without an `enter` before it does nothing."""
        before, self._before = self._before, None
        if before is None:
            return
        with contextlib.suppress(OSError, termios.error):  # it may be gone
            self._put(_LEAVE)
        with contextlib.suppress(OSError, termios.error):
            termios.tcsetattr(self._keyboard, termios.TCSANOW, before)  # type: ignore[arg-type]

    def _put(self, data: bytes) -> None:
        poll = select.poll()
        poll.register(self._screen, select.POLLOUT)
        while data and poll.poll(_LEAVE_WITHIN):
            data = data[os.write(self._screen, data) :]

    def size(self) -> tuple[int, int]:
        """Return how many columns and lines there are."""
        size = os.get_terminal_size(self._screen)
        # A serial line may not know.
        return size.columns or 80, size.lines or 24

    async def read(self) -> bytes:
        """Wait for keys, and return their bytes; none where the terminal is gone."""
        while True:
            await trio.lowlevel.wait_readable(self._keyboard)
            try:
                return os.read(self._keyboard, 1024)
            except BlockingIOError:
                continue  # somebody else who has this terminal took it
            except OSError:
                return b""

    async def write(self, data: bytes) -> None:
        """Write all of it. Raise OSError where the terminal is gone."""
        left = memoryview(data)
        while left:
            await trio.lowlevel.wait_writable(self._screen)
            # In pieces that a terminal has room for, so that one that has stopped doesn't stop us.
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._screen, left[:512]) :]


__all__ = ["KeyReader", "Screen"]
