"""A pool, a job, a reply. Run it in the directory of worker.py."""

import sys

import trio

from trio_workers import Config, Payload, open_pool


async def main() -> None:
    async with open_pool(Config(command=[sys.executable, "worker.py"])) as pool:
        reply = await pool.exec(Payload(b"hello, worker"))
        print(reply.body.decode())


trio.run(main)
