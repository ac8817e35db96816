"""What a job is told to do, and what it answers: known to workers and callers alike."""

from zlib import crc32

LONGEST_LINE = 128
"""Bytes that an instruction has at most, so that a worker knows it before it has read a large body."""


class Instruction:
    """What one job is to do. It stands in the first line of the job's body; a payload of any size may follow.

    `id`: the job's number, nobody else's in this storm. `do`: the act; `how`: which variant of it. `back`: bytes of
    payload that the answer carries. `pause`: seconds that the job takes.
    """

    __slots__ = ("back", "do", "how", "id", "pause")

    def __init__(self, id_: int, do: str, how: str = "-", back: int = 0, pause: float = 0.0) -> None:
        self.id = id_
        self.do = do
        self.how = how
        self.back = back
        self.pause = pause

    def __repr__(self) -> str:
        return f"job {self.id} ({self.do} {self.how}, {self.back:,} bytes back, {self.pause:.4f} s)"

    def encode(self) -> bytes:
        """Return the line."""
        return f"{self.id} {self.do} {self.how} {self.back} {self.pause:.4f}\n".encode()


def decode(line: bytes) -> Instruction:
    """Read the line."""
    id_, do, how, back, pause = line.decode().split()
    return Instruction(int(id_), do, how, int(back), float(pause))


def pattern(id_: int, size: int) -> bytes:
    """Return a payload that no other job has."""
    unit = b"%d." % id_
    return (unit * (size // len(unit) + 1))[:size]


def answer_head(id_: int, part: int, release: int, received: "bytes | memoryview") -> bytes:
    """Return the first line of an answer: whose it is, which part of it, and what the worker had received.

    `release` is the number of the release that the worker was started as.
    """
    return b"%d %d %d %d\n" % (id_, part, release, crc32(received))
