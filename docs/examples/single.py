"""A single worker, without a pool around it: it is not replaced."""

import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, open_worker

WORKER = Path(__file__).with_name("worker.py")


async def main() -> None:
    async with open_worker(Config(command=[sys.executable, str(WORKER)])) as worker:
        print((await worker.exec(Payload(b"one"))).body.decode())
        print(worker.state.value.name, worker.state.num_execs)
        await worker.stop()
        print(worker.state.value.name)


trio.run(main)
