"""A function that leaks, and one that hangs: each has a limit for it."""

import time

import trio

from trio_workers import JobTimeout, Limits, open_python_pool

MIB = 2**20
leaked: list[bytes] = []


def get_ready() -> None:
    """Called as a worker starts: it imports this module, so that the first job does not, and `exec_ttl` is for jobs."""


def leak() -> int:
    """The job: it is done in a moment and leaves two megabytes behind, each time."""
    leaked.append(b"x" * (2 * MIB))
    time.sleep(0.02)
    return len(leaked)


def hang() -> None:
    time.sleep(3600)


async def main() -> None:
    limits = Limits(max_memory=100 * MIB, hard_memory=1024 * MIB, exec_ttl=2)
    async with open_python_pool(num_workers=1, limits=limits, initializer=get_ready) as pool:
        calls = most = 0
        while "max_memory" not in pool.statistics().exits:
            calls += 1
            most = max(most, await pool.run_sync(leak))
        print(f"A worker was replaced for its memory, after {most} of {calls} calls; not one of them failed.")
        print("Its successor starts from nothing:", await pool.run_sync(leak) < most)
        print("Its memory is small again:", all(used < 100 * MIB for used in pool.statistics().memory.values()))

        try:
            await pool.run_sync(hang)
        except JobTimeout as error:
            print(f"JobTimeout: {error}")
        print("And the next one has its answer:", await pool.run_sync(abs, -7))


if __name__ == "__main__":
    trio.run(main)
