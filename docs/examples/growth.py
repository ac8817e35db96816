"""A pool that grows with its load, and shrinks again."""

import time

import trio

from trio_workers import Limits, WorkerEvent, open_python_pool


def work(seconds: float) -> None:
    """A job that uses something other than this machine's cores: it waits for a database, say."""
    time.sleep(seconds)


async def main() -> None:
    shrunk = trio.Event()
    gone: list[object] = []

    def report(event: WorkerEvent, worker: object, context: object) -> None:
        print(f"{event.name:8} {worker} {context or ''}".rstrip())
        if context == "shrink":
            gone.append(worker)
        if len(gone) == 2:
            shrunk.set()

    limits = Limits(idle_ttl=1.0)  # who was too many all this time goes
    async with open_python_pool(1, max_workers=3, grow_after=0.1, limits=limits, observer=report) as pool:
        print("one job at a time:")
        for _ in range(3):
            await pool.run_sync(work, 0.05)
        print("workers:", pool.statistics().target)

        print("twelve at once:")
        async with trio.open_nursery() as nursery:
            for _ in range(12):
                nursery.start_soon(pool.run_sync, work, 0.3)
        print("workers:", pool.statistics().target)

        print("and nothing more to do:")
        await shrunk.wait()
        print("workers:", pool.statistics().target)


if __name__ == "__main__":
    trio.run(main)
