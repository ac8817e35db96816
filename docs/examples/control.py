"""A pool that is turned from outside: its own side, and a client as another program would have it."""

import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, open_pool, serve_control, serve_signals
from trio_workers.control import connect, find_sockets

WORKER = Path(__file__).with_name("worker.py")


async def serve_callers(config: Config) -> None:
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        path = await nursery.start(serve_control, pool)
        await nursery.start(serve_signals, pool)
        await pool.exec(Payload(b"hello"))
        await turn(path)  # in a real service: whatever it does all day
        nursery.cancel_scope.cancel()  # they serve until they are cancelled


async def turn(path: Path) -> None:
    """What another program does, that knows the path or looks for it."""
    print("listed:", path in find_sockets())
    async with await connect(path) as client:
        status = (await client.ask("status"))["status"]
        print(f"{status['pool']}: {status['idle']} of {status['target']} workers are idle, jobs: {status['jobs']}")
        print(await client.ask("resize 3"))
        print(await client.ask({"do": "reset"}))
        print(await client.ask("resize 0"))
        async for picture in client.watch():  # one now, and one at each change
            print([worker["status"] for worker in picture["workers"]])
            break


trio.run(serve_callers, Config(command=[sys.executable, str(WORKER)], num_workers=2, name="mill"))
