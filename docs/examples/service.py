"""A service that runs for months: SIGHUP rolls out the release that the file beside it names, SIGTERM ends it."""

import logging
import signal
import sys
from pathlib import Path

import trio

from trio_workers import Config, Limits, Payload, Pool, Restart, SpawnError, open_pool

WORKER = Path(__file__).with_name("service_worker.py")
log = logging.getLogger("service")


def make_config(release: str) -> Config:
    return Config(
        command=[sys.executable, str(WORKER)],
        env={"RELEASE": release},
        num_workers=2,
        limits=Limits(ttl=24 * 3600, exec_ttl=60, max_memory=256 * 2**20, hard_memory=512 * 2**20),
        restart=Restart(give_up_after=20),  # then it ends with an error, and the service manager starts it again
        name="service",
    )


async def roll_out(pool: Pool, release_file: trio.Path, *, task_status: trio.TaskStatus[None]) -> None:
    """On each SIGHUP, replace the workers by those of the release that the file names now."""
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            release = (await release_file.read_text()).strip()
            try:
                await pool.reset(make_config(release))
                log.info("release %s is in place", release)
            except SpawnError as error:
                log.error("release %s does not start, the old one goes on: %s", release, error)


async def serve_callers(pool: Pool, stopping: trio.Event) -> None:
    """Stands for what brings the jobs: a server, a queue."""
    last = ""
    while not stopping.is_set():
        release = (await pool.exec(Payload(b"work"))).body.decode()
        if release != last:
            print(f"answered by release {release}", flush=True)
            last = release


async def main(release_file: trio.Path) -> None:
    stopping = trio.Event()
    config = make_config((await release_file.read_text()).strip())
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as ends:
        async with open_pool(config) as pool, trio.open_nursery() as nursery:
            await nursery.start(roll_out, pool, release_file)
            async with trio.open_nursery() as callers:
                callers.start_soon(serve_callers, pool, stopping)
                await anext(ends)
                stopping.set()  # nothing new is begun, and what runs is finished
            nursery.cancel_scope.cancel()
    print("stopped; no worker is left")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    trio.run(main, trio.Path(sys.argv[1]))
