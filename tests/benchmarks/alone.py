"""One pool alone in a fresh interpreter: `python -m tests.benchmarks.alone WHAT NAME WORKERS SECONDS SIZE`.

It prints numbers. NAME is that of a candidate of `function_pools` or `floors`, or NOTHING or TRIO, and WHAT one of

- first: the monotonic clock's time when all it imports was there, and when the first result was,
- memory: in bytes, what each idle worker has (RSS, then PSS, on average), and what all processes that the pool has
  started have together (PSS),
- bytes, array: how long one of the calls of SECONDS with SIZE bytes takes, there and back (the median), and how many
  there are a second. Alone, because how fast they are depends on what the process has allocated and freed before.

Workers of some peers load this file again (as `__mp_main__`), so it imports nothing until it runs.
"""

TYPE_CHECKING = False  # typing itself would be one more import
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from typing import Any

    from tests.benchmarks.function_pools import Awaited, Candidate

NOTHING = "no pool: an interpreter that does nothing"
TRIO = "no pool: an interpreter that imports trio"

REST = 0.2
"""Seconds between the last job and the look at a worker's memory."""
WARM_UP = 0.1
"""Seconds of calls before those that count, at most: no longer than those."""


def main() -> None:
    """Run as a script."""
    import contextlib
    import importlib
    import sys
    import time

    from tests.benchmarks import function_pools

    what, name, workers, seconds, size = (
        sys.argv[1],
        sys.argv[2],
        int(sys.argv[3]),
        float(sys.argv[4]),
        int(sys.argv[5]),
    )
    candidates = [*function_pools.ALL, *function_pools.FORKED]
    if what in ("bytes", "array"):
        from tests.benchmarks.floors import FLOORS  # imports what would count where the first result is timed

        candidates += FLOORS
    candidate = {it.name: it for it in candidates}.get(name)
    for module in candidate.modules if candidate else ["trio"] if name == TRIO else []:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    imported = time.monotonic()
    if candidate is None:
        print(imported, imported)
    elif what == "first":
        print(imported, run(candidate, workers, first))
    elif what == "memory":
        print(*run(candidate, workers, lambda pool: memory(pool, workers)))
    else:
        print(*run(candidate, workers, lambda pool: there_and_back(pool, what == "array", seconds, size)))


def run(candidate: "Candidate", workers: int, body: "Callable[[Awaited], Awaitable[Any]]") -> "Any":
    """Open a pool, under trio if it is one of trio's, and run the body with it."""
    from tests.benchmarks.function_pools import Awaited

    if candidate.open_awaited is not None:
        import trio

        async def with_pool() -> object:
            async with candidate.open_awaited(workers) as pool:
                return await body(pool)

        return trio.run(with_pool)

    with candidate.open_blocking(workers) as blocking:

        async def call(*args: object) -> object:
            return blocking.call(*args)

        async def map_(*args: object) -> object:
            return blocking.map(*args)

        # Nothing in there ever waits for an event loop.
        try:
            body(Awaited(call, map_)).send(None)
        except StopIteration as done:
            return done.value
        raise AssertionError("it waited for an event loop")


async def first(pool: "Awaited") -> float:
    """Return the time of the first result."""
    import time

    from tests.benchmarks.functions import give_back

    await pool.call(give_back, 1)
    return time.monotonic()


async def there_and_back(pool: "Awaited", array: bool, seconds: float, size: int) -> tuple[float, float]:
    """Return how long a call takes, and how many there are a second."""
    import os
    from statistics import median

    if array:
        import numpy

        value: Any = numpy.arange(size // 8, dtype=numpy.float64)
        same = arrays_alike
    else:
        value = os.urandom(size)
        same = bytes_alike
    for _ in range(2):
        taken, result = await calls(pool, value, min(WARM_UP, seconds))
        assert same(value, result)
        del result
    taken, _ = await calls(pool, value, seconds)
    return median(taken), len(taken) / sum(taken)


def bytes_alike(sent: "Any", back: "Any") -> bool:
    return sent == back  # type: ignore[no-any-return]


def arrays_alike(sent: "Any", back: "Any") -> bool:
    import numpy

    return numpy.array_equal(sent, numpy.frombuffer(back))  # what a floor gives back is bytes


async def calls(pool: "Awaited", value: object, seconds: float) -> "tuple[list[float], Any]":
    """Call again and again; return how long each call took, and the last result."""
    import time

    from tests.benchmarks.functions import give_back

    clock = time.perf_counter
    taken: list[float] = []
    result = None
    before = clock()
    end = before + seconds
    while before < end:
        result = None
        before = clock()
        result = await pool.call(give_back, value)
        after = clock()
        taken.append(after - before)
        before = after
    return taken, result


async def memory(pool: "Awaited", workers: int) -> tuple[float, float, float]:
    """Return the workers' RSS and PSS on average, and the PSS of all processes below this one, in bytes."""
    import os
    import time

    from tests.benchmarks.function_pools import bring_up

    pids = await bring_up(pool, workers)
    time.sleep(REST)  # noqa: ASYNC251 - nothing else runs here
    rss, pss = zip(*map(size_of, pids), strict=True)
    return sum(rss) / len(pids), sum(pss) / len(pids), sum(size_of(pid)[1] for pid in below(os.getpid()))


def size_of(pid: int) -> tuple[int, int]:
    """Return RSS and PSS of a process, in bytes."""
    values = {}
    with open(f"/proc/{pid}/smaps_rollup") as file:
        for line in file:
            key, _, rest = line.partition(":")
            if key in ("Rss", "Pss"):
                values[key] = int(rest.split()[0]) * 1024
    return values["Rss"], values["Pss"]


def below(pid: int) -> "Iterable[int]":
    """Return the children of a process, and theirs."""
    import os

    parents: dict[int, int] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            pass  # gone meanwhile
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


if __name__ == "__main__":
    main()
