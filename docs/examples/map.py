"""Many jobs: no more under way than the workers can do, replies in order, an error where it belongs."""

import sys
from collections.abc import Iterator
from pathlib import Path

import trio

from trio_workers import Config, JobError, Payload, open_pool

WORKER = Path(__file__).with_name("crash_worker.py")


def numbers() -> Iterator[Payload]:
    """A source may be endless: it is asked for the next job only when there is room for one."""
    for number in range(1_000_000):
        yield Payload(str(number).encode())


async def main() -> None:
    async with open_pool(Config(command=[sys.executable, str(WORKER)], num_workers=2)) as pool:
        async with pool.map(numbers(), return_exceptions=True) as replies:
            for number in range(5):
                reply = await anext(replies)
                print(f"12 // {number} is", "a job error" if isinstance(reply, JobError) else reply.body.decode())
        print(f"{sum(pool.statistics().jobs.values())} jobs were run, of a million.")


trio.run(main)
