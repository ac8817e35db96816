"""Put 100,000 jobs through one pool and see that nothing grows: `python tests/hundred_thousand.py [JOBS [SEED]]`.

64 callers share four workers. One job in 500 is cancelled, waiting or running, which costs a worker where it runs; one
in 2,000 crashes its worker. Every ending is checked: a reply is the job's own, and a crash fails that job and no other.

After each fifth of the jobs the pool comes to rest and is looked at. From the first look (the warm-up) to the last one
the memory of this process may grow by less than 2 MiB, and descriptors, tasks and children not at all.
"""

import gc
import logging
import os
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import attrs
import trio

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import trio_workers
from trio_workers import Config, Payload, Pool, WorkerCrashed, open_pool

CALLERS: Final = 64
WORKERS: Final = 4
LOOKS: Final = 5
CANCELLED: Final = 500
CRASHED: Final = 2_000
GROWTH: Final = 2 * 1024 * 1024
"""Bytes: what an allocator may still take for itself after the warm-up; a kept object for each job would be more."""
REST: Final = 20.0
"""Seconds for the last replacement to come up, on a loaded machine."""

WORKER: Final = """
import os, time
from trio_workers.child import serve

def handle(job):
    if job.body == b"crash":
        os._exit(1)
    if job.body == b"sleep":
        time.sleep(60)
    return job.body

serve(handle)
"""


@attrs.frozen
class Look:
    """What is there while the pool rests."""

    jobs: int
    memory: int
    descriptors: int
    tasks: int
    children: int
    workers_started: int

    def __str__(self) -> str:
        return (
            f"{self.jobs:>9,} jobs  {self.memory / 2**20:>7.2f} MiB  {self.descriptors:>3} descriptors  "
            f"{self.tasks:>3} tasks  {self.children:>2} children  {self.workers_started:>5,} workers started"
        )


def resident() -> int:
    """Return VmRSS of this process, in bytes."""
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def count_children() -> int:
    """Count our child processes, zombies included."""
    return sum(
        len(Path(f"/proc/self/task/{thread}/children").read_text().split()) for thread in os.listdir("/proc/self/task")
    )


def look(jobs: int, started: int) -> Look:
    gc.collect()
    descriptors = len(os.listdir("/proc/self/fd"))
    tasks = trio.lowlevel.current_statistics().tasks_living
    return Look(jobs, resident(), descriptors, tasks, count_children(), started)


async def come_to_rest(pool: Pool) -> None:
    """Wait until every worker is there and free."""
    with trio.fail_after(REST):
        while pool.statistics().idle != WORKERS or len(pool.workers) != WORKERS:  # noqa: ASYNC110
            await trio.sleep(0.01)


class Run:
    """The jobs, and how they ended."""

    def __init__(self, pool: Pool, seed: int) -> None:
        self.pool = pool
        self.rng = random.Random(seed)
        self.begun = 0
        self.endings: Counter[str] = Counter()

    async def run_up_to(self, jobs: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(CALLERS):
                nursery.start_soon(self._call_until, jobs)

    async def _call_until(self, jobs: int) -> None:
        while self.begun < jobs:
            self.begun += 1
            number = self.begun
            if number % CRASHED == 0:
                await self._crash()
            elif number % CANCELLED == 0:
                await self._cancel()
            else:
                body = b"job %d" % number
                reply = await self.pool.exec(Payload(body))
                if reply.body != body:
                    raise AssertionError(f"{body!r} was answered by {reply.body!r}")
                self.endings["replied"] += 1

    async def _crash(self) -> None:
        try:
            await self.pool.exec(Payload(b"crash"))
        except WorkerCrashed as error:
            if error.started is not True:
                raise AssertionError(f"started is {error.started} after a crash under the job") from error
            self.endings["crashed"] += 1
        else:
            raise AssertionError("a job that ends its worker was answered")

    async def _cancel(self) -> None:
        # With so many callers a job waits for some milliseconds: this catches some waiting, and some running.
        with trio.move_on_after(self.rng.uniform(0, 0.02)) as scope:
            await self.pool.exec(Payload(b"sleep"))
        if not scope.cancelled_caught:
            raise AssertionError("a job that sleeps was answered")
        self.endings["cancelled"] += 1


def complaints_of(first: Look, last: Look, before: Look, after: Look) -> list[str]:
    """Say what has grown: from the first look to the last one, and from before the pool to after it."""
    complaints: list[str] = []
    if (growth := last.memory - first.memory) >= GROWTH:
        complaints.append(f"memory has grown by {growth / 2**20:.2f} MiB since the warm-up")
    for name in ("descriptors", "tasks", "children"):
        for one, other in ((first, last), (before, after)):
            was, is_ = getattr(one, name), getattr(other, name)
            if was != is_:
                complaints.append(f"{name}: {was} after {one.jobs:,} jobs, {is_} after {other.jobs:,}")
    return complaints


async def main(jobs: int, seed: int) -> list[str]:
    """Run all jobs; return what is wrong."""
    cfg = Config(
        command=[sys.executable, "-c", WORKER],
        num_workers=WORKERS,
        env={"PYTHONPATH": str(Path(trio_workers.__file__).parent.parent)},
    )
    await trio.to_thread.run_sync(int)  # trio's own descriptors and helpers are there before we count
    before = look(0, 0)
    print(before, flush=True)
    looks: list[Look] = []
    async with open_pool(cfg) as pool:
        run = Run(pool, seed)
        for part in range(1, LOOKS + 1):
            await run.run_up_to(jobs * part // LOOKS)
            await come_to_rest(pool)
            looks.append(look(run.begun, pool.statistics().starts))
            print(looks[-1], flush=True)
        counted = dict(pool.statistics().jobs)
        started = pool.statistics().starts
    after = look(run.begun, started)
    print(after, flush=True)
    print(f"ended: {', '.join(f'{count:,} {name}' for name, count in sorted(run.endings.items()))}")
    print(f"memory since the warm-up: {(looks[-1].memory - looks[0].memory) / 2**20:+.2f} MiB")
    complaints = complaints_of(looks[0], looks[-1], before, after)
    if counted != dict(run.endings) or sum(counted.values()) != jobs:
        complaints.append(f"the pool counted {counted}, and the callers {dict(run.endings)}")
    return complaints


def run_as_script(arguments: list[str]) -> None:
    jobs = int(arguments[0]) if arguments else 100_000
    seed = int(arguments[1]) if len(arguments) > 1 else random.SystemRandom().randrange(1 << 32)
    logging.getLogger("trio_workers").setLevel(logging.ERROR)  # the crashes are meant
    print(f"{jobs:,} jobs, {CALLERS} callers, {WORKERS} workers, seed {seed}", flush=True)
    start = time.perf_counter()
    complaints = trio.run(main, jobs, seed)
    print(f"in {time.perf_counter() - start:.0f} s")
    if complaints:
        sys.exit("not flat:\n  " + "\n  ".join(complaints))
    print("flat")


if __name__ == "__main__":
    run_as_script(sys.argv[1:])
