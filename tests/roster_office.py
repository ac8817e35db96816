"""A roster with a clock one can set, for the tests of its rules, and what all who play with one can see."""

import math
import random
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from trio_workers._config import Limits, Restart
from trio_workers._roster import Roster
from trio_workers._seats import (
    ASSIGNED,
    DONE,
    STARTING,
    WRITTEN,
    Actions,
    Begin,
    Emit,
    Job,
    Lend,
    Phase,
    Plan,
    Seat,
    SeatState,
    Spawn,
)


class Onlooker:
    """What whoever plays with a roster can see of it, and of his jobs that are not over (`live`)."""

    roster: Roster
    live: Iterable[Job]

    @property
    def seats(self) -> list[Seat]:
        return self.roster.seats

    @property
    def is_open(self) -> bool:
        return self.roster.phase is Phase.OPEN

    def seats_in(self, *states: SeatState) -> list[Seat]:
        return [seat for seat in self.seats if seat.state in states]

    def with_written(self) -> list[Seat]:
        return [seat for seat in self.seats if any(job.state is WRITTEN for job in seat.jobs)]

    def leases(self) -> list[Job]:
        """Leases somebody is in, their worker gone or not."""
        return [job for job in self.live if job.lease and job.bound and job.state is not DONE]


class Office:
    """A roster with a clock one can set."""

    def __init__(self, target: int = 1, *, ready: bool = True, restart: Restart | None = None, **options: Any) -> None:
        self.now = 0.0
        how = {name: options.pop(name) for name in ("capacity", "latest_first") if name in options}
        options.setdefault("limits", Limits(jitter=0.0))
        self.roster = Roster(
            target,
            Plan(restart=restart or Restart(jitter=0.0), **options),
            clock=lambda: self.now,
            wall=lambda: 1_700_000_000 + self.now,
            rng=random.Random(1),
            **how,
        )
        self.roster.open()
        if ready:
            self.ready()

    @property
    def seats(self) -> list[Seat]:
        return self.roster.seats

    @property
    def phase(self) -> Phase:
        return self.roster.phase

    @property
    def seat(self) -> Seat:
        """The only seat."""
        (seat,) = self.seats
        return seat

    def ready(self) -> Actions:
        """Whoever comes up is ready."""
        return [action for seat in list(self.seats) if seat.state is STARTING for action in self.roster.ready(seat)]

    def submit(self, label: str = "", *, lease: bool = False, patient: bool = False, write: bool = True) -> Job:
        """Hand a job in; where there is room, write it (a lease: enter it)."""
        job = Job((b"",), label, lease=lease)
        job.patient = patient
        self.lend(self.roster.submit(job))
        if write:
            self.write(job)
        return job

    def submit_many(self, count: int) -> list[Job]:
        return [self.submit(str(number)) for number in range(count)]

    def write(self, *jobs: Job) -> None:
        for job in jobs:
            if job.state is ASSIGNED and job.lease:
                job.bound = True
            elif job.state is ASSIGNED:
                self.lend(self.roster.written(job))

    def lend(self, actions: Actions) -> list[Job]:
        """Lend jobs where that is what follows, as far as there is room; return which they are."""
        jobs: list[Job] = []
        while Lend in kinds(actions) and (job := self.roster.lend()) is not None:
            jobs.append(job)
        return jobs

    def submit_inside(self, lease: Job) -> Job:
        job = Job((b"",))
        assert lease.seat is not None
        self.roster.submit_to(lease.seat, job)
        self.write(job)
        return job

    def reply(self, job: Job, dirt: BaseException | None = None) -> Actions:
        assert job.seat is not None
        return self.roster.replied(job.seat, job, dirt)

    def ask_for_stop(self, job: Job, dirt: BaseException | None = None) -> Actions:
        assert job.seat is not None
        return self.roster.stop_requested(job.seat, job, dirt)

    def spawn_after(self, delay: float) -> None:
        """See that a slot comes back after this delay, and not before."""
        assert self.roster.next_deadline() == pytest.approx(self.now + delay)
        assert not self.roster.tick()
        self.now = self.roster.next_deadline()
        assert [type(action) for action in self.roster.tick()] == [Spawn]
        assert self.roster.next_deadline() == math.inf


def kinds(actions: Actions) -> list[Any]:
    """Tell actions by their type, and events by what they are."""
    return [action.event if isinstance(action, Emit) else type(action) for action in actions]


def begun(actions: Actions) -> list[Job]:
    return [action.job for action in actions if isinstance(action, Begin)]


def slots(seats: Sequence[Seat]) -> list[int]:
    return [seat.slot for seat in seats]
