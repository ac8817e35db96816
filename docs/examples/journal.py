"""The pool's log in systemd's journal, with its fields; without any package."""

import array
import contextlib
import errno
import fcntl
import logging
import os
import socket
import struct
import sys

import trio

from trio_workers import WorkerCrashed, open_python_pool

JOURNAL = "/run/systemd/journal/socket"
PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
FIELDS = {"pool": "TRIO_WORKERS_POOL", "slot": "TRIO_WORKERS_SLOT", "pid": "TRIO_WORKERS_PID",
          "reason": "TRIO_WORKERS_REASON"}  # fmt: skip
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def encode_field(name: str, value: object) -> bytes:
    """As the journal's native protocol has it: a value of several lines goes with its length."""
    data = str(value).encode("utf-8", "replace")
    if b"\n" in data:
        return name.encode() + b"\n" + struct.pack("<Q", len(data)) + data + b"\n"
    return name.encode() + b"=" + data + b"\n"


class JournalHandler(logging.Handler):
    """Sends records to the journal, and never waits for it: what it does not take at once is counted, and told of."""

    def __init__(self, identifier: str, path: str = JOURNAL) -> None:
        super().__init__()
        self._identifier = identifier
        self._path = path
        self._lost = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):  # the kernel gives what it allows
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 * 2**20)

    def close(self) -> None:
        self._socket.close()
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            entry = self.encode(record)
            if self._lost:
                self._send(self._about(f"{self._lost} records were lost: the journal did not take them", 4))
                self._lost = 0
            self._send(entry)
        except OSError:  # full, or not there
            self._lost += 1
        except Exception:
            self.handleError(record)

    def encode(self, record: logging.LogRecord) -> bytes:
        priority = next((number for level, number in PRIORITIES if record.levelno >= level), 7)
        entry = self._about(self.format(record), priority)
        entry += encode_field("LOGGER", record.name) + encode_field("CODE_FILE", record.pathname)
        entry += encode_field("CODE_LINE", record.lineno) + encode_field("CODE_FUNC", record.funcName)
        for attribute, name in FIELDS.items():
            if (value := getattr(record, attribute, None)) not in (None, ""):
                entry += encode_field(name, value)
        return entry

    def _about(self, message: str, priority: int) -> bytes:
        return (
            encode_field("MESSAGE", message)
            + encode_field("PRIORITY", priority)
            + encode_field("SYSLOG_IDENTIFIER", self._identifier)
        )

    def _send(self, entry: bytes) -> None:
        try:
            self._socket.sendto(entry, self._path)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_as_file(entry)

    def _send_as_file(self, entry: bytes) -> None:
        """What is too large for a datagram goes as a file in memory that nobody can change any more."""
        descriptor = os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        with open(descriptor, "wb") as file:
            file.write(entry)
            file.flush()
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))
            self._socket.sendmsg([], [rights], 0, self._path)


def print_invoice(number: int) -> str:
    if number == 7:
        print("out of paper")
        os._exit(3)
    return f"invoice {number}"


async def main() -> None:
    async with open_python_pool(num_workers=1, name="printers") as pool:
        with contextlib.suppress(WorkerCrashed):
            await pool.run_sync(print_invoice, 7)


if __name__ == "__main__":
    handler = JournalHandler("invoices", *sys.argv[1:])
    logging.basicConfig(handlers=[handler], level=logging.INFO, format="%(message)s")
    trio.run(main)
