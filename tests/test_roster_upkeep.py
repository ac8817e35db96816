"""The roster's rules for replacement by plan, limits, changes, growth and debug, one by one."""

import math

import attrs
import pytest

from tests.roster_office import Office, begun, kinds, slots
from trio_workers._config import Limits, Restart
from trio_workers._model import WorkerEvent
from trio_workers._seats import (
    DONE,
    SERVING,
    STANDBY,
    STARTING,
    STOPPING,
    WAITING,
    Actions,
    End,
    Job,
    Kill,
    Plan,
    Retire,
    Seat,
    Settled,
    Spawn,
    Wake,
    Watch,
)

CREATED, DESTRUCT, ERROR = WorkerEvent.CREATED, WorkerEvent.DESTRUCT, WorkerEvent.ERROR

MIB = 1 << 20


def steady(**limits: float | int | None) -> Limits:
    """Limits without chance."""
    return Limits(jitter=0.0, **limits)  # type: ignore[arg-type]


def let_time_pass(office: Office) -> Actions:
    """Wake up at the next deadline, as the housekeeper does."""
    assert office.now < office.roster.next_deadline() < math.inf
    office.now = office.roster.next_deadline()
    return office.roster.tick()


def in_state(office: Office, *states: object) -> list[Seat]:
    return [seat for seat in office.seats if seat.state in states]


def working(office: Office) -> int:
    """How many are free or at work."""
    return len(in_state(office, SERVING))


def settled(actions: Actions) -> bool:
    return any(isinstance(action, Settled) for action in actions)


# replacement by plan


def test_the_old_worker_serves_until_the_new_one_is_ready() -> None:
    """Promise 6: at its ttl a successor is started, and nothing else changes until that is ready."""
    office = Office(limits=steady(ttl=10.0))
    old = office.seat
    assert kinds(let_time_pass(office)) == [Spawn]
    assert office.now == 10.0
    job = office.submit()
    assert job.seat is old
    office.reply(job)
    actions = office.ready()
    assert kinds(actions) == [CREATED, Watch, DESTRUCT, Retire]
    assert (old.state, old.reason) == (STOPPING, "ttl")
    assert office.submit().seat is office.seats[1]


def test_a_busy_worker_finishes_its_job_first() -> None:
    """Its successor stands by meanwhile: never more serve than there should be."""
    office = Office(limits=steady(ttl=10.0))
    job = office.submit()
    old = office.seat
    let_time_pass(office)
    assert kinds(office.ready()) == [CREATED, Watch]
    waiting = office.submit()
    assert (old.state, old.leaving, waiting.state) == (SERVING, "ttl", WAITING)
    assert [seat.state for seat in office.seats] == [SERVING, STANDBY]
    actions = office.reply(job)
    assert begun(actions) == [waiting]
    assert old.state is STOPPING


def test_one_at_a_time() -> None:
    """Eight workers come of age together: one successor boots, and the next only when its predecessor is gone."""
    office = Office(8, limits=steady(ttl=10.0))
    let_time_pass(office)
    for done in range(8):
        assert working(office) == 8
        assert len(office.seats) == 9
        (new,) = in_state(office, STARTING)
        assert new.slot == done
        assert CREATED in kinds(office.roster.ready(new))
        (old,) = in_state(office, STOPPING)
        assert old.slot == done
        assert working(office) == 8
        actions = office.roster.exited(old, 0)
        assert kinds(actions) == ([Spawn] if done < 7 else [])
    assert office.roster.exits == {"ttl": 8}


def test_a_share_of_a_large_pool() -> None:
    """Of sixteen workers two are replaced at a time."""
    office = Office(16, limits=steady(ttl=10.0))
    assert kinds(let_time_pass(office)) == [Spawn, Spawn]


def test_a_successor_that_does_not_boot() -> None:
    """The old worker serves on through the whole back-off."""
    office = Office(limits=steady(ttl=10.0), restart=Restart(jitter=0.0, initial=1.0))
    let_time_pass(office)
    for delay in (1.0, 2.0, 4.0):
        (new,) = in_state(office, STARTING)
        assert kinds(office.roster.exited(new, 1)) == [ERROR]
        assert working(office) == 1
        assert office.roster.next_deadline() == office.now + delay
        assert kinds(let_time_pass(office)) == [Spawn]
    assert DESTRUCT in kinds(office.ready())


def test_a_slot_that_can_not_boot_holds_up_no_other() -> None:
    """While a slot waits for its next try, the others are relieved, still one at a time."""
    office = Office(3, limits=steady(ttl=10.0), restart=Restart(jitter=0.0, initial=30.0))
    first = list(office.seats)
    let_time_pass(office)
    (bad,) = in_state(office, STARTING)
    assert [ERROR, Spawn] == kinds(office.roster.exited(bad, 1))
    for _ in range(2):
        (new,) = in_state(office, STARTING)
        assert new.slot != bad.slot
        office.roster.ready(new)
        for seat in in_state(office, STOPPING):
            office.roster.exited(seat, 0)
        assert working(office) == 3
    assert [seat.slot for seat in office.seats if seat in first] == [bad.slot]


def test_leases_in_a_row_do_not_keep_a_worker() -> None:
    """Who is due is relieved between two leases: its successor is asked for before the next holder has it."""
    office = Office(limits=steady(ttl=10.0))
    first, second = office.submit(lease=True), office.submit(lease=True)
    office.now = 10.0
    assert not in_state(office, STARTING)
    office.roster.tick()
    assert Spawn in kinds(office.roster.released(first))
    office.write(second)
    (old,) = in_state(office, SERVING)
    assert second.seat is old
    office.ready()
    assert old.leaving == "ttl"
    third = office.submit(lease=True)
    actions = office.roster.released(second)
    assert Retire in kinds(actions)
    assert begun(actions) == [third]


def test_a_worker_that_dies_before_its_relief() -> None:
    """The successor that boots is the replacement; there is no second one."""
    office = Office(limits=steady(ttl=10.0))
    let_time_pass(office)
    old, new = office.seats
    assert Spawn not in kinds(office.roster.exited(old, -9))
    office.roster.ready(new)
    assert office.seats == [new]
    assert new.state is SERVING


def test_a_leased_worker_is_replaced_after_its_lease() -> None:
    """Limits are looked at when a lease ends."""
    office = Office(limits=steady(ttl=10.0))
    lease = office.submit(lease=True)
    assert not let_time_pass(office)
    assert office.roster.next_deadline() == math.inf
    assert kinds(office.roster.released(lease)) == [Spawn]
    assert office.seats[0].state is SERVING


def test_a_lease_is_not_cut_short() -> None:
    """A worker that was leased while its successor came up stays with the holder, also between his jobs."""
    office = Office(limits=steady(ttl=10.0))
    let_time_pass(office)
    old, new = office.seats
    lease = office.submit(lease=True)
    inner = office.submit_inside(lease)
    office.roster.ready(new)
    assert not office.reply(inner)
    assert (old.state, new.state) == (SERVING, STANDBY)
    assert office.reply(office.submit_inside(lease)) == ()
    assert kinds(office.roster.released(lease)) == [DESTRUCT, Retire]
    assert new.state is SERVING


def test_the_holder_stops_his_worker() -> None:
    """`Worker.stop` inside a lease does not wait for the lease."""
    office = Office()
    lease = office.submit(lease=True)
    assert lease.seat is not None
    assert Retire in kinds(office.roster.retire(lease.seat, "stopped"))


def test_idle_for_too_long() -> None:
    """`idle_ttl` replaces who has been at work and is not any more; each job starts the time again."""
    office = Office(limits=steady(idle_ttl=5.0))
    office.reply(office.submit())
    office.now = 3.0
    office.reply(office.submit())
    assert not let_time_pass(office)
    assert office.now == 5.0
    assert kinds(let_time_pass(office)) == [Spawn]
    assert office.now == 8.0


def test_a_fresh_worker_may_be_idle() -> None:
    """A successor would be no fresher: nothing is due."""
    office = Office(limits=steady(idle_ttl=5.0))
    assert office.roster.next_deadline() == math.inf


def test_idleness_that_is_over() -> None:
    """A worker that got a job before its relief came to it is left alone."""
    office = Office(2, limits=steady(idle_ttl=5.0))
    jobs = office.submit_many(2)
    for job in jobs:
        office.reply(job)
    let_time_pass(office)
    assert len(in_state(office, STARTING)) == 1
    later = office.submit_many(2)
    office.ready()
    office.reply(later[0])
    office.roster.exited(in_state(office, STOPPING)[0], 0)
    assert office.roster.exits == {"idle_ttl": 1}
    assert not in_state(office, STARTING)


# memory


def test_max_memory_needs_two_readings() -> None:
    """One reading above is a peak; two in a row are a leak."""
    office = Office(limits=steady(max_memory=100 * MIB))
    seat = office.seat
    office.reply(office.submit())
    for figure in (101, 99, 101):
        assert not office.roster.measured({seat: figure * MIB})
    assert kinds(office.roster.measured({seat: 101 * MIB})) == [Spawn]
    assert DESTRUCT in kinds(office.ready())
    assert seat.reason == "max_memory"


def test_a_large_beginning() -> None:
    """A worker that is above it from birth is not replaced before it has had a job: the next would be as large."""
    office = Office(limits=steady(max_memory=100 * MIB))
    for _ in range(5):
        assert not office.roster.measured({office.seat: 200 * MIB})
    office.reply(office.submit())
    assert kinds(office.roster.measured({office.seat: 200 * MIB})) == [Spawn]


def test_hard_memory_kills() -> None:
    """Under the job, at the first reading; its caller is told when the worker is gone."""
    office = Office(limits=steady(hard_memory=100 * MIB))
    seat, job = office.seat, office.submit()
    assert kinds(office.roster.measured({seat: 101 * MIB})) == [ERROR, DESTRUCT, Kill]
    assert kinds(office.roster.exited(seat, -9)) == [Wake, Spawn]
    assert (job.state, job.end, seat.reason) == (DONE, End.CRASHED, "hard_memory")


# exec_ttl


def test_a_job_takes_too_long() -> None:
    """Its worker is killed at the time, and the job is over when that is gone."""
    office = Office(limits=steady(exec_ttl=2.0))
    job = Job((b"",))
    assert kinds(office.roster.submit(job)) == [Watch]
    office.write(job)
    seat = office.seat
    assert kinds(let_time_pass(office)) == [ERROR, DESTRUCT, Kill]
    assert office.now == 2.0
    assert kinds(office.roster.exited(seat, -9)) == [Wake, Spawn]
    assert (job.end, seat.reason) == (End.TIMED_OUT, "exec_ttl")


def test_a_chunk_has_its_slack() -> None:
    """A job that is many calls has what its last call may begin later beside `exec_ttl`, and no more."""
    office = Office(limits=steady(exec_ttl=2.0))
    job = office.submit("slow", write=False)
    job.slack = 0.5
    office.write(job)
    office.now = 2.2
    assert not office.roster.tick()
    assert office.roster.next_deadline() == 2.5
    office.now = 2.5
    assert WorkerEvent.ERROR in kinds(office.roster.tick())


def test_the_clock_is_set_once() -> None:
    """Jobs that begin while it is set need nothing: it looks again when the first of them would have had its time."""
    office = Office(limits=steady(exec_ttl=2.0))
    office.reply(office.submit())
    office.now = 0.5
    job = Job((b"",))
    assert office.roster.submit(job) == ()
    office.write(job)
    assert let_time_pass(office) == []
    assert (office.now, office.roster.next_deadline()) == (2.0, 2.5)


def test_an_answer_that_was_there() -> None:
    """What a worker has answered before the kill counts."""
    office = Office(limits=steady(exec_ttl=2.0))
    job = office.submit()
    let_time_pass(office)
    office.roster.exited(office.seats[0], -9, answered=[job])
    assert (job.state, job.end) == (DONE, None)


# max_executions, ahead


def test_the_successor_starts_a_boot_ahead() -> None:
    """A boot takes 2 s and a job 1 s: the successor starts when two jobs are left."""
    office = Office(max_executions=10, ready=False)
    office.now = 2.0
    office.ready()
    for number in range(1, 11):
        job = Job((b"",))
        actions = office.roster.submit(job)
        assert kinds(actions) == ([Spawn] if number == 8 else [])
        office.write(job)
        office.now += 1.0
        office.reply(job)
    assert [seat.state for seat in office.seats] == [STOPPING, STARTING]


def test_jitter_only_shortens() -> None:
    """`max_executions` is a hard bound, and a small one is exact."""
    for bound, least in ((1, 1), (5, 5), (10, 10), (100, 91), (1000, 901)):
        office = Office(64, max_executions=bound, limits=Limits())
        limits = {seat.limit for seat in office.seats}
        assert max(limits) <= bound
        assert min(limits) >= least
    assert len(limits) > 30


def test_ages_differ() -> None:
    """Each worker's ttl is drawn between nine tenths and the whole."""
    office = Office(64, limits=Limits(ttl=100.0))
    ages = sorted(seat.expires_at for seat in office.seats)
    assert 90.0 < ages[0] < 92.0
    assert 98.0 < ages[-1] <= 100.0


# reset


def renewed(office: Office, **changes: object) -> Plan:
    return attrs.evolve(office.roster.plan, **changes)  # type: ignore[arg-type]


def test_reset() -> None:
    """Each worker is replaced in turn; it is done when the last of the old ones is gone."""
    office = Office(2)
    old = list(office.seats)
    change, actions = office.roster.reset(renewed(office))
    assert kinds(actions) == [Spawn]
    for seat in old:
        office.ready()
        assert working(office) == 2
        assert office.roster.change is change
        actions = office.roster.exited(seat, 0)
    assert settled(actions)
    assert change.failed is None
    assert office.roster.change is None
    assert office.roster.exits == {"reset": 2}


def test_reset_that_does_not_boot() -> None:
    """The plan is what it was, and so are the workers."""
    office = Office(2)
    old, plan = list(office.seats), office.roster.plan
    job = office.submit()
    change, _ = office.roster.reset(renewed(office, source="broken"), 4)
    (bad, *more) = in_state(office, STARTING)
    actions = office.roster.exited(bad, 1)
    assert settled(actions)
    assert change.failed is bad
    for other in more:
        assert other.state is STOPPING
        office.roster.exited(other, -9)
    assert office.seats == old
    assert (office.roster.plan, office.roster.target, office.roster.failed_in_a_row) == (plan, 2, 0)
    office.reply(job)
    assert not any(seat.vacant or seat.leaving for seat in old)
    assert office.roster.next_deadline() == math.inf


def test_reset_that_fails_late() -> None:
    """Who was replaced already is replaced once more, by what was before."""
    office = Office(2)
    plan = office.roster.plan
    first, second = office.seats
    office.roster.reset(renewed(office, source="half broken"))
    office.ready()
    office.roster.exited(first, 0)
    (bad,) = in_state(office, STARTING)
    office.roster.exited(bad, 1)
    (back,) = in_state(office, STARTING)
    assert (back.plan, back.slot) == (plan, 0)
    office.ready()
    assert [seat.plan for seat in in_state(office, SERVING)] == [plan, plan]
    assert second.state is SERVING


def test_reset_with_the_same_source_fails_late() -> None:
    """Those that were replaced are as good as those that were not: they stay."""
    office = Office(2, source="program")
    office.roster.reset(renewed(office))
    office.ready()
    office.roster.exited(office.seats[0], 0)
    office.roster.exited(in_state(office, STARTING)[0], 1)
    assert {seat.plan for seat in office.seats} == {office.roster.plan}
    assert len(office.seats) == 2


def test_reset_is_a_repair() -> None:
    """The back-off of the old program does not hold up the new one."""
    office = Office(restart=Restart(initial=10.0, jitter=0.0))
    office.roster.exited(office.seat, 1)
    assert not office.seats
    _, actions = office.roster.reset(renewed(office, source="mended"))
    assert kinds(actions) == [Spawn]
    assert settled(office.ready())


def test_reset_of_what_can_not_boot_in_a_pool_that_has_grown() -> None:
    """Whichever slot is first to be relieved, also one that the pool has grown by: its failed boot decides."""
    office = Office(1, max_workers=2)
    jobs = office.submit_many(3)
    office.now = 0.2
    office.roster.tick()
    office.ready()
    for job in sorted(jobs, key=lambda job: job.seat.slot if job.seat else 0):
        office.write(job)
        office.reply(job)
    lease = office.submit(lease=True)
    assert lease.seat is not None
    assert (lease.seat.slot, office.roster.target) == (0, 2)
    change, actions = office.roster.reset(renewed(office, source="broken"))
    assert kinds(actions) == [Spawn]
    (new,) = in_state(office, STARTING)
    assert new.slot == 1
    assert settled(office.roster.exited(new, 1))
    assert change.failed is new
    assert working(office) == 2


def test_a_boot_in_a_slot_that_came_meanwhile_decides_as_well() -> None:
    """While no worker of the new plan has come up, any failed boot takes the change back."""
    office = Office(1, max_workers=2)
    change, _ = office.roster.reset(renewed(office, source="broken"))
    office.submit_many(3)
    office.now = 0.2
    office.roster.tick()
    new = next(seat for seat in in_state(office, STARTING) if seat.slot == 1)
    assert settled(office.roster.exited(new, 1))
    assert change.failed is new


def test_the_old_worker_stays_when_all_that_was_new_is_gone() -> None:
    """A reset fails while a successor stands by, which is as good. When that dies, there is nothing to replace."""
    office = Office(2)
    job = office.submit()
    old = job.seat
    office.roster.reset(renewed(office))
    office.ready()
    (successor,) = in_state(office, STANDBY)
    office.roster.exited(in_state(office, STARTING)[0], 1)
    assert successor.state is STANDBY
    office.roster.exited(successor, -9)
    assert old is not None
    assert (old.relief, old.vacant, old.leaving) == (False, False, "")
    assert not in_state(office, STARTING)
    assert working(office) == 2


def test_a_second_reset_takes_over() -> None:
    """Both are one change, which is done when the later plan is in place."""
    office = Office(2)
    first, _ = office.roster.reset(renewed(office, source="first"))
    office.ready()
    second, _ = office.roster.reset(renewed(office, source="second"))
    assert second is first
    for _ in range(10):
        office.ready()
        for seat in in_state(office, STOPPING):
            office.roster.exited(seat, 0)
    assert [seat.plan.source for seat in office.seats] == ["second", "second"]
    assert office.roster.change is None


def test_reset_to_fewer() -> None:
    """Nobody goes before the new plan has proved itself."""
    office = Office(3)
    office.roster.reset(renewed(office, source="new"), 1)
    assert working(office) == 3
    actions = office.roster.ready(in_state(office, STARTING)[0])
    assert kinds(actions).count(Retire) == 3
    for seat in in_state(office, STOPPING):
        actions = office.roster.exited(seat, 0)
    assert settled(actions)
    assert (slots(office.seats), office.roster.target) == ([0], 1)


def test_reset_of_a_closing_pool_is_dropped() -> None:
    """Who waits for it is told that the pool is closed."""
    office = Office()
    change, _ = office.roster.reset(renewed(office))
    assert settled(office.roster.close())
    assert change.closed


def test_close_while_a_broken_reset_is_under_way() -> None:
    """Jobs that wait are done by what was there before, even if all its workers are gone meanwhile."""
    office = Office(1)
    plan = office.roster.plan
    running, waiting = office.submit(), office.submit()
    office.roster.reset(renewed(office, source="broken"))
    office.roster.close()
    office.roster.exited(office.seats[0], -9)
    assert running.end is End.CRASHED
    for seat in in_state(office, STOPPING):
        office.roster.exited(seat, -9)
    (new,) = in_state(office, STARTING)
    assert new.plan is plan
    assert begun(office.roster.ready(new)) == [waiting]


def test_a_lease_ends_the_worker_a_closing_pool_counts_on() -> None:
    """Its last permitted job begins inside a lease: the successor for who waits starts then, not at the end."""
    office = Office(limits=steady(ttl=10.0), max_executions=1)
    let_time_pass(office)
    lease, waiting = office.submit(lease=True), office.submit()
    office.roster.close()
    office.roster.exited(in_state(office, STARTING)[0], 1)
    office.now += 60
    assert not office.roster.tick()
    last = Job((b"",))
    assert lease.seat is not None
    assert kinds(office.roster.submit_to(lease.seat, last)) == [Spawn]
    office.ready()
    office.write(last)
    office.reply(last)
    assert waiting in begun(office.roster.released(lease))


def test_close_while_a_repair_is_under_way() -> None:
    """Once a worker has come up by the new plan, that is what the jobs that wait get."""
    office = Office(2)
    for job in office.submit_many(3)[:2]:
        assert job.seat is not None
    office.roster.reset(renewed(office, source="mended"))
    office.ready()
    office.roster.close()
    assert office.roster.plan.source == "mended"


# resize


def test_resize_up() -> None:
    """Workers are added at once; it is done when they are ready."""
    office = Office(1)
    _, actions = office.roster.resize(3)
    assert kinds(actions) == [Spawn, Spawn]
    assert settled(office.ready())
    assert slots(office.seats) == [0, 1, 2]


def test_resize_down() -> None:
    """The highest slots go, after their jobs."""
    office = Office(3)
    jobs = office.submit_many(3)
    _, actions = office.roster.resize(1)
    assert not kinds(actions)
    assert kinds(office.reply(jobs[2])) == [DESTRUCT, Retire]
    assert kinds(office.reply(jobs[1])) == [DESTRUCT, Retire]
    assert [seat.state for seat in office.seats] == [SERVING, STOPPING, STOPPING]
    assert not settled(office.roster.exited(office.seats[2], 0))
    assert settled(office.roster.exited(office.seats[1], 0))


def test_resize_that_does_not_boot() -> None:
    """The pool has as many workers as before."""
    office = Office(1)
    change, _ = office.roster.resize(3)
    one, other = in_state(office, STARTING)
    office.roster.ready(one)
    assert settled(office.roster.exited(other, 1))
    assert change.failed is other
    assert (office.roster.size, office.roster.target) == (1, 1)
    assert (one.state, one.reason) == (STOPPING, "resize")


def test_resize_to_the_same() -> None:
    """There is nothing to wait for."""
    office = Office(2)
    assert settled(office.roster.resize(2)[1])


def test_resize_while_a_slot_backs_off() -> None:
    """A slot that was there before, and is in trouble, is not the resize's affair."""
    office = Office(2)
    office.roster.exited(office.seats[0], 1)
    office.roster.resize(3)
    assert settled(office.ready())


# growth


def grown(limits: Limits | None = None, boot: float = 0.25, **options: object) -> Office:
    """A pool of one that may grow to four, and whose workers boot in a quarter of a second."""
    office = Office(1, max_workers=4, grow_after=0.5, limits=limits or steady(), ready=False, **options)  # type: ignore[arg-type]
    office.now = boot
    office.ready()
    return office


def test_growth() -> None:
    """A job that has waited for `grow_after` gets a worker of its own, up to `max_workers`."""
    office = grown()
    office.submit()
    waiting = office.submit_many(2)
    assert kinds(let_time_pass(office)) == [Spawn]
    assert office.now == 0.75
    assert begun(office.ready()) == [waiting[0]]
    assert kinds(let_time_pass(office)) == [Spawn]
    assert begun(office.ready()) == [waiting[1]]
    office.submit_many(9)
    for _ in range(9):
        if office.roster.next_deadline() < math.inf:
            let_time_pass(office)
            office.ready()
    assert (office.roster.target, slots(office.seats)) == (4, [0, 1, 2, 3])


def test_no_more_than_wait() -> None:
    """While as many come up as jobs wait, no other is added."""
    office = grown()
    office.submit_many(2)
    let_time_pass(office)
    for _ in range(5):
        assert not let_time_pass(office)
    assert office.roster.target == 2


def test_a_queue_that_is_about_to_end() -> None:
    """Jobs that will be done before a worker has booted need none."""
    office = grown()
    jobs = office.submit_many(65)
    for number in range(64):
        office.now += 0.01
        if office.roster.next_deadline() <= office.now:
            assert not office.roster.tick()
        office.reply(jobs[number])
        office.write(jobs[number + 1])
    assert office.roster.target == 1


def test_a_queue_that_stays() -> None:
    """It looked as if it were about to end, and was not: then a worker is added."""
    office = grown(boot=2.0)
    jobs = office.submit_many(100)
    while office.roster.target == 1:
        office.now += 0.01
        if office.roster.next_deadline() <= office.now:
            office.roster.tick()
        office.reply(jobs.pop(0))
        office.write(jobs[0])
        jobs.append(office.submit())
    assert 4.0 < office.now < 6.0, "a boot after the first job had waited for too long"


def test_growth_after_an_idle_death() -> None:
    """A slot whose worker had died, and has another since, does not keep the pool from growing."""
    office = Office(1, max_workers=2)
    office.roster.exited(office.seat, -9)
    let_time_pass(office)
    office.ready()
    office.submit_many(3)
    office.now += 0.1
    office.roster.tick()
    assert office.roster.target == 2


def test_no_growth_while_nothing_boots() -> None:
    """A pool whose workers fail to start has no use for more of them."""
    office = grown(restart=Restart(initial=30.0, jitter=0.0))
    office.roster.exited(office.seat, 1)
    office.submit_many(3)
    for _ in range(10):
        let_time_pass(office)
    assert office.roster.target == 1


def test_shrinking() -> None:
    """As many go as were free all the time over `idle_ttl`, those of the highest slots."""
    office = grown(steady(idle_ttl=10.0))
    jobs = office.submit_many(4)
    while office.roster.target < 4:
        let_time_pass(office)
        office.ready()
    office.write(*jobs)
    for job in jobs:
        if job.state is not DONE:
            office.reply(job)
    while office.roster.target == 4:
        keep = office.submit()  # a trickle keeps one of them at work
        let_time_pass(office)
        office.reply(keep)
    assert office.roster.target == 1
    assert slots(in_state(office, SERVING)) == [0]
    assert {seat.reason for seat in in_state(office, STOPPING)} == {"shrink"}


# debug


def test_each_job_has_a_process_of_its_own() -> None:
    """It is started for the job, begins when it is ready, and goes when it is done."""
    office = Office(2, debug=True)
    assert not office.seats
    job = Job((b"",))
    assert kinds(office.roster.submit(job)) == [Spawn]
    assert job.state is WAITING
    actions = office.ready()
    assert begun(actions) == [job]
    office.write(job)
    assert kinds(office.reply(job)) == [DESTRUCT, Retire]
    office.roster.exited(office.seat, 0)
    assert not office.seats


def test_so_many_processes_at_a_time() -> None:
    """The next job's process is started when one is gone, and not from what was started for another."""
    office = Office(2, debug=True)
    jobs = office.submit_many(3)
    assert len(office.seats) == 2
    office.ready()
    office.write(*jobs)
    office.reply(jobs[0])
    assert len(office.seats) == 2
    assert kinds(office.roster.exited(office.seats[0], 0)) == [Spawn]
    assert begun(office.ready()) == [jobs[2]]


def test_a_process_that_does_not_boot() -> None:
    """Its job is told, and no other."""
    office = Office(2, debug=True)
    jobs = office.submit_many(2)
    actions = office.roster.exited(office.seats[0], 1)
    assert (jobs[0].state, jobs[0].end, jobs[1].state) == (DONE, End.NOT_BOOTED, WAITING)
    assert Wake in kinds(actions)
    assert office.roster.failed_in_a_row == 0
    assert office.roster.next_deadline() == math.inf


def test_cancel_while_it_boots() -> None:
    """The process goes with its job, for the next one must be fresh."""
    office = Office(1, debug=True)
    job = office.submit()
    assert kinds(office.roster.cancelled(job)) == [Kill]
    later = office.submit()
    assert kinds(office.roster.exited(office.seat, -9)) == [Spawn]
    assert begun(office.ready()) == [later]


def test_a_place_is_no_queue() -> None:
    """`max_queue` counts jobs without a place, not those whose process comes up."""
    office = Office(1, debug=True, max_queue=0)
    assert office.submit().state is WAITING
    assert office.submit().end is End.QUEUE_FULL


@pytest.mark.parametrize("debug", [True, False])
def test_to_debug_and_back(debug: bool) -> None:
    """A reset changes the kind of pool; who is at work finishes."""
    office = Office(1, debug=not debug)
    job = office.submit()
    office.ready()
    office.write(job)
    change, _ = office.roster.reset(renewed(office, debug=debug))
    (old, *_) = office.seats
    office.ready()
    assert old.state is SERVING
    office.reply(job)
    assert settled(office.roster.exited(old, 0))
    assert change.failed is None
    assert len(office.seats) == (0 if debug else 1)
