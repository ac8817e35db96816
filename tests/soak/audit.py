"""Reading the ledger: what it must show of every job."""

from collections import Counter
from collections.abc import Iterator
from typing import Final

import attrs

RUNS_ON: Final = 3.0
"""Seconds that a job may still run after its caller has its end: what a kill takes, on a loaded machine."""

WAITS_IN_LINE: Final = 4.0
"""Seconds for which a job that its caller has left may lie in a command worker's line before it runs: as long as those
before it take, of which one at most hangs, until `exec_ttl` or `destroy_timeout` ends it. It may hang itself then."""

BY_WORKERS: Final = frozenset({"begin", "end", "beat", "asked"})
LEFT: Final = frozenset({"cancelled", "undelivered", "unordered"})
"""Ends of which the worker is not told where others lie behind."""
UNSTARTED: Final = frozenset({"allocate_timeout", "queue_full", "retired", "boot_failed"})
"""Ends that say that the job never began."""


@attrs.define
class Entry:
    """All that the ledger says of one job."""

    id: int
    do: str = ""
    way: str = ""
    begun: int = 0
    ended: int = 0
    asked: int = 0
    last: float = 0.0
    over: list[str] = attrs.Factory(list[str])
    over_at: float = 0.0
    started: str = "-"
    records: list[str] = attrs.Factory(list[str])
    after_the_end: str = ""

    def __str__(self) -> str:
        return f"job {self.id} ({self.do}, by {self.way or 'nobody'}, over as {', '.join(self.over) or 'nothing'})"


@attrs.frozen
class Findings:
    """What the ledger showed: which promises were broken, how jobs ended, and what their workers did."""

    complaints: list[str]
    endings: Counter[str]
    deeds: Counter[str]


def audit(path: str, *, read_out: float, reads_ahead: bool = False) -> Findings:
    """Read a ledger. A stream that its caller has left may be read out for `read_out` seconds.

    `reads_ahead`: a job that has been written into a command worker's line can't be called back when its caller goes.
    """
    entries = _read(path)
    complaints: list[str] = []
    endings: Counter[str] = Counter()
    deeds: Counter[str] = Counter()
    for entry in entries.values():
        complaints += [f"{entry}: {text}" for text in _look_at(entry, read_out, reads_ahead)]
        endings.update(entry.over)
        deeds[entry.do] += entry.asked if entry.do == "stop" else bool(entry.begun)
    deeds.pop("lease", None)
    return Findings(complaints, endings, deeds)


def _look_at(entry: Entry, read_out: float, reads_ahead: bool) -> Iterator[str]:
    """Say what is wrong with one job."""
    if len(entry.over) != 1:
        yield f"ended {len(entry.over)} times"
        return
    (over,) = entry.over
    if entry.begun > 1:
        yield f"began {entry.begun} times"
    if entry.begun and (over in UNSTARTED or entry.started == "False"):
        yield f"began, and yet ended as {over} with started={entry.started}"
    if over in ("replied", "failed") and entry.way != "map in any order" and entry.begun != 1:
        yield "was answered, and never began"
    if over in ("replied", "failed") and entry.ended != 1 and not (entry.do == "stream" and over == "failed"):
        yield f"was answered, and came to its end {entry.ended} times"
    ran_on = entry.last - entry.over_at
    longest = RUNS_ON + (read_out if over == "left" else 0.0)
    if reads_ahead and over in LEFT:
        longest += WAITS_IN_LINE
    if ran_on > longest:
        yield f"still ran {ran_on:.1f} s after it was over"
    yield from _compare_records(entry, over)
    if entry.after_the_end:
        yield f"wrote {entry.after_the_end!r} after its pool had been closed"


def _compare_records(entry: Entry, over: str) -> Iterator[str]:
    """Hold what the pool's job observer was told against what the caller saw. Jobs of a map have no name there."""
    records = entry.records
    if entry.way.startswith("map"):
        return
    if len(records) > 1:
        yield f"the job observer was told {len(records)} times: {records}"
    elif over == "cancelled":
        # Before it was taken nobody is told; and a stream may have been read to its end before its caller was.
        if records and records[0] != over and "stream" not in entry.way:
            yield f"the job observer was told {records[0]}"
    elif over == "left":
        # Its worker may have come to its end while the caller was looking elsewhere.
        if not set(records) <= {"replied", "crashed", "relay_error", "job_timeout", "memory", "closed"} or not records:
            yield f"the job observer was told {records[0] if records else 'nothing'}"
    elif over != "leased" and records != [over]:
        yield f"the job observer was told {records[0] if records else 'nothing'}"
    elif over == "leased" and records:
        yield f"the job observer was told {records[0]} of a lease that was got"


def _read(path: str) -> dict[int, Entry]:
    """Read every line, in the order in which they were written."""
    entries: dict[int, Entry] = {}
    open_: dict[int, Entry] = {}
    with open(path, encoding="ascii") as file:
        for line in file:
            word, id_, seconds, _, *rest = line.split()
            if word == "closed":
                open_.clear()
                continue
            entry = entries.get(int(id_))
            if entry is None:
                entry = entries[int(id_)] = open_[int(id_)] = Entry(int(id_))
            _note(entry, word, float(seconds), rest)
            if word in BY_WORKERS and int(id_) not in open_:
                entry.after_the_end = line
    return entries


def _note(entry: Entry, word: str, seconds: float, rest: list[str]) -> None:
    match word:
        case "submit":
            entry.do, entry.way = rest[0], " ".join(rest[1:])
        case "over":
            entry.over.append(rest[0])
            entry.over_at, entry.started = seconds, rest[1]
        case "record":
            entry.records.append(rest[0])
        case "begin":
            entry.begun += 1
        case "end":
            entry.ended += 1
        case "asked":
            entry.asked += 1
        case _:
            pass
    if word in BY_WORKERS:
        entry.last = max(entry.last, seconds)
