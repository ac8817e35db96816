"""One worker to oneself, for jobs that belong together."""

import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, Pool, open_pool

WORKER = Path(__file__).with_name("lease_worker.py")


async def add_up(pool: Pool, name: str, numbers: range) -> None:
    async with pool.lease(label=name) as worker:
        total = (await worker.exec(Payload(b"reset"))).body
        for number in numbers:
            total = (await worker.exec(Payload(str(number).encode()))).body
    print(f"{name}: {total.decode()}")


async def main() -> None:
    config = Config(command=[sys.executable, str(WORKER)], num_workers=2)
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        for count in (10, 100, 1000):
            nursery.start_soon(add_up, pool, f"1 to {count}", range(1, count + 1))


trio.run(main)
