"""Where the microseconds of a job go, in the pool's process: `python -m tests.benchmarks.profile`.

CPU time of the pool's own thread, by layer, for each path. It is taken with `cProfile`, whose own cost for each call is
measured in the same run and taken off, and set in proportion to a run without it; so the sums are measured and the
parts are good to some tenths of a microsecond. What is built in counts for the layer that calls it, system calls
excepted, which have a line of their own.
"""

import cProfile
import functools
import pstats
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import attrs
import trio

from tests.benchmarks.functions import echo, give_back
from tests.benchmarks.million import side_by_side
from tests.benchmarks.subjects import ENVIRONMENT, FLOOR, WORKER
from trio_workers import Config, Payload, open_pool, open_python_pool

JOBS: Final = 20_000
ROUNDS: Final = 5

LAYERS: Final = {
    "system calls": (),
    "trio and outcome": ("/trio/", "/outcome/"),
    "encoding, decoding, pickling": ("_codec.py", "_pool.py", "_python_pool.py", "_functions.py", "_model.py"),
    "the exchange and the core": ("_exchange.py", "_core.py"),
    "the roster": ("_roster.py", "_seats.py", "_growth.py", "_backoff.py"),
    "line, relay, dialect": ("_relay.py", "_call_line.py", "_calls.py", "_conversation.py", "_goridge.py", "_arena.py"),
    "map": ("_map.py", "_chunks.py", "_pace.py", "_region.py"),
}
OTHER: Final = "the caller"

SYSTEM_CALLS: Final = ("posix.write", "posix.read", "select.epoll", "select.poll", "_socket", "posix.pwrite")


@attrs.frozen
class Path:
    """A way to put jobs through a pool: `run` does so many, `open` makes what it takes."""

    name: str
    open: Callable[[], Any]
    run: Callable[[Any, int], Awaitable[None]]
    share: int = 1
    """One of so many jobs is done, where they are large or slow."""


def commands(workers: int, read_ahead: int = 1) -> Callable[[], Any]:
    return lambda: open_pool(
        Config(command=[sys.executable, "-c", WORKER], num_workers=workers, read_ahead=read_ahead, env=ENVIRONMENT)
    )


@asynccontextmanager
async def floor() -> AsyncIterator[Callable[[], Awaitable[object]]]:
    async with FLOOR.open(1) as opened:
        yield opened.prepare(b"0123456789")


async def one_by_one(call: Callable[[], Awaitable[object]], jobs: int) -> None:
    for _ in range(jobs):
        await call()


async def alone(pool: Any, jobs: int) -> None:
    await one_by_one(functools.partial(pool.exec, Payload(b"0123456789")), jobs)


async def together(pool: Any, jobs: int) -> None:
    await side_by_side(functools.partial(pool.exec, Payload(b"0123456789")), jobs)


async def call_alone(pool: Any, jobs: int) -> None:
    await one_by_one(functools.partial(pool.run_sync, echo, 1), jobs)


async def call_together(pool: Any, jobs: int) -> None:
    await side_by_side(functools.partial(pool.run_sync, echo, 1), jobs)


async def map_calls(pool: Any, jobs: int) -> None:
    async with pool.map(give_back, range(jobs)) as results:
        async for batch in results.batches():
            assert batch


async def large(size: int, make: Callable[[int], object], pool: Any, jobs: int) -> None:
    await one_by_one(functools.partial(pool.run_sync, echo, make(size)), jobs)


PATHS: Final[Sequence[Path]] = (
    Path("the floor, 1 caller", floor, one_by_one),
    Path("`exec`, 1 caller", commands(1), alone),
    Path("`exec`, 64 callers, 4 workers", commands(4), together),
    Path("`exec`, the same with `read_ahead=32`", commands(4, 32), together),
    Path("`run_sync`, 1 caller", lambda: open_python_pool(1), call_alone),
    Path("`run_sync`, 64 callers, 2 workers", lambda: open_python_pool(2), call_together),
    Path("`map` by `batches()`, 2 workers", lambda: open_python_pool(2), map_calls),
    Path("1 MiB of `bytes` there and back", lambda: open_python_pool(1), functools.partial(large, 2**20, bytes), 50),
    Path(
        "a `bytearray` of 64 MiB there and back",
        lambda: open_python_pool(1),
        functools.partial(large, 2**26, bytearray),
        1000,
    ),
)


def layer_of(function: tuple[str, int, str]) -> str:
    file, _, name = function
    if file == "~" and any(call in name for call in SYSTEM_CALLS):
        return "system calls"
    for layer, files in LAYERS.items():
        if any(part in file if part.startswith("/") else file.endswith("/" + part) for part in files):
            return layer
    return OTHER


def split(profile: cProfile.Profile, each: float) -> Counter[str]:
    """Share the time out among the layers: `each` is what the profiler itself takes for a call."""
    found: Counter[str] = Counter()
    stats: dict[Any, Any] = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    for function, (_, count, own, _, callers) in stats.items():
        layer = layer_of(function)
        if layer == OTHER and function[0] == "~":
            for caller, (_, times, part, _) in callers.items():
                found[layer_of(caller)] += max(0.0, part - times * each)
        else:
            found[layer] += max(0.0, own - count * each)
    return found


def cost_of_a_call() -> float:
    """What a call costs under the profiler, beyond what it costs without."""

    def nothing() -> None:
        pass

    def loop() -> float:
        start = time.thread_time()
        for _ in range(200_000):
            nothing()
        return time.thread_time() - start

    without = min(loop() for _ in range(3))
    profile = cProfile.Profile(time.thread_time)
    profile.enable()
    within = min(loop() for _ in range(3))
    profile.disable()
    return (within - without) / 200_000


async def measure(path: Path, each: float) -> tuple[float, Counter[str]]:
    """Return the CPU time of a job in seconds, and the layers' shares of it."""
    jobs = max(10, JOBS // path.share)
    times: list[float] = []
    layers: Counter[str] = Counter()
    async with path.open() as opened:
        await path.run(opened, jobs)
        for _ in range(ROUNDS):
            start = time.thread_time()
            await path.run(opened, jobs)
            times.append((time.thread_time() - start) / jobs)
        profile = cProfile.Profile(time.thread_time)
        profile.enable()
        try:
            await path.run(opened, jobs)
        finally:
            profile.disable()
        layers = split(profile, each)
    return sorted(times)[ROUNDS // 2], layers


async def main() -> None:
    each = cost_of_a_call()
    names = [*LAYERS, OTHER]
    found = [(path.name, *await measure(path, each)) for path in PATHS]
    print("| µs of CPU for a job | " + " | ".join(["in all", *names]) + " |")
    print("| --- |" + " --: |" * (len(names) + 1))
    for name, time_, layers in found:
        total = sum(layers.values())
        parts = [f"{time_ * 1e6 * layers[layer] / total:.1f}" if layers[layer] else "" for layer in names]
        print(f"| {name} | " + " | ".join([f"{time_ * 1e6:.1f}", *parts]) + " |")


if __name__ == "__main__":
    trio.run(main)
