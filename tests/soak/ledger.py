"""The ledger: one file to which every process of a storm appends what happens, a line at a time."""

import os
import time

PATH = "SOAK_LEDGER"
"""The environment variable that tells a worker where the ledger is."""


class Ledger:
    """Appends to the file. A line is one write to a descriptor with `O_APPEND`, so lines never tear or mix.

    A line is `WORD ID SECONDS PID REST...`. The clock is the system's monotonic one, which all processes share, and the
    order of the lines is the order of the writes.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def note(self, word: str, id_: int, rest: str = "") -> None:
        """Append a line."""
        line = f"{word} {id_} {time.monotonic():.6f} {os.getpid()} {rest}".rstrip() + "\n"
        os.write(self._fd, line.encode())

    def close(self) -> None:
        """Write no more."""
        os.close(self._fd)


def open_ledger() -> Ledger:
    """Open the ledger that the environment names."""
    return Ledger(os.environ[PATH])
