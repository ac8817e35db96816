"""A reply in parts, each taken as it comes; and one that is left early."""

import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, open_pool

WORKER = Path(__file__).with_name("stream_worker.py")


async def main() -> None:
    async with open_pool(Config(command=[sys.executable, str(WORKER)], num_workers=1)) as pool:
        pid = pool.workers[0].pid
        async with pool.stream(Payload(b"3")) as parts:
            async for part in parts:
                print(part.body.decode())

        async with pool.stream(Payload(b"1000000000")) as parts:
            async for part in parts:
                if part.body == b"2":
                    break  # the worker is asked to stop, and stays
        async with pool.stream(Payload(b"1")) as parts:
            print("and again", [part.body.decode() async for part in parts])
        print("The same worker:", pool.workers[0].pid == pid)


trio.run(main)
