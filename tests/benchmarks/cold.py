"""A pool in a fresh interpreter: `python -m tests.benchmarks.cold first|memory NAME WORKERS` prints numbers.

"first" prints the monotonic clock's time when all it imports was there, and when the first result was. "memory" prints
in bytes what each idle worker has (RSS, then PSS, on average), and what all processes that the pool has started have
together (PSS). NAME is that of a candidate of `function_pools`, or NOTHING or TRIO.

Workers of some peers load this file again (as `__mp_main__`), so it imports nothing until it runs.
"""

NOTHING = "no pool: an interpreter that does nothing"
TRIO = "no pool: an interpreter that imports trio"


def main() -> None:
    """Run as a script."""
    import contextlib
    import importlib
    import sys
    import time

    from tests.benchmarks import function_pools
    from tests.benchmarks.functions import give_back

    what, name, workers = sys.argv[1], sys.argv[2], int(sys.argv[3])
    candidate = {it.name: it for it in (*function_pools.ALL, *function_pools.FORKED)}.get(name)
    for module in candidate.modules if candidate else ["trio"] if name == TRIO else []:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    imported = time.monotonic()
    if candidate is None:
        print(imported, imported)
    elif candidate.open_awaited:
        import trio

        async def run() -> None:
            async with candidate.open_awaited(workers) as pool:
                if what == "first":
                    await pool.call(give_back, 1)
                    print(imported, time.monotonic())
                else:
                    pids = await function_pools.bring_up_awaited(pool, workers)
                    await trio.sleep(REST)
                    print(*sizes(pids))

        trio.run(run)
    else:
        with candidate.open_blocking(workers) as pool:
            if what == "first":
                pool.call(give_back, 1)
                print(imported, time.monotonic())
            else:
                pids = function_pools.bring_up_blocking(pool, workers)
                time.sleep(REST)
                print(*sizes(pids))


REST = 0.2
"""Seconds between the last job and the look at a worker's memory."""


def sizes(pids: "set[int]") -> tuple[float, float, float]:
    """Return the workers' RSS and PSS on average, and the PSS of all processes below this one, in bytes."""
    import os

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


def below(pid: int) -> list[int]:
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
