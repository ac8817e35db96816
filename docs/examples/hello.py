"""A pool, a job, a reply."""

import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, open_pool

WORKER = Path(__file__).with_name("worker.py")


async def main() -> None:
    async with open_pool(Config(command=[sys.executable, str(WORKER)])) as pool:
        reply = await pool.exec(Payload(b"hello, worker"))
        print(reply.body.decode())


trio.run(main)
