"""The roster's rules for jobs ahead of their turn, one by one; `test_roster_machine.py` drives them in every order."""

import math
from collections.abc import Sequence
from typing import Any, Final

import pytest

from tests.roster_office import Office, begun, kinds
from trio_workers._config import Limits
from trio_workers._model import WorkerEvent
from trio_workers._roster import MOST_AHEAD, PATIENCE
from trio_workers._seats import (
    ASSIGNED,
    DONE,
    NOTHING,
    SERVING,
    STANDBY,
    STOPPING,
    WAITING,
    WRITTEN,
    Actions,
    Begin,
    Drained,
    End,
    Job,
    Kill,
    Lend,
    Phase,
    Plan,
    Recall,
    Retire,
    Seat,
    Spawn,
    TakeBack,
    Wake,
    Watch,
)

CREATED, DESTRUCT, ERROR = WorkerEvent.CREATED, WorkerEvent.DESTRUCT, WorkerEvent.ERROR

QUICK: Final = 2**-12
"""Seconds that a job takes of which four lie behind another; a power of two, so that sums of it are exact."""


def steady(**limits: float | int | None) -> Limits:
    """Limits without chance."""
    return Limits(jitter=0.0, **limits)  # type: ignore[arg-type]


def office_at(pace: float, size: int = 1, **options: Any) -> Office:
    """An office whose lines can give jobs back, and whose workers have had a job each, that took so long."""
    office = Office(size, recalls=True, read_ahead=MOST_AHEAD + 1, **options)
    first = office.submit_many(size)
    office.now += pace
    for job in first:
        office.reply(job)
    return office


def hand_in(office: Office, label: str = "", **fields: Any) -> tuple[Job, Actions]:
    """Hand a job in, and return what follows with it."""
    job = Job((b"",), label, lease=fields.pop("lease", False))
    for name, value in fields.items():
        setattr(job, name, value)
    return job, office.roster.submit(job)


def recalled(actions: Actions) -> list[Seat]:
    """Whose line is to be emptied, unless the job in front has been answered."""
    return [action.seat for action in actions if isinstance(action, Recall)]


def emptied(actions: Actions) -> list[Seat]:
    """Whose line is to be emptied."""
    return [action.seat for action in actions if isinstance(action, TakeBack)]


def woken(actions: Actions) -> list[Job]:
    return [action.job for action in actions if isinstance(action, Wake)]


def in_front(seat: Seat) -> list[Job]:
    """Whose turn it is, on the wire."""
    return [job for job in seat.jobs if job.state is WRITTEN]


def take_back(office: Office, *jobs: Job) -> Actions:
    """These jobs had not been read, and are out of their line."""
    (seat,) = {job.ahead for job in jobs}
    assert seat is not None
    return office.roster.taken_back(seat, jobs)


def queue_of(office: Office) -> list[Job]:
    """Who waits, and lies in no line."""
    return list(office.roster._queue)


def check_lent(jobs: Sequence[Job], seat: Seat) -> None:
    """They wait, in the seat's line."""
    assert [(job.state, job.ahead, job.seat) for job in jobs] == [(WAITING, seat, None)] * len(jobs)
    assert list(seat.ahead) == jobs


# who is lent, and where


def test_jobs_are_lent_when_the_one_in_front_is_written() -> None:
    """Not while it has a worker and nothing more: then in their order, as far as there is room; and they still wait."""
    office = Office(read_ahead=3)
    head, *others = [office.submit(str(number), write=False) for number in range(4)]
    assert (head.state, queue_of(office)) == (ASSIGNED, others)
    assert office.lend(office.roster.written(head)) == others[:2]
    check_lent(others[:2], office.seat)
    assert queue_of(office) == others[2:]
    assert office.roster.waiting == 3
    assert (office.seat.begun, list(office.seat.jobs)) == (1, [head])


def test_a_job_that_comes_later_is_lent_at_once() -> None:
    """Where a line has room when it is handed in."""
    office = Office(read_ahead=2)
    office.submit("head")
    job, actions = hand_in(office)
    assert (kinds(actions), office.lend(actions)) == ([Lend], [job])


def test_nothing_is_lent_by_default() -> None:
    """One job at a time, where neither `read_ahead` nor take-back is there: the shared empty tuple."""
    office = Office()
    head, job = office.submit("head", write=False), office.submit()
    assert office.roster.written(head) is NOTHING
    assert (job.ahead, office.seat.depth) == (None, 0)


def test_nobody_is_lent_while_nobody_waits() -> None:
    """A job on its own costs nothing more: the shared empty tuple."""
    office = Office(read_ahead=3)
    assert office.roster.written(office.submit(write=False)) is NOTHING


def test_a_free_worker_is_better() -> None:
    """A job is lent only while no worker is free."""
    office = Office(2, read_ahead=2)
    first, second, third = office.submit_many(3)
    assert [job.seat for job in (first, second)] == office.seats
    check_lent([third], office.seats[0])


def test_each_is_lent_to_the_next() -> None:
    """They spread over the lines, so that none has two where another has none."""
    office = Office(3, read_ahead=3)
    heads = [office.submit(write=False) for _ in range(3)]
    jobs = [office.submit(str(number)) for number in range(8)]
    for head in heads[:2]:
        head.state = WRITTEN  # so that the first of them lends to all
        office.roster._roomy[head.seat] = None  # type: ignore[index]
    assert office.lend(office.roster.written(heads[2])) == jobs[:6]
    for number, seat in enumerate(office.seats):
        check_lent([jobs[number], jobs[number + 3]], seat)


def test_each_that_comes_is_lent_to_the_next() -> None:
    """Also one by one."""
    office = Office(2, read_ahead=3)
    first, second = office.seats
    jobs = office.submit_many(6)[2:]
    check_lent([jobs[0], jobs[2]], first)
    check_lent([jobs[1], jobs[3]], second)


@pytest.mark.parametrize("read_ahead", [2, 3, 8])
def test_never_more_than_read_ahead(read_ahead: int) -> None:
    """With the one it has, so many may be on the way to a worker; an answer makes room for one."""
    office = Office(read_ahead=read_ahead)
    head, *others = office.submit_many(20)
    check_lent(others[: read_ahead - 1], office.seat)
    actions = office.reply(head)
    assert office.lend(actions) == [others[read_ahead - 1]]
    check_lent(others[1:read_ahead], office.seat)


def test_nothing_lies_behind_a_job_that_is_not_written() -> None:
    """Also where the line had room behind the one before it."""
    office = Office(read_ahead=4)
    office.reply(office.submit())
    head = office.submit(write=False)
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])
    assert office.lend(office.roster.written(head)) == [job]


@pytest.mark.parametrize("before", [False, True])
def test_nothing_lies_behind_a_job_that_is_alone(before: bool) -> None:
    """A stream, a chunk, what is large: until it is answered, and whatever its worker had before."""
    office = Office(read_ahead=4)
    if before:
        office.reply(office.submit())
    head, _ = hand_in(office, alone=True)
    office.write(head)
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])
    actions = office.reply(head)
    assert begun(actions) == [job]
    assert not office.lend(actions)


@pytest.mark.parametrize("lease", [False, True])
def test_nobody_gets_past_a_job_that_is_alone(lease: bool) -> None:
    """It is never lent, and while it is the next to get a worker nobody behind it is; when it has gone, they are."""
    office = Office(read_ahead=4)
    head, before = office.submit_many(2)
    check_lent([before], office.seat)
    alone, actions = hand_in(office, alone=not lease, lease=lease)
    assert not office.lend(actions)
    behind = office.submit_many(2)
    check_lent([before], office.seat)
    assert queue_of(office) == [alone, *behind]
    assert not office.lend(office.reply(head))
    assert begun(office.reply(before)) == [alone]
    assert queue_of(office) == behind


def test_when_a_job_that_is_alone_leaves_the_queue() -> None:
    """Those behind it wait no longer than they have to."""
    office = Office(read_ahead=4)
    office.submit("head")
    alone, _ = hand_in(office, alone=True)
    behind = office.submit_many(2)
    assert office.lend(office.roster.cancelled(alone)) == behind


def test_nothing_lies_in_the_line_of_a_leased_worker() -> None:
    """Behind the holder's own job, that is; nor when the lease is over."""
    office = Office(read_ahead=4)
    lease = office.submit(lease=True)
    inner = office.submit_inside(lease)
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])
    assert not office.reply(inner)
    actions = office.roster.released(lease)
    assert (kinds(actions), begun(actions)) == ([Begin], [job])


def test_nothing_lies_in_the_line_of_a_worker_with_several_jobs() -> None:
    """Whose turn it is follows from the replies only where there is one in front."""
    office = Office(capacity=2, read_ahead=4)
    first, second = office.submit_many(2)
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])
    assert begun(office.reply(first)) == [job]
    office.reply(second)
    assert not queue_of(office)


def test_never_more_than_max_executions_leaves() -> None:
    """A worker that may begin so many more has no more of them in its line: the others are its successor's."""
    office = Office(max_executions=3, read_ahead=8)
    head, *others = office.submit_many(6)
    check_lent(others[:2], office.seat)
    old = office.seat
    office.now = 1.0
    actions = office.reply(head)
    assert (kinds(actions), in_front(old), office.lend(actions)) == ([Lend], [others[0]], [])
    office.now = 2.0
    actions = office.reply(others[0])
    assert kinds(actions) == [Spawn, Lend]
    assert not office.lend(actions)
    assert (old.spent, old.vacant, queue_of(office)) == (True, True, others[2:])
    office.ready()
    actions = office.reply(others[1])
    assert begun(actions) == [others[2]]
    assert (old.state, old.reason) == (STOPPING, "max_executions")


def test_debug_lends_nothing() -> None:
    """Each job has a process of its own, whatever `read_ahead` says."""
    office = Office(1, debug=True, read_ahead=4)
    head, job = office.submit_many(2)
    office.ready()
    office.write(head)
    assert head.state is WRITTEN
    assert job.ahead is None
    _, actions = hand_in(office)
    assert not office.lend(actions)
    assert not office.seat.ahead


# whose turn it is


def test_the_next_one_is_in_front_when_the_one_before_is_answered() -> None:
    """It is on the wire from that moment, with its worker; whoever told of the answer wakes its task."""
    office = Office(read_ahead=3)
    office.now = 1.0
    head, first, second = office.submit_many(3)
    office.now = 3.0
    assert office.reply(head) is NOTHING
    assert (first.state, first.seat, first.ahead) == (WRITTEN, office.seat, None)
    assert (first.started, first.waited) == (3.0, 2.0)
    assert (list(office.seat.jobs), list(office.seat.ahead)) == ([first], [second])
    assert (office.seat.begun, office.seat.served, office.roster.waiting) == (2, 1, 1)


def test_the_others_get_what_room_there_is() -> None:
    """As soon as the worker has gone on, the first of those that wait in no line lies in its."""
    office = Office(read_ahead=2)
    head, *others = office.submit_many(4)
    actions = office.reply(head)
    assert (in_front(office.seat), office.lend(actions)) == ([others[0]], [others[1]])
    actions = office.reply(others[0])
    assert (in_front(office.seat), office.lend(actions)) == ([others[1]], [others[2]])


def test_an_empty_line_is_a_free_worker() -> None:
    """When the last of them has been answered."""
    office = Office(read_ahead=2)
    head, job = office.submit_many(2)
    office.reply(head)
    assert office.reply(job) is NOTHING
    assert office.submit().seat is office.seat


def test_the_head_that_was_not_begun_makes_way() -> None:
    """One whose caller has gone before it was written has nothing behind it; whoever waits gets the seat."""
    office = Office(read_ahead=2)
    head = office.submit("head", write=False)
    job = office.submit()
    actions = office.roster.cancelled(head)
    assert begun(actions) == [job]
    assert office.seat.begun == 1


# how many, where they can be taken back


def test_nothing_is_lent_before_a_worker_has_shown_its_pace() -> None:
    """Its first job may be a long one."""
    office = Office(recalls=True, read_ahead=MOST_AHEAD + 1)
    head, job = office.submit_many(2)
    assert queue_of(office) == [job]
    office.now += QUICK
    actions = office.reply(head)
    assert begun(actions) == [job]
    assert office.lend(office.roster.written(job)) == []
    assert office.lend(hand_in(office)[1])


@pytest.mark.parametrize(
    ("took", "depth"),
    [
        (0.0, MOST_AHEAD),
        (PATIENCE / 100, MOST_AHEAD),
        (QUICK / 4, MOST_AHEAD),
        (QUICK, 4),
        (2 * QUICK, 2),
        (PATIENCE, 1),
        (1.01 * PATIENCE, 0),
        (1.0, 0),
    ],
)
def test_the_depth_follows_from_the_pace(took: float, depth: int) -> None:
    """As many as are done in `PATIENCE`, at most `MOST_AHEAD`, and none where one takes longer."""
    office = office_at(took)
    assert office.seat.depth == depth
    head, *others = office.submit_many(20)
    assert head.state is WRITTEN
    assert queue_of(office) == others[depth:]
    check_lent(others[:depth], office.seat)


def test_the_pace_is_that_of_late() -> None:
    """A mean in which the last job counts for a fifth, and a very slow one as two of `PATIENCE`."""
    office = office_at(QUICK)
    for took in (3 * QUICK, QUICK / 2, 100.0):
        before = office.seat.took
        job = office.submit()
        office.now += took
        office.reply(job)
        assert office.seat.took == pytest.approx(0.8 * before + 0.2 * min(took, 2 * PATIENCE))
    assert office.seat.depth == 1


@pytest.mark.parametrize(("took", "depth"), [(2 * QUICK, 3), (2 * PATIENCE, 1)])
def test_a_worker_that_has_become_slow_gets_no_more(took: float, depth: int) -> None:
    """What lies in its line is as much as the new depth or more, so the next room goes to nobody."""
    office = office_at(QUICK)
    head, *others = office.submit_many(7)
    check_lent(others[:4], office.seat)
    office.now += took
    actions = office.reply(head)
    assert (office.seat.depth, office.lend(actions)) == (depth, [])
    check_lent(others[1:4], office.seat)
    assert queue_of(office) == others[4:]


def test_the_depth_of_commands_is_what_the_config_says() -> None:
    """However long their jobs take."""
    office = Office(read_ahead=4)
    for took in (QUICK, 100.0):
        job = office.submit()
        office.now += took
        office.reply(job)
        assert office.seat.depth == 3


# taking back


def test_what_lies_behind_a_slow_job_is_taken_back() -> None:
    """When that has taken `PATIENCE`, and not before; nothing is lent any more until it is answered."""
    office = office_at(QUICK)
    head, first, second = office.submit_many(3)
    seat = office.seat
    assert office.roster.next_deadline() == head.started + PATIENCE
    office.now = head.started + 0.99 * PATIENCE
    assert not office.roster.tick()
    assert not seat.is_slow
    assert office.roster.next_deadline() == head.started + PATIENCE
    office.now = head.started + PATIENCE
    actions = office.roster.tick()
    assert (kinds(actions), recalled(actions)) == ([Recall], [seat])
    assert seat.is_slow
    assert woken(take_back(office, first, second)) == [first, second]
    assert (queue_of(office), list(seat.ahead)) == ([first, second], [])
    third, actions = hand_in(office)
    assert not office.lend(actions)
    assert office.roster.next_deadline() == math.inf
    actions = office.reply(head)
    assert (begun(actions), seat.is_slow) == ([first], False)
    assert office.lend(office.roster.written(first)) == [second, third]


def test_taking_back_counts_from_the_head_s_own_start() -> None:
    """Not from when the first was lent: behind one that has taken that long already, a job lies for no time at all."""
    office = office_at(QUICK)
    head = office.submit("head")
    office.now += PATIENCE / 2
    job, actions = hand_in(office)
    assert (kinds(actions), office.lend(actions)) == ([Lend], [job])
    assert office.roster.next_deadline() == head.started + PATIENCE
    office = office_at(QUICK)
    office.submit("head")
    office.now += 10 * PATIENCE
    office.submit("lent")
    assert office.roster.next_deadline() <= office.now
    assert recalled(office.roster.tick()) == [office.seat]


def test_each_head_has_its_own_patience() -> None:
    """When the worker has gone on, the time counts anew; with nothing behind the last there is none."""
    office = office_at(QUICK)
    head, first, second = office.submit_many(3)
    office.now += PATIENCE / 2
    office.reply(head)
    assert (first.started, office.seat.recall_at) == (office.now, office.now + PATIENCE)
    office.now = head.started + PATIENCE
    assert not recalled(office.roster.tick())
    office.now = first.started + PATIENCE / 2
    office.reply(first)
    assert second.state is WRITTEN
    assert office.seat.recall_at == math.inf
    office.roster.tick()
    assert office.roster.next_deadline() == math.inf


def test_the_next_head_has_nothing_of_its_predecessor_s_patience() -> None:
    """Also where the line was emptied meanwhile: what lies behind the new one lies there for all of its time."""
    office = office_at(QUICK)
    head, job = office.submit_many(2)
    take_back(office, job)
    office.roster.cancelled(job)
    office.now += PATIENCE / 2
    office.reply(head)
    head = office.submit("head")
    job = office.submit()
    assert office.seat.recall_at == head.started + PATIENCE == office.now + PATIENCE
    check_lent([job], office.seat)
    office.now += 0.99 * PATIENCE
    assert not recalled(office.roster.tick())
    assert office.roster.next_deadline() == head.started + PATIENCE


def test_what_a_slow_worker_has_read_meanwhile_stays() -> None:
    """Of three that lie there the first has gone in already: its turn comes as always."""
    office = office_at(QUICK)
    head, first, second, third = office.submit_many(4)
    office.now += PATIENCE
    office.roster.tick()
    assert woken(take_back(office, second, third)) == [second, third]
    check_lent([first], office.seat)
    actions = office.reply(head)
    assert in_front(office.seat) == [first]
    assert not office.seat.is_slow
    assert office.lend(actions) == [second, third]


def test_a_slow_worker_that_gives_nothing_back() -> None:
    """What lay there has been read, so its line has room for more: it gets none all the same."""
    office = office_at(QUICK)
    _, read = office.submit_many(2)
    office.now += PATIENCE
    office.roster.tick()
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])
    check_lent([read], office.seat)


def test_it_is_slow_once() -> None:
    """What has stayed in its line is not asked for again and again while the same job runs."""
    office = office_at(QUICK)
    office.submit_many(3)
    office.now += PATIENCE
    assert recalled(office.roster.tick())
    office.now += 100.0
    assert not recalled(office.roster.tick())
    assert office.roster.next_deadline() == math.inf


def test_what_is_taken_back_keeps_its_place() -> None:
    """Before all who came later, wherever they lie, and behind who came before."""
    office = office_at(2 * QUICK, 2)
    one, other = office.seats
    jobs = office.submit_many(8)[2:]
    check_lent([jobs[0], jobs[2]], one)
    check_lent([jobs[1], jobs[3]], other)
    assert queue_of(office) == jobs[4:]
    take_back(office, jobs[1], jobs[3])
    assert queue_of(office) == [jobs[1], jobs[3], *jobs[4:]]
    take_back(office, jobs[0], jobs[2])
    assert queue_of(office) == jobs
    assert list(office.roster._waiting) == jobs


def test_a_free_worker_gets_what_is_taken_back() -> None:
    """The oldest first; what is left waits."""
    office = office_at(QUICK, 2)
    slow, alone = office.submit("slow"), hand_in(office, alone=True)[0]
    office.write(alone)
    jobs = office.submit_many(3)
    assert slow.seat is not None
    check_lent(jobs, slow.seat)
    office.reply(alone)
    assert not begun(office.roster.tick())
    actions = take_back(office, *jobs)
    assert begun(actions) == [jobs[0]]
    assert (jobs[0].state, jobs[0].seat) == (ASSIGNED, alone.seat)
    assert queue_of(office) == jobs[1:]
    assert office.lend(office.roster.written(jobs[0])) == jobs[1:]
    assert [job.hand_ons for job in jobs] == [0, 0, 0]


def test_who_comes_goes_to_a_free_worker_while_others_lie_in_a_line() -> None:
    """Those have at most `PATIENCE` to wait before they are taken back."""
    office = office_at(QUICK, 2)
    slow, quick = office.submit_many(2)
    first = office.submit()
    check_lent([first], slow.seat)  # type: ignore[arg-type]
    office.reply(quick)
    job, actions = hand_in(office)
    assert not actions
    assert job.seat is quick.seat


def test_the_time_in_a_line_is_time_of_waiting() -> None:
    """A job that was taken back has waited from when it came."""
    office = office_at(QUICK)
    start = office.now
    head, job = office.submit_many(2)
    office.now = start + 3.0
    take_back(office, job)
    office.now = start + 5.0
    assert office.roster.longest_wait == 5.0
    assert begun(office.reply(head)) == [job]
    assert job.waited == 5.0


def test_the_head_itself_comes_back() -> None:
    """The worker read the next one in the very moment: that is in front now, and the old head waits before all."""
    office = office_at(QUICK)
    head, first, second, third = office.submit_many(4)
    seat = office.seat
    start = seat.begun
    office.now += PATIENCE
    office.roster.tick()
    assert kinds(take_back(office, second, third)) == [Wake, Wake]
    check_lent([first], seat)
    actions = office.roster.returned(seat, [head])
    assert woken(actions)[:2] == [head, first]
    assert (head.state, head.seat, head.hand_ons, head.started) == (WAITING, None, 1, -math.inf)
    assert (first.state, first.started, list(seat.jobs)) == (WRITTEN, office.now, [first])
    assert seat.begun == start
    assert not seat.is_slow  # it has begun anew; the one that came back is lent again, before the others
    assert office.lend(actions) == [head, second, third]
    assert list(office.roster._waiting) == [head, second, third]


def test_a_head_that_comes_back_often_is_not_over() -> None:
    """Nothing ended and nobody asked: its caller would wait for the end of a worker that lives."""
    office = office_at(QUICK)
    head, *_ = office.submit_many(2)
    for _ in range(office.roster.target + 3):
        assert head.seat is not None
        actions = office.roster.returned(head.seat, [head])
        assert head.state is not DONE
        office.lend(actions)
        while head.state is WAITING:
            (other,) = office.seat.jobs
            office.reply(other)
        if head.state is ASSIGNED:
            office.roster.written(head)
    assert head.hand_ons == office.roster.target + 1


def test_a_line_that_takes_nothing_is_not_asked_again() -> None:
    """It was full: what could not be written waits until the worker has answered."""
    office = Office(read_ahead=4)
    head, job = office.submit_many(2)
    assert not office.lend(take_back(office, job))
    _, actions = hand_in(office)
    assert not office.lend(actions)
    assert not office.seat.ahead
    assert begun(office.reply(head)) == [job]


def test_nothing_is_taken_back() -> None:
    """The worker has read it all."""
    office = office_at(QUICK)
    _, job = office.submit_many(2)
    assert not office.roster.taken_back(office.seat, [])
    check_lent([job], office.seat)


def test_commands_are_never_asked_for_what_they_have() -> None:
    """Nothing can be taken out of a pipe: no clock runs, and no worker is slow."""
    office = Office(read_ahead=3)
    head, first, _ = office.submit_many(3)
    assert office.roster.next_deadline() == math.inf
    office.now = 1000.0
    assert not office.roster.tick()
    assert not office.seat.is_slow
    last, actions = hand_in(office)
    assert not office.lend(actions)
    actions = office.reply(head)
    assert (in_front(office.seat), office.lend(actions)) == ([first], [last])
    assert office.roster.next_deadline() == math.inf


# waiting, all the same


def test_max_queue_counts_those_in_a_line() -> None:
    """They wait like the others."""
    office = Office(read_ahead=3, max_queue=3)
    jobs = office.submit_many(6)
    check_lent(jobs[1:3], office.seat)
    assert queue_of(office) == [jobs[3]]
    assert [job.end for job in jobs[4:]] == [End.QUEUE_FULL] * 2
    office.reply(jobs[0])
    assert office.submit().state is WAITING
    assert office.submit().end is End.QUEUE_FULL


def test_max_queue_does_not_count_the_patient_in_a_line() -> None:
    """A map's jobs turn nobody away."""
    office = Office(read_ahead=3, max_queue=1)
    office.submit("head")
    patient = [office.submit(patient=True) for _ in range(2)]
    check_lent(patient, office.seat)
    assert office.submit().state is WAITING
    assert office.submit().end is End.QUEUE_FULL


def test_the_longest_wait_is_that_of_one_in_a_line() -> None:
    """The oldest of all that wait."""
    office = Office(read_ahead=2)
    office.submit("head")
    office.now = 1.0
    office.submit("lent")
    office.now = 2.0
    office.submit("queued")
    office.now = 5.0
    assert (office.roster.waiting, office.roster.longest_wait) == (2, 4.0)


def test_growth_sees_those_in_a_line() -> None:
    """A worker is added when one of them has waited for `grow_after`."""
    office = Office(read_ahead=4, max_workers=2, grow_after=1.0)
    _, job = office.submit_many(2)
    check_lent([job], office.seat)
    assert office.roster.next_deadline() == 1.0
    office.now = 1.0
    assert kinds(office.roster.tick()) == [Spawn]
    assert office.roster.target == 2


def test_growth_that_is_allowed_later_sees_them_too() -> None:
    """By a reset, while there is nobody in the queue itself."""
    office = Office(read_ahead=4)
    _, job = office.submit_many(2)
    check_lent([job], office.seat)
    assert office.roster.next_deadline() == math.inf
    office.now = 5.0
    plan = Plan(restart=office.roster.plan.restart, limits=steady(), read_ahead=4, max_workers=2, grow_after=1.0)
    office.roster.reset(plan)
    assert office.roster.next_deadline() == 6.0


# allocate_timeout


@pytest.mark.parametrize("read_ahead", [1, 2], ids=["in no line", "in a line"])
def test_a_job_that_has_waited_for_allocate_timeout(read_ahead: int) -> None:
    """Its task is woken at that time, and not before, and told that it is late: once."""
    office = Office(allocate_timeout=2.0, read_ahead=read_ahead)
    office.submit("head")
    office.now = 1.0
    job, actions = hand_in(office)
    assert Watch in kinds(actions)
    assert bool(office.lend(actions)) is (read_ahead > 1)
    assert (job.late_at, office.roster.next_deadline()) == (3.0, 3.0)
    office.now = 2.99
    assert not office.roster.tick()
    assert not job.late
    office.now = 3.0
    actions = office.roster.tick()
    assert (kinds(actions), woken(actions)) == ([Wake], [job])
    assert job.late
    assert office.roster.next_deadline() == math.inf
    office.now = 100.0
    assert not office.roster.tick()


def test_who_gets_a_worker_in_time_is_not_late() -> None:
    """The clock is looked at, and nothing comes of it."""
    office = Office(allocate_timeout=2.0)
    head, job = office.submit_many(2)
    office.now = 1.0
    office.reply(head)
    office.write(job)
    office.now = office.roster.next_deadline()
    assert office.now == 2.0
    assert not office.roster.tick()
    assert (job.state, job.late) == (WRITTEN, False)
    assert office.roster.next_deadline() == math.inf


def test_each_is_late_at_its_own_time() -> None:
    """The clock is looked at for the first, and then for the next."""
    office = Office(allocate_timeout=2.0)
    office.submit("head")
    jobs = []
    for at in (0.5, 1.0, 1.5):
        office.now = at
        jobs.append(office.submit())
    for job in jobs:
        office.now = office.roster.next_deadline()
        assert office.now == job.queued + 2.0
        assert woken(office.roster.tick()) == [job]
    assert office.roster.next_deadline() == math.inf


def test_nobody_is_late_without_a_bound() -> None:
    """`math.inf`: no clock runs."""
    office = Office()
    job = office.submit_many(2)[1]
    assert (job.late_at, office.roster.next_deadline()) == (math.inf, math.inf)


def test_a_hand_on_keeps_the_time_that_was_waited() -> None:
    """It has what is left of it, not all of it again."""
    office = Office(2, allocate_timeout=10.0)
    office.now = 100.0
    first, second, job = office.submit_many(3)
    office.now = 103.0
    assert begun(office.reply(first)) == [job]
    office.write(job)
    office.now = 150.0
    assert Watch not in kinds(office.roster.tick())
    actions = office.ask_for_stop(job)
    assert (job.state, job.late_at, office.roster.next_deadline()) == (WAITING, 157.0, 157.0)
    assert Watch in kinds(actions)
    office.now = 157.0
    assert job in woken(office.roster.tick())
    assert job.late
    assert second.state is WRITTEN


@pytest.mark.parametrize("serves", [True, False])
def test_the_unhurried_are_late_only_where_nobody_serves(serves: bool) -> None:
    """A map's jobs wait for as long as workers do something; without any they would wait for nothing."""
    office = Office(allocate_timeout=2.0, ready=serves)
    if serves:
        office.submit("head")
    job, _ = hand_in(office, unhurried=True)
    for turn in (1, 2, 3):
        assert office.roster.next_deadline() == 2.0 * turn
        office.now = 2.0 * turn
        actions = office.roster.tick()
        assert woken(actions) == ([] if serves else [job])
        assert job.late is not serves
        if not serves:
            break
    assert office.roster.next_deadline() == (8.0 if serves else math.inf)


# cancel


def test_cancel_a_job_that_was_taken_back() -> None:
    """The worker goes on with the one it has: nobody is killed, and the others behind it are as before."""
    office = office_at(QUICK)
    head, job, other = office.submit_many(3)
    take_back(office, job, other)
    assert not office.roster.cancelled(job)
    assert (job.state, office.seat.state, queue_of(office)) == (DONE, SERVING, [other])
    assert begun(office.reply(head)) == [other]


def test_cancel_the_head_of_a_line() -> None:
    """What lies behind it is taken back before its worker is killed, and goes on elsewhere."""
    office = office_at(QUICK, 2)
    head, second, *others = office.submit_many(6)
    one, other = office.seats
    check_lent([others[0], others[2]], one)
    check_lent([others[1], others[3]], other)
    actions = office.roster.cancelled(head)
    assert kinds(actions) == [TakeBack, DESTRUCT, Kill]
    assert emptied(actions) == [one]
    take_back(office, others[0], others[2])
    assert queue_of(office) == [others[0], others[2]]
    actions = office.reply(second)
    assert (in_front(other), office.lend(actions)) == ([others[1]], [others[0], others[2]])


def test_a_bound_job_in_a_line_has_its_turn_all_the_same() -> None:
    """Its caller has gone and it could not be taken back: the worker is not killed, the next one follows it."""
    office = Office(read_ahead=3)
    head, gone, job = office.submit_many(3)
    gone.bound = True
    office.reply(head)
    assert (in_front(office.seat), office.seat.state) == ([gone], SERVING)
    office.reply(gone)
    assert in_front(office.seat) == [job]


# the end of a worker


@pytest.mark.parametrize("ending", ["suspect", "garbage", "kill", "memory"])
def test_a_line_is_emptied_before_its_worker_is_killed(ending: str) -> None:
    """Whatever it is killed for: so nothing else can start on it."""
    office = office_at(QUICK, limits=steady(hard_memory=100))
    office.submit_many(2)
    roster, seat = office.roster, office.seat
    if ending == "suspect":
        actions = roster.suspect(seat, "it closed its relay", grace=True)
    elif ending == "garbage":
        actions = roster.suspect(seat, ValueError("garbage"))
    elif ending == "kill":
        actions = roster.kill(seat, "killed")
    else:
        actions = roster.measured({seat: 101})
    found = kinds(actions)
    assert found[0] is TakeBack
    assert found[-1] is Kill
    assert found.count(TakeBack) == 1
    job, actions = hand_in(office)
    assert (office.lend(actions), queue_of(office)) == ([], [job])


def test_an_answer_of_a_worker_that_is_being_killed() -> None:
    """It counts, and nobody's turn comes with it: what lies behind is known when the worker is gone."""
    office = office_at(QUICK)
    head, job = office.submit_many(2)
    seat = office.seat
    office.roster.suspect(seat, "it closed its relay", grace=True)
    assert not office.reply(head)
    assert head.state is DONE
    check_lent([job], seat)
    assert woken(office.roster.exited(seat, 1, unstarted=[job])) == [job]
    assert queue_of(office) == [job]


def test_a_worker_dies_with_a_line() -> None:
    """What it did not read goes on, in its place; what it answered is answered; what it may have begun ends there."""
    office = Office(2, read_ahead=4)
    one, other = office.seats
    head, second, *lines = office.submit_many(10)
    answered, fresh, begun_too = list(one.ahead)
    assert lines == [answered, other.ahead[0], fresh, other.ahead[1], begun_too, other.ahead[2], *queue_of(office)]
    waiting = queue_of(office)
    begun_before = one.begun
    actions = office.roster.exited(one, 1, answered=[head, answered], unstarted=[fresh])
    assert [job.state for job in (head, answered, fresh, begun_too)] == [DONE, DONE, WAITING, DONE]
    assert [job.end for job in (head, answered, fresh, begun_too)] == [None, None, None, End.CRASHED]
    assert (answered.seat, begun_too.seat, fresh.seat, fresh.ahead) == (one, one, None, None)
    assert woken(actions) == [head, answered, begun_too, fresh]
    assert queue_of(office) == [fresh, *waiting]
    assert (one.served, one.begun - begun_before, fresh.hand_ons) == (2, 2, 0)
    assert not one.ahead
    assert [job.ahead for job in other.ahead] == [other] * 3
    assert second.state is WRITTEN


def test_a_head_that_did_not_start_goes_before_those_behind_it() -> None:
    """They go on in their old order."""
    office = Office(read_ahead=3)
    head, *others = office.submit_many(5)
    office.seat.served = 1
    office.roster.exited(office.seat, 1, unstarted=[head, *others[:2]])
    assert queue_of(office) == [head, *others]
    assert [job.hand_ons for job in (head, *others)] == [1, 0, 0, 0, 0]
    assert begun(office.ready()) == [head]
    assert office.lend(office.roster.written(head)) == others[:2]


def test_a_bound_job_that_is_taken_back_is_over() -> None:
    """Nobody waits for it."""
    office = office_at(QUICK)
    _, gone = office.submit_many(2)
    gone.bound = True
    assert woken(take_back(office, gone)) == [gone]
    assert (gone.state, gone.end, office.roster.waiting) == (DONE, End.CRASHED, 0)


def test_a_free_worker_gets_what_a_dead_one_left_unread() -> None:
    """At once, the oldest first."""
    office = Office(2, read_ahead=4)
    head, quick, first = office.submit_many(3)
    assert first.ahead is head.seat
    second = office.submit()
    assert second.ahead is quick.seat
    third = office.submit()
    office.reply(quick)
    office.reply(second)
    assert head.seat is not None
    actions = office.roster.exited(head.seat, 1, unstarted=[first, third])
    assert begun(actions) == [first]
    assert (first.seat, head.end) == (quick.seat, End.CRASHED)
    assert queue_of(office) == [third]


def test_a_bound_job_is_handed_on_from_no_line() -> None:
    """Nobody waits for it: it ends with the worker, read or not."""
    office = Office(read_ahead=3)
    _, gone, job = office.submit_many(3)
    gone.bound = True
    office.roster.exited(office.seat, 1, unstarted=[gone, job])
    assert (gone.state, gone.end) == (DONE, End.CRASHED)
    assert queue_of(office) == [job]


def test_only_the_head_has_taken_too_long() -> None:
    """Those behind it that a worker killed for `exec_ttl` may have begun are not told that they did."""
    office = Office(read_ahead=3, limits=steady(exec_ttl=2.0))
    head, first, second = office.submit_many(3)
    office.now = 2.0
    office.roster.tick()
    office.roster.tick()
    assert office.seat.state is STOPPING
    office.roster.exited(office.seat, -9, unstarted=[second])
    assert (head.end, first.end, second.end) == (End.TIMED_OUT, End.CRASHED, None)
    assert queue_of(office) == [second]


# a worker that goes


@pytest.mark.parametrize("recalls", [True, False])
def test_a_worker_that_leaves_finishes_its_line(recalls: bool) -> None:
    """It gets no more, and it stops when the last of them has been answered."""
    office = office_at(QUICK) if recalls else Office(read_ahead=5)
    seat = office.seat
    head, first, second = office.submit_many(3)
    assert kinds(office.roster.retire(seat, "stopped")) == [Spawn]
    late, actions = hand_in(office)
    assert not office.lend(actions)
    actions = office.reply(head)
    assert in_front(seat) == [first]
    assert not office.lend(actions)
    assert not emptied(actions)
    office.reply(first)
    assert in_front(seat) == [second]
    assert seat.state is SERVING
    assert kinds(office.reply(second)) == [DESTRUCT, Retire]
    assert queue_of(office) == [late]


def test_a_reset_lends_nothing_to_the_old() -> None:
    """Those of the new plan get what it says, those of the old finish what lies in their lines."""
    office = Office(read_ahead=2)
    head, job, late = office.submit_many(3)
    old = office.seat
    office.roster.reset(Plan(restart=office.roster.plan.restart, limits=steady(), read_ahead=4))
    office.ready()
    new = office.seats[1]
    assert (old.leaving, new.state) == ("reset", STANDBY)
    actions = office.reply(head)
    assert (in_front(old), office.lend(actions)) == ([job], [])
    actions = office.reply(job)
    assert begun(actions) == [late]
    assert (old.state, new.depth) == (STOPPING, 3)
    office.write(late)
    jobs = office.submit_many(5)
    check_lent(jobs[:3], new)


def test_a_stop_request_before_those_behind_it() -> None:
    """The job goes on; the worker goes when it has done what had been written to it, and gets no more."""
    office = Office(read_ahead=3)
    head, first, second, last = office.submit_many(4)
    seat = office.seat
    seat.served = 1
    actions = office.ask_for_stop(head)
    assert kinds(actions) == [Wake, Spawn, Wake, Lend]
    assert woken(actions) == [head, first]
    assert not office.lend(actions)
    assert (seat.leaving, in_front(seat), list(seat.ahead)) == ("stop request", [first], [second])
    assert queue_of(office) == [head, last]
    office.reply(first)
    assert in_front(seat) == [second]
    assert seat.state is SERVING
    assert kinds(office.reply(second)) == [DESTRUCT, Retire]
    assert queue_of(office) == [head, last]


def test_two_stop_requests_in_a_row() -> None:
    """Both jobs go on, the worker goes once."""
    office = Office(read_ahead=3)
    head, first, second = office.submit_many(3)
    seat = office.seat
    seat.served = 1
    office.ask_for_stop(head)
    assert woken(office.ask_for_stop(first)) == [first, second]
    assert in_front(seat) == [second]
    assert office.reply(second)[-1] == Retire(seat)
    assert queue_of(office) == [first, head]


def test_two_stop_requests_of_a_fresh_worker_are_one_failure() -> None:
    """It did nothing for anybody, so its slot waits; for as long as after one."""
    office = Office(read_ahead=3)
    head, first = office.submit_many(2)
    seat = office.seat
    office.ask_for_stop(head)
    office.ask_for_stop(first)
    assert office.roster.exited(seat, 0) == []
    office.spawn_after(0.1)


def test_a_dirty_stop_request_before_those_behind_it() -> None:
    """The worker is killed: what lies in its line is known when it is gone, and goes on behind the job."""
    office = Office(read_ahead=3)
    head, first, second, last = office.submit_many(4)
    seat = office.seat
    seat.served = 1
    actions = office.ask_for_stop(head, ValueError("garbage"))
    assert emptied(actions) == [seat]
    assert Kill in kinds(actions)
    assert (head.state, seat.state) == (WAITING, STOPPING)
    check_lent([first, second], seat)
    assert queue_of(office) == [head, last]
    office.roster.exited(seat, 0, unstarted=[first, second])
    assert queue_of(office) == [head, first, second, last]


# exec_ttl


def test_a_line_is_looked_at_before_its_worker_is_killed() -> None:
    """The worker may be at the next job already, which must not pay: so there is a last look, and then the kill."""
    office = Office(read_ahead=3, limits=steady(exec_ttl=2.0))
    head, first, _ = office.submit_many(3)
    office.now = 2.0
    actions = office.roster.tick()
    assert (kinds(actions), recalled(actions)) == ([Recall], [office.seat])
    assert (office.seat.state, head.state) == (SERVING, WRITTEN)
    assert office.roster.next_deadline() <= office.now
    actions = office.roster.tick()
    assert kinds(actions) == [TakeBack, ERROR, DESTRUCT, Kill]
    assert (office.seat.state, office.seat.reason) == (STOPPING, "exec_ttl")
    assert first.ahead is office.seat


def test_a_job_with_nothing_behind_it_is_killed_at_once() -> None:
    """There is nobody who could pay for it."""
    office = Office(read_ahead=3, limits=steady(exec_ttl=2.0))
    office.submit()
    office.now = 2.0
    assert kinds(office.roster.tick()) == [ERROR, DESTRUCT, Kill]


def test_the_last_look_finds_the_answer() -> None:
    """Nobody is killed; the next one has its whole time from now on, and a look of its own."""
    office = Office(read_ahead=3, limits=steady(exec_ttl=2.0))
    head, first, _ = office.submit_many(3)
    for job in (head, first):
        office.now += 2.0
        assert kinds(office.roster.tick()) == [Recall]
        office.reply(job)
        assert office.seat.state is SERVING
        office.roster.tick()
        assert office.roster.next_deadline() == office.now + 2.0


def test_a_job_s_time_begins_with_its_turn() -> None:
    """However long it has lain in the line."""
    office = Office(read_ahead=2, limits=steady(exec_ttl=2.0))
    head, job = office.submit_many(2)
    office.now = 1.5
    office.reply(head)
    assert (in_front(office.seat), job.started) == ([job], 1.5)
    office.now = 2.0
    assert not office.roster.tick()
    assert office.roster.next_deadline() == 3.5
    office.now = 3.5
    assert Kill in kinds(office.roster.tick())


# the end of the pool


@pytest.mark.parametrize("recalls", [True, False])
def test_close_finishes_what_lies_in_a_line(recalls: bool) -> None:
    """Promise 1: jobs accepted so far are done, in their order, those that wait in no line too."""
    office = office_at(2 * QUICK) if recalls else Office(read_ahead=3)
    jobs = office.submit_many(5)
    assert not office.roster.close()
    assert office.submit().end is End.CLOSED
    for job in jobs:
        assert office.phase is Phase.CLOSING
        assert office.seat.state is SERVING
        office.write(job)
        assert job.state is WRITTEN
        office.reply(job)
    assert (office.phase, office.seat.state) == (Phase.ENDING, STOPPING)


def test_a_closing_pool_with_a_line_alone() -> None:
    """Its worker is on its way out: the pool waits for what becomes of them, then for those that run them."""
    office = Office(read_ahead=2)
    head, job = office.submit_many(2)
    seat = office.seat
    seat.served = 1
    office.roster.close()
    office.ask_for_stop(head, ValueError("garbage"))
    assert office.phase is Phase.CLOSING
    assert kinds(office.roster.exited(seat, -9, unstarted=[job])) == [Wake, Spawn]
    office.ready()
    office.write(head)
    check_lent([job], office.seat)
    office.reply(head)
    assert office.phase is Phase.CLOSING
    office.reply(job)
    assert office.phase is Phase.ENDING


def test_a_closing_pool_waits_for_those_in_a_line_alone() -> None:
    """Nobody is in the queue, and nobody at work."""
    office = Office(2, read_ahead=2)
    head, other, job = office.submit_many(3)
    seat = head.seat
    assert seat is not None
    office.roster.close()
    office.ask_for_stop(head, ValueError("garbage"))
    office.roster.cancelled(head)
    office.reply(other)
    check_lent([job], seat)
    assert office.phase is Phase.CLOSING
    office.roster.exited(seat, 0, unstarted=[job])
    assert job.seat is other.seat
    office.write(job)
    office.reply(job)
    assert office.phase is Phase.ENDING


def test_abort_with_jobs_in_a_line() -> None:
    """Who waits in no line is over now; who is taken out of one then; who stays there with the worker."""
    office = office_at(2 * QUICK)
    head, unread, read, queued = office.submit_many(4)
    seat = office.seat
    actions = office.roster.abort()
    assert (woken(actions), emptied(actions)) == ([queued], [seat])
    assert [type(action) for action in actions if isinstance(action, TakeBack | Kill)] == [TakeBack, Kill]
    assert (queued.state, queued.end) == (DONE, End.CLOSED)
    actions = take_back(office, unread)
    assert woken(actions) == [unread]
    assert (unread.state, unread.end) == (DONE, End.CLOSED)
    assert (head.state, read.state) == (WRITTEN, WAITING)
    actions = office.roster.exited(seat, -9, unstarted=[head, read])
    assert [(job.state, job.end) for job in (head, read)] == [(DONE, End.CLOSED)] * 2
    assert kinds(actions) == [Wake, Wake, Drained]
    assert office.roster.waiting == 0


def test_an_answer_counts_even_after_an_abort() -> None:
    """Also one to a job that lay in the line."""
    office = Office(read_ahead=2)
    head, job = office.submit_many(2)
    office.roster.abort()
    office.roster.exited(office.seat, -9, answered=[head, job])
    assert [(one.state, one.end) for one in (head, job)] == [(DONE, None)] * 2
