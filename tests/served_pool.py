"""A pool with a control socket in a process of its own, which can be killed: `python -m tests.served_pool PATH`."""

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import trio

from tests.support import ROOT
from trio_workers import Config, open_pool
from trio_workers.child import Job
from trio_workers.control import serve_control
from trio_workers.testing import MemoryFactory


async def answer(job: Job) -> bytes:
    """Do as the body says."""
    if job.body == b"wait":
        await trio.sleep_forever()
    return job.body


async def main(path: str) -> None:
    """Serve until killed, or until stdin ends."""
    config = Config(command=["none"], num_workers=2, factory=MemoryFactory(answer), name="mill")
    async with open_pool(config) as pool, trio.open_nursery() as nursery:
        await nursery.start(partial(serve_control, pool, path=path))
        sys.stdout.write("serves\n")
        sys.stdout.flush()
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(sys.stdin.read)
        nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[trio.Process]:
    """Start it, and end it with the block, where the test hasn't."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.served_pool", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    async with process.stdin, process.stdout:
        try:
            said = bytes(await process.stdout.receive_some())
            assert said == b"serves\n", said
            yield process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


if __name__ == "__main__":
    trio.run(main, sys.argv[1])
