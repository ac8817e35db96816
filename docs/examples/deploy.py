"""Roll out a new release under full load: no job is lost, none refused, and none answered by an old worker after it."""

import sys
from collections import Counter
from pathlib import Path

import attrs
import trio

from trio_workers import Config, Payload, Pool, SpawnError, open_pool

WORKER = Path(__file__).with_name("service_worker.py")


async def ask(pool: Pool, answers: Counter[str]) -> None:
    answers[(await pool.exec(Payload(b"work"))).body.decode()] += 1


async def call(pool: Pool, answers: Counter[str]) -> None:
    """One of many callers; an error would end the program."""
    while True:
        await ask(pool, answers)


async def look(pool: Pool, answers: Counter[str]) -> list[str]:
    """Be one more caller, for five jobs; return which releases have answered anybody meanwhile."""
    answers.clear()
    for _ in range(5):
        await ask(pool, answers)
    return sorted(answers)


async def main() -> None:
    config = Config(command=[sys.executable, str(WORKER)], env={"RELEASE": "1"}, num_workers=4)
    answers: Counter[str] = Counter()
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(call, pool, answers)
        print("before:", await look(pool, answers))

        await pool.reset(attrs.evolve(config, env={"RELEASE": "2"}, num_workers=3))
        print("rolled out, with", len(pool.workers), "workers")

        print("after:", await look(pool, answers))

        try:
            await pool.reset(attrs.evolve(config, env={"RELEASE": "broken"}))
        except SpawnError as error:
            print(f"not rolled out: it exited with status {error.returncode} and said {error.stderr!r}")
        print("goes on:", await look(pool, answers), "with", len(pool.workers), "workers")

        nursery.cancel_scope.cancel()
    done = pool.statistics().jobs
    print("lost or refused:", sum(done.values()) - done["replied"] - done.get("cancelled", 0))


trio.run(main)
