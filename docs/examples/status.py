"""A pool that can be looked at in a browser while it works.

    $ python status.py 127.0.0.1:8080
    Look at http://127.0.0.1:8080

With a STATUS_TOKEN in the environment it can be turned from there, too. Ctrl-C or SIGTERM ends it.
"""

import itertools
import math
import os
import signal
import sys
from functools import partial

import trio

from trio_workers import PythonPool, WorkersError, open_python_pool, serve_status


async def keep_busy(pool: PythonPool) -> None:
    """Stands for what brings the jobs."""
    for number in itertools.count(2000):
        try:
            await pool.run_sync(math.factorial, number, label=f"factorial of {number}")
        except WorkersError as error:
            print(error, file=sys.stderr)


async def main(bind: str) -> None:
    token = os.environ.get("STATUS_TOKEN")  # at least 16 characters, or nobody can turn anything
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as ends:
        # The page is outside the pool's block, so that it can still say that the pool is being closed.
        async with trio.open_nursery() as nursery:
            async with open_python_pool(2, name="numbers") as pool, trio.open_nursery() as callers:
                (url,) = await nursery.start(partial(serve_status, pool, bind, token=token))
                print("Look at", url, flush=True)
                callers.start_soon(keep_busy, pool)
                await anext(ends)
                callers.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    print("Stopped; no worker is left.")


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8080")
