"""A service that runs for months: SIGHUP rolls out the release that the file beside it names, SIGTERM ends it."""

import logging
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import trio

from trio_workers import Config, Limits, Payload, Pool, Restart, SpawnError, WorkersError, open_pool

WORKER = Path(__file__).with_name("service_worker.py")
log = logging.getLogger("service")


def make_config(release: str) -> Config:
    return Config(
        command=[sys.executable, str(WORKER)],
        env={"RELEASE": release},
        num_workers=2,
        limits=Limits(ttl=24 * 3600, exec_ttl=60, max_memory=256 * 2**20, hard_memory=512 * 2**20),  # bytes
        restart=Restart(give_up_after=20),  # then it ends with an error, and the service manager starts it again
        name="service",
    )


async def read_release(release_file: trio.Path) -> str:
    release = (await release_file.read_text()).strip()
    if not release:
        raise ValueError(f"{release_file} names no release")
    return release


async def roll_out(pool: Pool, release_file: trio.Path, hangups: AsyncIterator[int]) -> None:
    """On each SIGHUP, replace the workers by those of the release that the file names now."""
    async for _ in hangups:
        try:
            release = await read_release(release_file)
            await pool.reset(make_config(release))
            log.info("release %s is in place", release)
        except (SpawnError, OSError, ValueError) as error:
            log.error("nothing is rolled out, the old release goes on: %s", error)


async def serve_callers(pool: Pool, stopping: trio.Event) -> None:
    """Stands for what brings the jobs: a server, a queue."""
    last = ""
    while not stopping.is_set():
        try:
            release = (await pool.exec(Payload(b"work"))).body.decode()
        except WorkersError as error:  # this job's caller is told so; the next job has another worker
            log.error("a job failed: %s", error)
            continue
        if release != last:
            print(f"answered by release {release}", flush=True)
            last = release


async def main(release_file: trio.Path) -> None:
    stopping = trio.Event()
    with (
        trio.open_signal_receiver(signal.SIGHUP) as hangups,  # one that comes while the pool opens waits in here
        trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as ends,
    ):
        config = make_config(await read_release(release_file))
        async with open_pool(config) as pool, trio.open_nursery() as nursery:
            nursery.start_soon(roll_out, pool, release_file, hangups)
            async with trio.open_nursery() as callers:
                callers.start_soon(serve_callers, pool, stopping)
                await anext(ends)
                stopping.set()  # nothing new is begun, and what runs is finished
            nursery.cancel_scope.cancel()
    print("stopped; no worker is left")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # before there is a pool, and after it: that must not end the service
    trio.run(main, trio.Path(sys.argv[1]))
