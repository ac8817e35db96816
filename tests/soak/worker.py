"""The command worker of the storm: does what the job's body says, in the dialect and over the relay it is given.

`python worker.py hand` reads jobs by hand, slowly where it is told to; `python worker.py child` uses the package's own
reader. Both write by hand, so that a fault is exactly the one that was asked for.
"""

import os
import select
import sys
import time

from tests.soak import acts
from tests.soak.instructions import LONGEST_LINE, Instruction, answer_head, decode, pattern
from tests.soak.ledger import open_ledger
from trio_workers._goridge import (
    CONTROL,
    MORE,
    OLD_CONTROL,
    STOP,
    STREAM_STOP,
    encode_control,
    encode_error,
    encode_reply,
)
from trio_workers.child._relay import Relay, open_relay

TYPE_CHECKING = False  # to import it takes longer than all else here
if TYPE_CHECKING:
    from tests.soak.ledger import Ledger

SLOW_PIECE = 16 * 1024
SLOW_PAUSE = 0.002
"""Seconds between two pieces of a body that is read slowly: a megabyte takes about 0.15 s."""


class End(Exception):
    """The pool says stop, or is gone."""


class ByHand:
    """A relay that reads frames with bare system calls."""

    def __init__(self, address: str, protocol: str) -> None:
        self.protocol = protocol
        self._reader, self._writer = _connect(address)
        self._head = b""  # of a job that was there when a stop was looked for

    def next_job(self) -> tuple[bytes, bytes] | None:
        """Return the next job's body and context, None when there will be none."""
        try:
            return self._next_job_3() if self.protocol == "goridge-3" else self._next_job_old()
        except End:
            return None

    def stream_stop_asked(self) -> bool:
        """Whether the pool wants no more of this stream."""
        if self._head or not select.select([self._reader], [], [], 0)[0]:
            return False
        head = self._read(12)
        if head[10] & STREAM_STOP:
            return True
        self._head = head  # what comes behind it is not seen before this job has been read
        return False

    def write(self, data: bytes) -> bool:
        """Write all of it; False when the pool is gone."""
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._writer, view) :]
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def close(self) -> None:
        """Close what the pool reads from."""
        os.close(self._writer)

    def _next_job_3(self) -> tuple[bytes, bytes]:
        while True:
            head, self._head = self._head or self._read(12), b""
            size = _size_3(head)
            if head[1] & CONTROL:
                self._obey(self._read(size))
            elif not head[10]:
                split = int.from_bytes(self._read(4), "little")
                context = self._read(split)
                return self._read_body(size - split), context
            # else the stop of a stream that had ended by itself

    def _next_job_old(self) -> tuple[bytes, bytes]:
        context = b""
        while True:
            head = self._read(9 if self.protocol == "goridge-1" else 17)
            size = int.from_bytes(head[1:9], "little")
            if head[0] == OLD_CONTROL:
                self._obey(self._read(size))
            elif head[0]:
                context = self._read(size)
            else:
                return self._read_body(size), context

    def _obey(self, payload: bytes) -> None:
        if payload == STOP:
            raise End
        self.write(encode_control(self.protocol, b'{"pid":%d}' % os.getpid()))

    def _read_body(self, size: int) -> bytes:
        """Read a body; slowly where its first line says so."""
        start = self._read(min(size, LONGEST_LINE))
        slowly = decode(start.partition(b"\n")[0]).do == "slow"
        return start + self._read(size - len(start), slowly=slowly)

    def _read(self, size: int, *, slowly: bool = False) -> bytes:
        pieces: list[bytes] = []
        while size:
            piece = os.read(self._reader, min(size, SLOW_PIECE if slowly else 1 << 20))
            if not piece:
                raise End
            pieces.append(piece)
            size -= len(piece)
            if slowly:
                time.sleep(SLOW_PAUSE)
        return b"".join(pieces)


class ByChild(Relay):
    """The package's own relay, whose writing end a job may close."""

    def close(self) -> None:
        """Close what the pool reads from."""
        os.close(self._writer)


def _connect(address: str) -> tuple[int, int]:
    """Return the descriptors to read from and to write to."""
    if address == "pipes":
        return 0, 1
    import socket

    scheme, _, rest = address.partition("://")
    if scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(rest)
    else:
        host, _, port = rest.rpartition(":")
        connection = socket.create_connection((host, int(port)))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fd = connection.detach()
    return fd, fd


def _size_3(head: bytes) -> int:
    return int.from_bytes(head[2:6], "little")


class Worker:
    """Serves jobs."""

    def __init__(self, relay: ByHand | ByChild, ledger: "Ledger") -> None:
        self._relay = relay
        self._ledger = ledger
        self._release = int(os.environ["SOAK_RELEASE"])

    def serve(self) -> None:
        """Serve jobs until the pool says stop or is gone."""
        while (job := self._relay.next_job()) is not None:
            body, context = job
            line, _, payload = body.partition(b"\n")
            instruction = decode(line)
            if instruction.do == "stop" and (os.getpid() + instruction.id) % 2:
                # Half of all workers ask, so the job comes to one that runs it, or to none.
                self._ledger.note("asked", instruction.id)
                self._relay.write(encode_reply(self._relay.protocol, STOP, b""))
                continue
            self._ledger.note("begin", instruction.id, instruction.do)
            if instruction.do == "stream" and self._relay.protocol == "goridge-3":
                self._stream(instruction, payload, context)
            else:
                self._run(instruction, payload, context)

    def _run(self, job: Instruction, payload: bytes, context: bytes) -> None:
        acts.spend(self._ledger, job.id, job.pause)
        match job.do:
            case "exit" | "kill" | "segfault":
                acts.end_the_process(job.do, job.how)
            case "deaf":
                acts.turn_deaf()
                acts.hang(self._ledger, job.id)
            case "hang":
                acts.hang(self._ledger, job.id)
            case "fat":
                acts.grow_fat(self._ledger, job.id)
            case "garbage":
                self._write_garbage(job, payload, context)
            case "half":
                frame = self._reply(job, payload, context)
                self._relay.write(frame[: len(frame) // 2])
                self._hang_or_exit(job)
            case "close":
                self._relay.close()
                self._hang_or_exit(job)
            case "flood":
                acts.flood_stderr()
            case "child":
                acts.leave_a_child()
            case _:
                pass
        self._ledger.note("end", job.id)
        if job.do == "fail":
            self._relay.write(encode_error(self._relay.protocol, b"failed %d" % job.id))
        elif job.do == "twice":
            self._relay.write(self._reply(job, payload, context) + self._reply(job, payload, context))
        else:
            self._relay.write(self._reply(job, payload, context))

    def _reply(self, job: Instruction, payload: bytes, context: bytes, part: int = 0, bits: int = 0) -> bytes:
        body = answer_head(job.id, part, self._release, payload) + pattern(job.id, job.back)
        return encode_reply(self._relay.protocol, context, body, bits)

    def _write_garbage(self, job: Instruction, payload: bytes, context: bytes) -> None:
        if job.how == "print":
            self._relay.write(b"Notice: something was printed\n" + self._reply(job, payload, context))
        else:
            self._relay.write(pattern(job.id, 64) if job.how == "digits" else bytes(range(255, 191, -1)))
        acts.hang(self._ledger, job.id)

    def _hang_or_exit(self, job: Instruction) -> None:
        if job.how == "exit":
            os._exit(0)
        acts.hang(self._ledger, job.id)

    def _stream(self, job: Instruction, payload: bytes, context: bytes) -> None:
        """Answer in parts. `how` is their number, "forever", or what happens behind the second."""
        last = int(job.how) if job.how.isdecimal() else 2 if job.how != "forever" else sys.maxsize
        for part in range(last):
            if self._relay.stream_stop_asked():
                break
            acts.spend(self._ledger, job.id, job.pause)
            if part % 16 == 15:
                self._ledger.note("beat", job.id)
            if not self._relay.write(self._reply(job, payload, context, part, MORE)):
                return
        else:
            if job.how == "exit":
                os._exit(3)
            elif job.how == "hang":
                acts.hang(self._ledger, job.id)
        self._ledger.note("end", job.id)
        protocol = self._relay.protocol
        failed = job.how == "fail"
        self._relay.write(encode_error(protocol, b"failed %d" % job.id) if failed else encode_reply(protocol, b"", b""))


def main() -> None:
    """Serve, as the environment says."""
    acts.leave_no_core_files()
    address, protocol = os.environ["RR_RELAY"], os.environ["TRIO_WORKERS_PROTOCOL"]
    if sys.argv[1] == "hand":
        relay: ByHand | ByChild = ByHand(address, protocol)
    else:
        opened = open_relay(address, protocol)
        relay = ByChild(opened._reader, opened._writer, protocol)  # pyright: ignore[reportPrivateUsage]
    Worker(relay, open_ledger()).serve()


if __name__ == "__main__":
    main()
