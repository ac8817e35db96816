"""Which jobs there are, how often each comes, and how each may end."""

import random
from typing import Final
from zlib import crc32

import attrs

from tests.soak.instructions import Instruction, pattern

LARGE: Final = 8 * 1024 * 1024

COMMON: Final = frozenset(
    {"allocate_timeout", "queue_full", "job_timeout", "closed", "cancelled", "left", "undelivered", "unordered"}
)
"""How a job may end whatever it is told to do: it got no worker, took too long, the pool was closed, its caller left.

`left`: its caller took no more of its parts. `undelivered`: its map was left before its turn came. `unordered`: it is
among those of a map in any order that ended with an error, for such an error does not say whose it is.
"""


@attrs.frozen(kw_only=True)
class Act:
    """Something a job may do.

    `weight`: how often it comes. `hows`: its variants. `may`: how it may end, besides `COMMON`. `hangs`: whether it may
    last for ever, so that something must end it.
    """

    weight: int
    hows: tuple[str, ...] = ("-",)
    may: frozenset[str]
    hangs: bool = False


def _act(weight: int, may: str, *hows: str, hangs: bool = False) -> Act:
    return Act(weight=weight, may=frozenset(may.split()), hows=hows or ("-",), hangs=hangs)


BOTH: Final = {
    "reply": _act(60, "replied"),
    "fail": _act(6, "failed"),
    "exit": _act(3, "crashed", "0", "3", "255"),
    "kill": _act(3, "crashed"),
    "hang": _act(3, "crashed", hangs=True),
    "deaf": _act(3, "crashed", hangs=True),
    "fat": _act(1, "crashed memory", hangs=True),
    "flood": _act(3, "replied"),
    "child": _act(2, "replied"),
}

COMMANDS: Final = {
    **BOTH,
    "segfault": _act(3, "crashed", "signal"),
    "garbage": _act(3, "relay_error", "print", "bytes", "digits", hangs=True),
    "half": _act(3, "crashed", "hang", "exit", hangs=True),
    "close": _act(3, "crashed", "hang", "exit", hangs=True),
    "twice": _act(3, "replied"),
    "stop": _act(3, "replied retired"),
    "slow": _act(3, "replied"),
}
"""What a job of a command worker may do, besides streaming."""

AHEAD: Final = {name: act for name, act in COMMANDS.items() if name != "twice"}
"""The same where jobs lie ahead of their turn: there an answer too many is taken for that of the next one."""

FUNCTIONS: Final = {
    **BOTH,
    "reply": _act(60, "replied", *["-"] * 11, "array"),
    "segfault": _act(3, "crashed", "signal", "pointer"),
    "garbage": _act(3, "relay_error crashed", hangs=True),
    "half": _act(3, "relay_error crashed", hangs=True),
    "close": _act(3, "replied"),
    "leave": _act(2, "failed"),
}
"""What a function may do, besides streaming."""

TINY: Final = {
    "reply": _act(2900, "replied", *["-"] * 30, "array"),
    "fail": _act(60, "failed"),
    "exit": _act(3, "crashed", "3"),
    "kill": _act(3, "crashed"),
    "hang": _act(1, "crashed", hangs=True),
}
"""What one of a crowd's jobs may do: nearly all are answered at once."""

STREAM: Final = Act(
    weight=0,
    hows=("1", "3", "20", "forever", "fail", "exit", "hang"),
    may=frozenset({"replied", "failed", "crashed"}),
    hangs=True,
)
"""A reply in parts: how many, or what comes behind the second."""

LEASE: Final = Act(weight=0, may=frozenset({"leased", "crashed", "retired"}))
"""Having a worker to oneself, which is queued as one job. That its worker died says the first job inside."""


@attrs.frozen
class Job:
    """A job as its caller sees it: the instruction, and how many bytes go with it."""

    instruction: Instruction
    sent: int
    hangs: bool
    may: frozenset[str]

    @property
    def id(self) -> int:
        """Its number."""
        return self.instruction.id

    @property
    def line(self) -> bytes:
        """The instruction, as it is sent."""
        return self.instruction.encode()

    @property
    def payload(self) -> bytes:
        """What goes with it."""
        return pattern(self.id, self.sent)

    @property
    def context(self) -> bytes:
        """The context of every other job, which comes back with the answer."""
        return b"context of %d" % self.id if self.id % 2 else b""

    @property
    def expected(self) -> bytes:
        """What comes back."""
        return pattern(self.id, self.instruction.back)

    @property
    def checksum(self) -> int:
        """The checksum of the payload."""
        return crc32(self.payload)

    def __str__(self) -> str:
        return f"{self.instruction!r}, {self.sent:,} bytes there"


class Planner:
    """Draws the jobs of one caller. Numbers are its own, so that a seed gives the same jobs whoever comes first."""

    def __init__(self, rng: random.Random, acts: dict[str, Act], first_id: int, streams: bool) -> None:
        self._rng = rng
        self._acts = acts
        self._names = list(acts)
        self._weights = [act.weight for act in acts.values()]
        self._tiny_weights = [act.weight for act in TINY.values()]
        self._next_id = first_id
        self._streams = streams

    def draw(self, *, quiet: bool = False) -> Job:
        """Draw a job; a `quiet` one ends by itself."""
        while True:
            (do,) = self._rng.choices(self._names, self._weights)
            act = self._acts[do]
            if not (quiet and act.hangs):
                break
        sent, back = self._draw_sizes()
        if do == "slow":
            sent = self._rng.randrange(1 << 20)
        how = self._rng.choice(act.hows)
        pause = self._rng.choice((0.0, 0.0, self._rng.uniform(0, 0.02)))
        return self._make(act, do, how, sent, back, pause)

    def draw_tiny(self, *, quiet: bool = False) -> Job:
        """Draw a job as crowds have them: a small one that takes no time, but for one in thirty; a few are large."""
        while True:
            (do,) = self._rng.choices(list(TINY), self._tiny_weights)
            act = TINY[do]
            if not (quiet and act.hangs):
                break
        sent, back = self._rng.randrange(200), self._rng.randrange(200)
        kind = self._rng.random()
        if kind < 0.01:
            sent = self._rng.choice((3900, 4200, 40_000, 70_000, 400_000))
        elif kind < 0.02:
            back = self._rng.choice((4200, 70_000, 400_000))
        pause = self._rng.uniform(0, 0.01) if self._rng.random() < 0.03 else 0.0
        return self._make(act, do, self._rng.choice(act.hows), sent, back, pause)

    def draw_stream(self) -> Job:
        """Draw a job that answers in parts, where this kind of worker can."""
        if not self._streams:
            return self.draw()
        how = self._rng.choice(STREAM.hows)
        back = self._rng.choice((0, 100, 300_000))
        pause = self._rng.choice((0.0, self._rng.uniform(0, 0.005)))
        return self._make(STREAM, "stream", how, self._rng.randrange(1000), back, pause)

    def draw_lease(self) -> Job:
        """Return what stands for a lease in the ledger."""
        return self._make(LEASE, "lease", "-", 0, 0, 0.0)

    def draw_quick(self) -> Job:
        """Draw a small job that is answered at once."""
        return self._make(self._acts["reply"], "reply", "-", self._rng.randrange(1000), self._rng.randrange(1000), 0.0)

    def _draw_sizes(self) -> tuple[int, int]:
        """Mostly small ones, both ways; sometimes as much as 8 MiB there, or back, or both."""
        sent, back = self._rng.randrange(2000), self._rng.randrange(2000)
        if self._rng.random() < 0.04:
            which = self._rng.randrange(3)
            sent = LARGE if which != 1 else sent
            back = LARGE if which != 0 else back
        return sent, back

    def _make(self, act: Act, do: str, how: str, sent: int, back: int, pause: float) -> Job:
        id_, self._next_id = self._next_id, self._next_id + 1
        return Job(Instruction(id_, do, how, back, pause), sent, act.hangs, act.may | COMMON)
