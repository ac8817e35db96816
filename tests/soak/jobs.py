"""The Python functions of the storm: each does what its instruction says."""

import os
import stat
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from tests.soak import acts
from tests.soak.instructions import Instruction, answer_head, decode, pattern
from tests.soak.ledger import Ledger, open_ledger

Answer = tuple[bytes, Any]

_ledgers: list[Ledger] = []
"""This process's ledger, once it has been opened."""


class Told(Exception):
    """What a job raises that is told to fail; it names the job."""


def prepare() -> None:
    """Make a worker ready for the storm: its initializer."""
    acts.leave_no_core_files()
    _ledgers.append(open_ledger())


def run(line: bytes, payload: Any) -> Answer:
    """Do what the line says, and answer."""
    job, (ledger,) = decode(line), _ledgers
    ledger.note("begin", job.id, job.do)
    acts.spend(ledger, job.id, job.pause)
    match job.do:
        case "exit" | "kill" | "segfault":
            acts.end_the_process(job.do, job.how)
        case "deaf":
            acts.turn_deaf()
            acts.hang(ledger, job.id)
        case "hang":
            acts.hang(ledger, job.id)
        case "fat":
            acts.grow_fat(ledger, job.id)
        case "garbage" | "half":
            _write_to_the_relay(job)
            acts.hang(ledger, job.id)
        case "close":
            for fd in (0, 1, 2):
                os.close(fd)
        case "flood":
            acts.flood_stderr()
        case "child":
            acts.leave_a_child()
        case _:
            pass
    ledger.note("end", job.id)
    if job.do == "fail":
        raise Told(job.id)
    if job.do == "leave":
        sys.exit(f"failed {job.id}")
    return _answer(job, 0, payload)


def run_one(call: tuple[bytes, Any]) -> Answer:
    """Do what the line says, and answer: for a map."""
    return run(*call)


def run_parts(line: bytes, payload: Any) -> Iterator[Answer]:
    """Do what the line says, and answer in parts."""
    job, (ledger,) = decode(line), _ledgers
    if job.do != "stream":
        yield run(line, payload)
        return
    ledger.note("begin", job.id, job.do)
    last = int(job.how) if job.how.isdecimal() else 2 if job.how != "forever" else sys.maxsize
    for part in range(last):
        acts.spend(ledger, job.id, job.pause)
        if part % 16 == 15:
            ledger.note("beat", job.id)
        yield _answer(job, part, payload)
    if job.how == "exit":
        os._exit(3)
    elif job.how == "hang":
        acts.hang(ledger, job.id)
    ledger.note("end", job.id)
    if job.how == "fail":
        raise Told(job.id)


def _answer(job: Instruction, part: int, payload: Any) -> Answer:
    head = answer_head(job.id, part, int(os.environ["SOAK_RELEASE"]), memoryview(payload).cast("B"))
    back: Any = pattern(job.id, job.back)
    if job.how == "array":
        import numpy

        back = numpy.frombuffer(back, numpy.uint8)
    return head, back


def _write_to_the_relay(job: Instruction) -> None:
    """Write to every socket there is; the relay is one of them, under a number that a job is not told."""
    from trio_workers._calls import RESULT, encode

    data = bytes(range(255, 191, -1))
    if job.do == "half":
        data = b"".join(encode(RESULT, 1, pattern(job.id, 1000)))[:500]
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that listed the directory is closed by now
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                os.write(int(name), data)
