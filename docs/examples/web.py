"""A web application under trio that hands its CPU work to a pool: starlette, served by hypercorn.

    $ curl http://127.0.0.1:8000/primes/100000
    $ curl http://127.0.0.1:8000/crash

A job that crashes, or takes too long, is one answer with an error in it, and the application goes on.
"""

import argparse
import os
import signal
from functools import partial

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from trio_workers import AllocateTimeout, QueueFull, WorkerCrashed, open_python_pool


def count_primes(below: int) -> int:
    """A job."""
    if below > 10**12:
        raise ValueError("that would take for ever")
    return sum(all(n % divisor for divisor in range(2, int(n**0.5) + 1)) for n in range(2, below))


def crash() -> None:
    """A job as a broken C extension has it."""
    os.abort()


async def primes(request: Request) -> JSONResponse:
    state, below = request.app.state, request.path_params["below"]
    with trio.fail_after(state.longest):  # the job is killed then, or leaves the queue
        count = await state.pool.run_sync(count_primes, below, label=f"primes below {below}")
    return JSONResponse({"below": below, "primes": count})


async def crashing(request: Request) -> JSONResponse:
    await request.app.state.pool.run_sync(crash)
    return JSONResponse({})


async def workers(request: Request) -> JSONResponse:
    statistics = request.app.state.pool.statistics()
    return JSONResponse({"idle": statistics.idle, "busy": statistics.busy, "starts": statistics.starts})


async def answer(status: int, text: str, request: Request, error: Exception) -> JSONResponse:
    """An error as an answer; the pool has logged what happened to the worker."""
    return JSONResponse({"error": text, "type": type(error).__name__}, status)


def make_application() -> Starlette:
    return Starlette(
        routes=[Route("/primes/{below:int}", primes), Route("/crash", crashing), Route("/workers", workers)],
        exception_handlers={
            ValueError: partial(answer, 400, "this can't be computed"),
            WorkerCrashed: partial(answer, 500, "the job crashed"),
            trio.TooSlowError: partial(answer, 504, "the job took too long"),
            QueueFull: partial(answer, 503, "too much to do, come back later"),
            AllocateTimeout: partial(answer, 503, "too much to do, come back later"),
        },
    )


async def wait_for_signal() -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        await anext(signals)


async def main(port: int, longest: float) -> None:
    application = make_application()
    config = Config()
    config.bind = [f"127.0.0.1:{port}"]
    async with open_python_pool(max_queue=100) as pool, trio.open_nursery() as nursery:
        application.state.pool = pool
        application.state.longest = longest
        (url,) = await nursery.start(partial(serve, application, config, shutdown_trigger=wait_for_signal))
        print("Serving on", url, flush=True)
    print("Stopped; no worker is left.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count primes, over HTTP.")
    parser.add_argument("--port", type=int, default=8000, help="0 for a free one")
    parser.add_argument("--longest", type=float, default=10, metavar="SECONDS", help="that a job may take")
    options = parser.parse_args()
    trio.run(main, options.port, options.longest)
