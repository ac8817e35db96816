"""Made-up facts of a pool, for what draws them."""

from typing import Any

from trio_workers._watch import DeathFact, JobFact, PoolFact, WorkerFact

NOW = 1_800_000_000.0


def pool_fact(**more: Any) -> PoolFact:
    """A pool of four in good health."""
    facts = PoolFact(
        pool="mill", pid=4711, at=NOW, accepting=True, closed=False, target=4, idle=3, busy=1, starting=0, leased=0,
        stopping=0, waiting=0, longest_wait=0.0, jobs={"replied": 12345, "crashed": 0}, starts=4, failed_starts=0,
        failed_in_a_row=0, exits={},
    )  # fmt: skip
    facts.update(more)  # type: ignore[typeddict-item]
    return facts


def worker_fact(slot: int, **more: Any) -> WorkerFact:
    """A worker that has nothing to do."""
    facts = WorkerFact(
        slot=slot, pid=5000 + slot, status="idle", jobs=10 * slot, job=None, memory=32 * 2**20, cpu=1.5, uptime=100.0,
        restarts=0, last_death=None,
    )  # fmt: skip
    facts.update(more)  # type: ignore[typeddict-item]
    return facts


def at_work(label: str | None, age: float = 1.5) -> dict[str, Any]:
    """What is different in one that is on a job."""
    return {"status": "busy", "job": JobFact(label=label, age=age)}


def death(reason: str, error: str | None, *, ago: float = 5.0) -> DeathFact:
    """How somebody ended."""
    return DeathFact(at=NOW - ago, slot=0, pid=1, reason=reason, error=error)
