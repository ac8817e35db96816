"""The roster's rules, one by one; `test_roster_machine.py` drives them in every order."""

import math
from typing import Final

import pytest

from tests.roster_office import Office, begun, kinds, slots
from trio_workers._config import Restart
from trio_workers._model import WorkerEvent
from trio_workers._seats import (
    ASSIGNED,
    DONE,
    GONE,
    NOTHING,
    SERVING,
    STANDBY,
    STARTING,
    STOPPING,
    WAITING,
    WRITTEN,
    Begin,
    Drained,
    End,
    GiveUp,
    Job,
    Kill,
    Phase,
    Retire,
    Spawn,
    Wake,
)

CREATED, DESTRUCT, ERROR = WorkerEvent.CREATED, WorkerEvent.DESTRUCT, WorkerEvent.ERROR

GARBAGE: Final = ValueError("garbage")


# jobs and seats


def test_a_free_seat_takes_a_job_at_once() -> None:
    """With a worker free there is nothing to do but write: the shared empty tuple, no allocation."""
    office = Office()
    job = Job((b"",))
    assert office.roster.submit(job) is NOTHING
    assert (job.state, job.seat) == (ASSIGNED, office.seat)
    assert list(office.seat.jobs) == [job]


def test_jobs_get_seats_in_arrival_order() -> None:
    """Promise 9: first come, first served."""
    office = Office(2)
    jobs = office.submit_many(5)
    assert [job.state for job in jobs] == [WRITTEN, WRITTEN, WAITING, WAITING, WAITING]
    assert begun(office.reply(jobs[1])) == [jobs[2]]
    assert begun(office.reply(jobs[0])) == [jobs[3]]
    office.write(*jobs)
    assert begun(office.reply(jobs[2])) == [jobs[4]]
    assert office.roster.waiting == 0


def test_the_seat_that_was_at_work_last_goes_first() -> None:
    """A pool of functions prefers the worker whose code and data are still in the processor's caches."""
    office = Office(3, latest_first=True)
    first = office.submit("a")
    assert office.roster.replied(first.seat, first) == NOTHING  # type: ignore[arg-type]
    for name in "bc":
        job = office.submit(name)
        assert job.seat is first.seat
        office.reply(job)
    jobs = office.submit_many(3)
    assert jobs[0].seat is first.seat
    assert {job.seat for job in jobs} == set(office.seats)


def test_the_seat_that_was_free_for_longest_goes_first() -> None:
    """Work goes round, so that workers wear evenly."""
    office = Office(3)
    jobs = office.submit_many(3)
    for number in (2, 0, 1):
        office.reply(jobs[number])
    assert [office.submit().seat for _ in range(3)] == [jobs[2].seat, jobs[0].seat, jobs[1].seat]


def test_jobs_wait_for_the_handshake() -> None:
    """A worker that comes up takes no job; the handshake begins the first that waits."""
    office = Office(ready=False)
    first, second = office.submit_many(2)
    assert first.state is WAITING
    actions = office.ready()
    assert kinds(actions) == [CREATED, Begin]
    assert begun(actions) == [first]
    assert second.state is WAITING


def test_a_seat_takes_as_many_jobs_as_its_capacity() -> None:
    """And the next job waits."""
    office = Office(2, capacity=2)
    jobs = office.submit_many(5)
    assert [len(seat.jobs) for seat in office.seats] == [2, 2]
    assert jobs[4].state is WAITING
    assert begun(office.reply(jobs[3])) == [jobs[4]]
    assert [len(seat.jobs) for seat in office.seats] == [2, 2]


@pytest.mark.parametrize(
    ("max_queue", "waiting"), [(None, 5), (0, 0), (2, 2)], ids=["no bound", "nobody waits", "two wait"]
)
def test_max_queue(max_queue: int | None, waiting: int) -> None:
    """Who comes when so many wait is turned away at once."""
    office = Office(max_queue=max_queue)
    jobs = office.submit_many(6)
    assert office.roster.waiting == waiting
    assert all(job.end is End.QUEUE_FULL for job in jobs[1 + waiting :])


def test_max_queue_does_not_count_the_patient() -> None:
    """A map's jobs are neither turned away by `max_queue`, nor do they get others turned away."""
    office = Office(max_queue=1)
    office.submit()
    patient = [office.submit(patient=True) for _ in range(3)]
    assert all(job.state is WAITING for job in patient)
    assert office.submit().state is WAITING
    assert office.submit().end is End.QUEUE_FULL
    assert office.submit(patient=True).state is WAITING


def test_the_time_of_waiting_adds_up() -> None:
    """`allocate_timeout` is a budget: a hand-on keeps what has been used of it."""
    office = Office()
    first, second = office.submit_many(2)
    office.now = 3.0
    assert office.roster.longest_wait == 3.0
    office.reply(first)
    assert second.waited == 3.0
    office.write(second)
    office.now = 5.0
    office.ask_for_stop(second)
    office.now = 7.0
    assert (second.state, office.roster.longest_wait) == (WAITING, 5.0)
    office.ready()
    assert second.waited == 5.0
    assert office.roster.longest_wait == 0.0


# cancel


def test_cancel_a_job_that_waits() -> None:
    """It leaves the queue, and nothing else happens."""
    office = Office()
    first, second, third = office.submit_many(3)
    assert not office.roster.cancelled(second)
    assert begun(office.reply(first)) == [third]


def test_cancel_a_job_that_is_not_written() -> None:
    """The seat goes to the next job; the worker has begun nothing."""
    office = Office()
    first = office.submit(write=False)
    second = office.submit()
    assert begun(office.roster.cancelled(first)) == [second]
    assert office.seat.begun == 1


def test_cancel_a_job_that_is_written() -> None:
    """Promise 4: the worker is killed, and replaced when it is gone."""
    office = Office()
    first, second = office.submit_many(2)
    seat = office.seat
    assert kinds(office.roster.cancelled(first)) == [DESTRUCT, Kill]
    assert (seat.state, seat.reason, seat.planned) == (STOPPING, "cancelled", True)
    assert kinds(office.roster.exited(seat, -9)) == [Spawn]
    assert begun(office.ready()) == [second]


def test_cancel_a_job_of_a_worker_that_is_on_its_way_out() -> None:
    """The grace is over; a closing pool does not wait for the worker's end before it stops the others."""
    office = Office(2)
    job = office.submit()
    assert job.seat is not None
    office.roster.close()
    assert kinds(office.roster.suspect(job.seat, "it closed its relay", grace=True)) == [Kill]
    assert kinds(office.roster.cancelled(job)) == [Kill, DESTRUCT, Retire]
    assert office.phase is Phase.ENDING


def test_a_closing_pool_does_not_wait_for_the_corpse() -> None:
    """The last job ends on a worker that is on its way out already, and the others are stopped at once."""
    for way in ("reply", "stop request"):
        office = Office(2)
        job = office.submit()
        assert job.seat is not None
        job.bound = True
        office.roster.close()
        office.roster.suspect(job.seat, "it closed its relay", grace=True)
        actions = office.reply(job, GARBAGE) if way == "reply" else office.ask_for_stop(job)
        assert kinds(actions)[-2:] == [DESTRUCT, Retire]
        assert office.phase is Phase.ENDING


def test_cancel_twice() -> None:
    """The second does nothing, nor does one after the reply."""
    office = Office()
    job = office.submit()
    office.reply(job)
    assert office.roster.cancelled(job) is NOTHING
    assert office.seat.state is SERVING


def test_cancel_a_lease_that_holds_others_back() -> None:
    """It waits for a whole worker, and whoever came later behind it; when it goes, they wait no longer."""
    office = Office(capacity=2)
    office.submit()
    lease, job = office.submit(lease=True), office.submit()
    assert lease.state is job.state is WAITING
    assert begun(office.roster.cancelled(lease)) == [job]


# handing on


def test_a_job_goes_on_after_a_stop_request() -> None:
    """Promise 3: it did not start, so it goes to the front of the queue, and gets the next worker."""
    office = Office(2)
    first, second, third = office.submit_many(3)
    seat = first.seat
    assert seat is not None
    assert kinds(office.ask_for_stop(first)) == [Wake, DESTRUCT, Retire]
    assert (first.state, first.seat, first.hand_ons) == (WAITING, None, 1)
    assert seat.begun == 0
    assert begun(office.reply(second)) == [first]
    assert third.state is WAITING


def test_jobs_that_did_not_start_go_on_in_their_order() -> None:
    """What a dead worker did not begin comes before all who wait, in the old order; what it began ends with it."""
    office = Office(capacity=4)
    jobs = office.submit_many(6)
    seat = office.seat
    seat.served = 1
    actions = office.roster.exited(seat, 1, answered=[jobs[0]], unstarted=[jobs[3], jobs[2]])
    assert kinds(actions) == [Wake, Wake, ERROR, DESTRUCT, Wake, Wake, Spawn]
    assert [job.state for job in jobs] == [DONE, DONE, WAITING, WAITING, WAITING, WAITING]
    assert (jobs[0].end, jobs[1].end) == (None, End.CRASHED)
    assert begun(office.ready()) == jobs[2:6]


@pytest.mark.parametrize("target", [1, 3])
def test_a_job_is_handed_on_so_often_and_no_more(target: int) -> None:
    """At most `num_workers + 1` times: then it fails with what it met, and a retry is safe."""
    office = Office(target)
    for seat in office.seats:
        seat.served = 1
    job = office.submit()
    for _ in range(target + 1):
        office.ask_for_stop(job)
        for seat in list(office.seats):
            if seat.state is STOPPING:
                office.roster.exited(seat, 0)
        office.now += 100.0
        office.roster.tick()
        office.ready()
        office.write(job)
        assert job.state is WRITTEN
    last = job.seat
    office.ask_for_stop(job)
    assert (job.state, job.end, job.seat) == (DONE, End.RETIRED, last)


def test_a_job_that_crashes_workers_before_it_starts_ends_as_crashed() -> None:
    """The last worker it met died: that is what its caller hears."""
    office = Office()
    job = office.submit()
    job.hand_ons = 2
    office.roster.exited(office.seat, -11, unstarted=[job])
    assert (job.state, job.end) == (DONE, End.CRASHED)


def test_a_bound_job_is_never_handed_on() -> None:
    """What nobody waits for any more, or belongs to a lease, ends with its worker even where it did not start."""
    office = Office()
    job = office.submit()
    job.bound = True
    office.roster.exited(office.seat, 1, unstarted=[job])
    assert (job.state, job.end) == (DONE, End.CRASHED)


@pytest.mark.parametrize(
    ("why", "expected"),
    [("it closed its relay", [Wake, Kill]), (GARBAGE, [Wake, ERROR, DESTRUCT, Kill])],
    ids=["closed", "garbage"],
)
def test_a_line_refuses_a_job(why: str | ValueError, expected: list[object]) -> None:
    """A worker that died or spoke while idle is found out by the next job, which goes on unharmed."""
    office = Office(2)
    office.submit()
    job = office.submit(write=False)
    seat = job.seat
    assert seat is not None
    actions = office.roster.refused(seat, job, why)
    assert kinds(actions) == expected
    assert (job.state, seat.state, seat.begun) == (WAITING, STOPPING, 0)
    kill = actions[-1]
    assert isinstance(kill, Kill)
    assert kill.grace is (why is not GARBAGE)


def test_jobs_come_back_from_a_worker_that_lives() -> None:
    """What it has not read goes on, before those that wait; the worker keeps its place and the rest."""
    office = Office(capacity=2)
    jobs = office.submit_many(4)
    assert list(office.seat.jobs) == jobs[:2]
    actions = office.roster.returned(office.seat, [jobs[1]])
    assert kinds(actions) == [Wake, Begin]
    assert begun(actions) == [jobs[1]]
    assert list(office.seat.jobs) == jobs[:2]
    assert (jobs[1].hand_ons, office.seat.begun) == (1, 2)


def test_nothing_comes_back() -> None:
    """A worker that had read everything stays as full as it was."""
    office = Office()
    first, second = office.submit_many(2)
    assert office.roster.returned(office.seat, []) is NOTHING
    assert second.state is WAITING
    assert list(office.seat.jobs) == [first]


# leases


def test_a_lease_has_its_worker_alone() -> None:
    """Whatever its capacity, nobody else gets on it until the lease is over."""
    office = Office(capacity=4)
    lease, job = office.submit(lease=True), office.submit()
    assert job.state is WAITING
    inner = office.submit_inside(lease)
    assert (inner.state, inner.bound, inner.seat) == (WRITTEN, True, office.seat)
    assert not office.reply(inner)
    assert begun(office.roster.released(lease)) == [job]
    assert not office.roster.released(lease)


def test_a_lease_needs_a_worker_without_jobs() -> None:
    """A seat with a job on it has room for jobs, but not for a lease."""
    office = Office(2, capacity=2)
    job = office.submit()
    lease = office.submit(lease=True)
    assert lease.seat is not job.seat
    second = office.submit(lease=True)
    assert second.state is WAITING
    assert begun(office.reply(job)) == [second]


def test_a_lease_is_handed_on_until_it_is_entered() -> None:
    """A worker that dies before its lease is entered costs nothing; afterwards it is the holder's."""
    office = Office()
    lease = office.submit(lease=True, write=False)
    actions = office.roster.exited(office.seat, 1)
    assert (lease.state, lease.hand_ons) == (WAITING, 1)
    assert Wake in kinds(actions)
    office.now = 10.0
    office.roster.tick()
    office.ready()
    office.write(lease)
    office.roster.exited(office.seat, 1)
    assert (lease.state, lease.end) == (DONE, End.CRASHED)


def test_a_lease_that_was_never_entered_proves_nothing() -> None:
    """It is cancelled in the very moment it got its worker: the worker has served nobody."""
    office = Office()
    lease = office.submit(lease=True, write=False)
    office.roster.cancelled(lease)
    assert office.seat.served == 0
    assert office.submit().seat is office.seat


def test_a_lease_ends_under_a_job() -> None:
    """Nobody reads the rest: the worker is killed."""
    office = Office()
    lease = office.submit(lease=True)
    inner = office.submit_inside(lease)
    assert kinds(office.roster.released(lease)) == [DESTRUCT, Kill]
    office.roster.exited(office.seat, -9)
    assert (inner.state, inner.end) == (DONE, End.CRASHED)


def test_max_executions_is_looked_at_when_a_lease_ends() -> None:
    """Inside it may be exceeded, and the worker goes at the end; jobs inside count for those who come later."""
    office = Office(max_executions=2)
    lease = office.submit(lease=True)
    office.reply(office.submit_inside(lease))
    assert not office.roster.released(lease)
    lease = office.submit(lease=True)
    for _ in range(3):
        office.reply(office.submit_inside(lease))
        assert (office.seat.state, office.seat.vacant) == (SERVING, False)
    assert kinds(office.roster.released(lease)) == [DESTRUCT, Retire, Spawn]
    assert office.seats[0].reason == "max_executions"


def test_a_stop_request_inside_a_lease() -> None:
    """It is the holder's affair: that job ends, the worker goes, and the next job in there hears that it is closed."""
    office = Office()
    lease = office.submit(lease=True)
    inner = office.submit_inside(lease)
    seat = office.seat
    assert kinds(office.ask_for_stop(inner)) == [Wake, DESTRUCT, Retire, Spawn]
    assert (inner.state, inner.end) == (DONE, End.RETIRED)
    assert office.submit_inside(lease).end is End.CLOSED
    office.roster.released(lease)
    assert seat.state is STOPPING


@pytest.mark.parametrize(("ended", "end"), [("stopped", End.CLOSED), ("killed", End.CLOSED), ("crashed", End.CRASHED)])
def test_a_job_inside_a_lease_whose_worker_is_gone(ended: str, end: End) -> None:
    """What it hears depends on whether that was somebody's wish."""
    office = Office()
    lease = office.submit(lease=True)
    seat = office.seat
    if ended == "stopped":
        office.roster.retire(seat, ended)
    elif ended == "killed":
        office.roster.kill(seat, ended)
    office.roster.exited(seat, 1)
    assert office.submit_inside(lease).end is end


# max_executions


def test_the_successor_starts_ahead_of_the_last_job() -> None:
    """Promise 6: it boots while the last permitted job runs, stands by, and serves as soon as that is over."""
    office = Office(max_executions=2)
    old = office.seat
    office.reply(office.submit())
    assert not old.vacant
    last = Job((b"",))
    assert kinds(office.roster.submit(last)) == [Spawn]
    office.write(last)
    waiting = office.submit()
    new = office.seats[1]
    assert kinds(office.ready()) == [CREATED]
    assert (old.state, new.state, waiting.state) == (SERVING, STANDBY, WAITING)
    actions = office.reply(last)
    assert kinds(actions) == [Begin, DESTRUCT, Retire]
    assert begun(actions) == [waiting]
    assert (old.state, old.reason, new.state) == (STOPPING, "max_executions", SERVING)


def test_one_job_a_worker() -> None:
    """`max_executions=1`: each job has a process of its own."""
    office = Office(max_executions=1)
    used = set()
    for _ in range(5):
        job = office.submit()
        used.add(job.seat)
        office.ready()
        office.reply(job)
        office.roster.exited(office.seats[0], 0)
    assert len(used) == 5


def test_a_permitted_job_that_did_not_start_is_not_counted() -> None:
    """The seat serves one more then; its successor, started for nothing, stands by."""
    office = Office(max_executions=1)
    old = office.seat
    job = office.submit(write=False)
    office.ready()
    office.roster.cancelled(job)
    assert [seat.state for seat in office.seats] == [SERVING, STANDBY]
    assert office.submit().seat is old
    assert len(office.seats) == 2


def test_never_more_than_twice_as_many_workers() -> None:
    """Slow stops hold replacements back: who comes waits until a process is gone, and the housekeeper sleeps."""
    office = Office(max_executions=1)
    first = office.submit()
    office.ready()
    office.reply(first)
    second = Job((b"",))
    assert office.roster.submit(second) is not None
    assert len(office.seats) == 2
    third = office.submit()
    assert third.state is WAITING
    office.write(second)
    assert kinds(office.ask_for_stop(second)) == [Wake, DESTRUCT, Retire]
    assert [seat.state for seat in office.seats] == [STOPPING, STOPPING]
    assert office.roster.next_deadline() == math.inf
    office.now = 60.0
    assert not office.roster.tick()
    assert kinds(office.roster.exited(office.seats[0], 0)) == [Spawn]


# the lives of workers


def test_open_spawns_a_worker_for_each_slot() -> None:
    """Slots are the numbers from 0."""
    office = Office(3, ready=False)
    assert slots(office.seats) == [0, 1, 2]
    assert not office.roster.open()


def test_a_replacement_has_the_slot_of_its_predecessor() -> None:
    """The process finds it in TRIO_WORKERS_SLOT."""
    office = Office(3)
    office.roster.kill(office.seats[1], "killed")
    assert slots(office.seats) == [0, 1, 2]
    office.roster.exited(office.seats[1], -9)
    assert slots(office.seats) == [0, 2, 1]
    assert office.roster.starts == {0: 1, 1: 2, 2: 1}


def test_retire_an_idle_worker() -> None:
    """It gets the stop frame, its successor starts at once, and its end is no error."""
    office = Office()
    seat = office.seat
    assert kinds(office.roster.retire(seat, "stopped")) == [DESTRUCT, Retire, Spawn]
    assert not office.roster.retire(seat, "again")
    assert not office.roster.about_to_kill(seat)
    assert kinds(office.roster.exited(seat, 0)) == []
    assert office.roster.exits == {"stopped": 1}
    assert not office.roster.retire(seat, "gone")


def test_retire_a_busy_worker() -> None:
    """It finishes its job first, while its successor comes up."""
    office = Office()
    job, waiting = office.submit_many(2)
    assert kinds(office.roster.retire(office.seat, "stopped")) == [Spawn]
    assert kinds(office.ready()) == [CREATED]
    assert (job.state, waiting.state) == (WRITTEN, WAITING)
    assert begun(office.reply(job)) == [waiting]
    assert office.seats[0].reason == "stopped"


def test_a_worker_that_leaves_gets_no_other_job() -> None:
    """Even with room for one."""
    office = Office(capacity=2)
    office.submit()
    office.roster.retire(office.seat, "stopped")
    assert office.submit().state is WAITING


def test_stop_or_kill_a_worker_that_comes_up() -> None:
    """It is killed, its handshake comes too late, no observer hears of it, and a new one starts at once."""
    for end in ("retire", "kill"):
        office = Office(ready=False)
        seat = office.seat
        assert kinds(getattr(office.roster, end)(seat, "stopped")) == [Kill]
        assert office.roster.ready(seat) is NOTHING
        assert kinds(office.roster.exited(seat, -9)) == [Spawn]
        assert (office.roster.failed_starts, office.roster.failed_in_a_row) == (0, 0)
        assert office.roster.exits == {"stopped": 1}


def test_kill_a_busy_worker() -> None:
    """Its job ends with it; it is replaced when it is gone."""
    office = Office()
    job = office.submit()
    assert kinds(office.roster.kill(office.seat, "killed")) == [DESTRUCT, Kill]
    assert kinds(office.roster.kill(office.seat, "again")) == [Kill]
    assert kinds(office.roster.exited(office.seat, -9)) == [Wake, Spawn]
    assert (job.end, office.roster.exits) == (End.CRASHED, {"killed": 1})


def test_a_reply_that_is_there_counts_even_of_a_dead_worker() -> None:
    """The job has its answer, and no end."""
    office = Office()
    job = office.submit()
    seat = office.seat
    assert kinds(office.roster.exited(seat, 1, answered=[job])) == [Wake, ERROR, DESTRUCT, Spawn]
    assert (job.state, job.end, seat.served) == (DONE, None, 1)


def test_garbage() -> None:
    """The worker is killed at once; ERROR and DESTRUCT are told before, and nothing twice."""
    office = Office()
    job = office.submit()
    seat = office.seat
    actions = office.roster.suspect(seat, GARBAGE)
    assert kinds(actions) == [ERROR, DESTRUCT, Kill]
    assert not office.roster.suspect(seat, GARBAGE)
    assert job.state is WRITTEN
    assert kinds(office.roster.exited(seat, -9)) == [Wake, Spawn]
    assert (job.end, office.roster.exits) == (End.CRASHED, {"broke the protocol": 1})


def test_more_than_the_answer() -> None:
    """The job has its reply; the line can't carry another."""
    office = Office()
    job, waiting = office.submit_many(2)
    assert kinds(office.reply(job, GARBAGE)) == [ERROR, DESTRUCT, Kill]
    assert (job.end, waiting.state) == (None, WAITING)


def test_the_relay_ends() -> None:
    """The worker has a moment to end by itself, so that its true exit status is known."""
    office = Office()
    job = office.submit()
    (kill,) = office.roster.suspect(office.seat, "it closed its relay", grace=True)
    assert isinstance(kill, Kill)
    assert kill.grace
    assert kinds(office.roster.exited(office.seat, 3)) == [Wake, ERROR, DESTRUCT, Spawn]
    assert (job.end, office.roster.exits) == (End.CRASHED, {"crashed": 1})


def test_the_relay_ends_and_the_worker_does_not() -> None:
    """When the moment is over it is killed: an unexpected end, so ERROR is told too, once."""
    office = Office()
    office.submit()
    office.roster.suspect(office.seat, "it closed its relay", grace=True)
    assert kinds(office.roster.about_to_kill(office.seat)) == [ERROR, DESTRUCT]
    assert kinds(office.roster.exited(office.seat, -9)) == [Wake, Spawn]
    assert office.roster.exits == {"closed its relay": 1}


@pytest.mark.parametrize("way", ["kill", "suspect", "suspect with grace"])
def test_who_stands_by_does_not_wait_for_the_corpse(way: str) -> None:
    """A ready successor serves as soon as its predecessor no longer does, not only when that is reaped."""
    office = Office(max_executions=1)
    job, waiting = office.submit_many(2)
    office.ready()
    old, new = office.seats
    assert new.state is STANDBY
    if way == "kill":
        actions = office.roster.cancelled(job)
    else:
        actions = office.roster.suspect(old, GARBAGE, grace=way.endswith("grace"))
    assert begun(actions) == [waiting]
    assert (old.state, new.state) == (STOPPING, SERVING)


def test_a_successor_that_fails_to_boot() -> None:
    """The predecessor goes on; the slot is tried again."""
    office = Office(max_executions=1)
    office.submit()
    assert kinds(office.roster.exited(office.seats[1], 1)) == [ERROR]
    office.spawn_after(0.1)


def test_one_crash_costs_one_job() -> None:
    """Promise 5: a crash fails the job that was on that worker and no other."""
    office = Office(3)
    jobs = office.submit_many(6)
    office.roster.exited(office.seats[1], -11)
    assert [job.end for job in jobs] == [None, End.CRASHED, None, None, None, None]
    assert [job.state for job in jobs[3:]] == [WAITING] * 3


# back-off


def test_failed_boots_back_off() -> None:
    """Each takes longer, up to the maximum."""
    office = Office(ready=False, restart=Restart(jitter=0.0, maximum=1.0))
    for delay in (0.1, 0.2, 0.4, 0.8, 1.0, 1.0):
        assert kinds(office.roster.exited(office.seat, 1)) == [ERROR]
        office.spawn_after(delay)
    assert (office.roster.failed_starts, office.roster.exits) == (6, {"boot failed": 6})


def test_idle_deaths_back_off() -> None:
    """A handshake alone resets nothing; a worker that shakes hands and dies must not spin."""
    office = Office()
    for delay in (0.1, 0.2, 0.4):
        assert kinds(office.roster.exited(office.seat, 1)) == [ERROR, DESTRUCT]
        office.spawn_after(delay)
        office.ready()
    assert office.roster.failed_in_a_row == 0


def test_stop_requests_of_fresh_workers_back_off() -> None:
    """One that only ever asks to be replaced must not spin either; one that has served is replaced at once."""
    office = Office()
    assert kinds(office.ask_for_stop(office.submit())) == [Wake, DESTRUCT, Retire]
    office.roster.exited(office.seat, 0)
    office.spawn_after(0.1)
    office.ready()
    (job,) = office.seat.jobs
    office.write(job)
    office.reply(job)
    assert kinds(office.ask_for_stop(office.submit())) == [Wake, DESTRUCT, Retire, Spawn]


def test_a_dirty_stop_request_is_one_failure() -> None:
    """The request and the death that follows count once."""
    office = Office()
    office.ask_for_stop(office.submit(), GARBAGE)
    office.roster.exited(office.seat, -9)
    office.spawn_after(0.1)


@pytest.mark.parametrize("ending", ["crashed", "cancelled", "killed", "served", "stopped"])
def test_replaced_at_once(ending: str) -> None:
    """After a job, served or died of, and after an end by wish there is no delay."""
    office = Office()
    seat = office.seat
    if ending in ("crashed", "cancelled", "served"):
        job = office.submit()
        if ending == "cancelled":
            office.roster.cancelled(job)
        elif ending == "served":
            office.reply(job)
    elif ending == "killed":
        office.roster.kill(seat, ending)
    else:
        office.roster.retire(seat, ending)
    office.roster.exited(seat, 1)
    assert (office.seat.slot, office.seat.state) == (0, STARTING)


@pytest.mark.parametrize("reset", ["served", "stable", "crashed", "no"])
def test_what_starts_the_count_again(reset: str) -> None:
    """A job served or died of, or a long life; nothing less."""
    office = Office(ready=False)
    for delay in (0.1, 0.2):
        office.roster.exited(office.seat, 1)
        office.spawn_after(delay)
    assert office.roster.failed_in_a_row == 2
    office.ready()
    if reset == "served":
        office.reply(office.submit())
        office.roster.exited(office.seat, 1)
    elif reset == "crashed":
        office.submit()
        office.roster.exited(office.seat, 1)
    elif reset == "stable":
        office.now += 10.0
    if reset in ("served", "crashed"):
        assert office.roster.failed_in_a_row == 0
        office.ready()
    office.roster.exited(office.seat, 1)
    office.spawn_after(0.4 if reset == "no" else 0.1)


def test_slots_back_off_each_by_itself() -> None:
    """One slot's failures are not another's; the housekeeper wakes up for the first."""
    office = Office(2, ready=False)
    first, second = office.seats
    office.roster.exited(first, 1)
    office.now = 0.05
    office.roster.exited(second, 1)
    assert office.roster.next_deadline() == pytest.approx(0.1)
    office.now = 0.1
    assert kinds(office.roster.tick()) == [Spawn]
    assert office.roster.next_deadline() == pytest.approx(0.15)


def test_a_delay_is_not_for_the_successor() -> None:
    """A worker dies idle while its successor stands by: when that one dies of a job, it is replaced at once."""
    office = Office(max_executions=1)
    job = office.submit(write=False)
    office.ready()
    office.roster.cancelled(job)
    old, new = office.seats
    office.roster.exited(old, 1)
    assert new.state is SERVING
    assert office.roster.next_deadline() == math.inf
    assert kinds(office.roster.submit(Job((b"",)))) == [Spawn]


def test_jitter() -> None:
    """Delays vary by the share that `Restart.jitter` says."""
    office = Office(4, ready=False, restart=Restart(initial=1.0, jitter=0.5))
    for seat in list(office.seats):
        office.roster.exited(seat, 1)
    tries = []
    for _ in range(4):
        office.now = office.roster.next_deadline()
        tries.append(office.now)
        assert [type(action) for action in office.roster.tick()] == [Spawn]
    assert len(set(tries)) == 4
    assert all(0.5 <= at <= 1.5 for at in tries)


def test_failures_without_number() -> None:
    """After days of failures the delay is still the maximum, not an OverflowError."""
    office = Office(ready=False)
    for _ in range(5000):
        office.roster.exited(office.seat, 1)
        office.now = office.roster.next_deadline()
        office.roster.tick()
    office.roster.exited(office.seat, 1)
    office.spawn_after(30.0)


# giving up


def test_give_up() -> None:
    """So many failed boots in a row in the whole pool end it: everything is killed, whoever waits hears of it."""
    office = Office(2, ready=False, restart=Restart(give_up_after=3))
    office.roster.ready(office.seats[0])
    busy, waiting = office.submit_many(2)
    office.roster._backoff.in_a_row = 2
    actions = office.roster.exited(office.seats[1], 1)
    assert kinds(actions) == [ERROR, GiveUp, Wake, DESTRUCT, Kill]
    assert (waiting.state, waiting.end, busy.state) == (DONE, End.CLOSED, WRITTEN)
    assert kinds(office.roster.exited(office.seat, -9)) == [Wake, Drained]
    assert busy.end is End.CLOSED


def test_who_does_not_give_up() -> None:
    """Crashes under jobs, idle deaths and kills at boot never count; a job served starts again."""
    office = Office(restart=Restart(give_up_after=1))
    for _ in range(5):
        office.submit()
        assert GiveUp not in kinds(office.roster.exited(office.seat, -11))
        office.ready()
        assert GiveUp not in kinds(office.roster.exited(office.seat, 1))
        office.now += 100.0
        office.roster.tick()
        office.roster.kill(office.seat, "killed")
        assert GiveUp not in kinds(office.roster.exited(office.seat, -9))
        office.ready()
    office = Office(restart=Restart(give_up_after=2, jitter=0.0), max_executions=1)
    for _ in range(5):
        job = office.submit()
        assert GiveUp not in kinds(office.roster.exited(office.seats[1], 1))
        office.reply(job)
        office.roster.exited(office.seats[0], 0)
        office.now += 100.0
        office.roster.tick()
        office.ready()


# the end


def test_close_an_idle_pool() -> None:
    """Everybody gets the stop frame; who comes up is killed; the last one gone is told."""
    office = Office(2)
    office.roster.kill(office.seats[1], "killed")
    office.roster.exited(office.seats[1], -9)
    first, second = office.seats
    assert kinds(office.roster.close()) == [DESTRUCT, Retire, Kill]
    assert kinds(office.roster.exited(first, 0)) == []
    assert kinds(office.roster.exited(second, -9)) == [Drained]
    assert (office.seats, office.roster.exits) == ([], {"killed": 1, "closing": 2})
    assert office.submit().end is End.CLOSED


def test_close_finishes_the_jobs_that_are_there() -> None:
    """Promise 1: those that run and those that wait; later ones are refused."""
    office = Office(2)
    jobs = office.submit_many(3)
    assert not office.roster.close()
    assert office.submit().end is End.CLOSED
    assert begun(office.reply(jobs[0])) == [jobs[2]]
    office.write(jobs[2])
    assert not office.reply(jobs[1])
    assert office.phase < Phase.ENDING
    assert kinds(office.reply(jobs[2])) == [DESTRUCT, Retire, DESTRUCT, Retire]
    assert office.phase is Phase.ENDING


def test_close_waits_for_a_lease() -> None:
    """With or without a job in it."""
    office = Office()
    lease = office.submit(lease=True)
    assert not office.roster.close()
    office.reply(office.submit_inside(lease))
    assert kinds(office.roster.released(lease)) == [DESTRUCT, Retire]


def test_close_when_the_last_job_that_waits_goes() -> None:
    """It was cancelled, or waited too long."""
    office = Office(ready=False)
    job = office.submit()
    office.roster.close()
    assert kinds(office.roster.cancelled(job)) == [Kill]
    assert kinds(office.roster.exited(office.seat, -9)) == [Drained]


def test_a_closing_pool_replaces_workers_only_for_jobs() -> None:
    """A dead worker is not missed while nobody waits; a job handed on brings one back."""
    office = Office(2)
    job = office.submit()
    office.roster.close()
    (idle,) = (seat for seat in office.seats if not seat.jobs)
    assert kinds(office.roster.exited(idle, 1)) == [ERROR, DESTRUCT]
    assert office.roster.next_deadline() == math.inf
    office.now = 10.0
    assert not office.roster.tick()
    office.reply(job)
    assert office.phase is Phase.ENDING

    office = Office(2)
    job = office.submit()
    office.roster.close()
    (idle,) = (seat for seat in office.seats if not seat.jobs)
    office.roster.exited(idle, 1)
    office.now = 10.0
    assert Spawn in kinds(office.ask_for_stop(job))
    assert begun(office.ready()) == [job]


def test_close_twice() -> None:
    """The second does nothing."""
    office = Office()
    office.submit()
    office.roster.close()
    assert not office.roster.close()


def test_close_without_a_worker() -> None:
    """All slots wait for another try: there is nobody to stop."""
    office = Office(ready=False)
    office.roster.exited(office.seat, 1)
    assert kinds(office.roster.close()) == [Drained]
    assert office.roster.next_deadline() == math.inf


def test_abort() -> None:
    """Who waits is over now, who runs when his worker is gone, answered is answered, and nothing is handed on."""
    office = Office(3)
    jobs = office.submit_many(5)
    first, second, third = (job.seat for job in jobs[:3])
    assert first and second and third
    office.roster.retire(third, "stopped")
    actions = office.roster.abort()
    assert kinds(actions) == [Wake, Wake, DESTRUCT, Kill, DESTRUCT, Kill, DESTRUCT, Kill, Kill]
    assert [job.end for job in jobs] == [None, None, None, End.CLOSED, End.CLOSED]
    assert office.roster.abort() is NOTHING
    successor = office.seats[3]
    office.roster.exited(first, -9, answered=[jobs[0]])
    office.roster.exited(second, -9, unstarted=[jobs[1]])
    office.roster.exited(third, -9)
    assert kinds(office.roster.exited(successor, -9)) == [Drained]
    assert [job.end for job in jobs[:3]] == [None, End.CLOSED, End.CLOSED]


def test_abort_without_a_worker() -> None:
    """Whoever waits for the end hears of it."""
    office = Office(ready=False)
    office.roster.exited(office.seat, 1)
    assert kinds(office.roster.abort()) == [Drained]


def test_abort_a_pool_that_closes() -> None:
    """Workers that take their time get no more of it."""
    office = Office()
    office.roster.close()
    assert kinds(office.roster.abort()) == [Kill]


def test_who_is_shown() -> None:
    """The state is visible in `repr`."""
    office = Office()
    job, waiting = office.submit("first"), office.submit()
    lease = office.submit("mine", lease=True)
    assert repr(office.roster) == "<Roster OPEN: 1 seats, 0 free, 2 waiting>"
    assert repr(office.seat) == "<Seat 0: serving, 1 of 1 jobs>"
    assert (repr(job), repr(lease)) == ("<Job first: on the wire>", "<Lease mine: waiting for a worker>")
    office.reply(job)
    office.write(waiting)
    office.reply(waiting)
    assert repr(office.seat) == "<Seat 0: serving, 0 of 1 jobs, leased>"
    office.roster.exited(office.seat, 1)
    assert GONE.value == "gone"
