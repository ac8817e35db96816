"""The floor of large arrays: the same bytes there and back through mapped memory, and nothing else.

This process copies an array into memory that a child maps as well, the child copies it out into memory of its own and
back in, and this process copies it out: four copies. All memory is there before and stays; a byte through a pipe says
whose turn it is.
"""

import mmap
import os
import sys
import time

NAME = "bare copy through mapped memory"


def main() -> None:
    """Run as a script: `python -m tests.benchmarks.bare_copy BYTES SECONDS`."""
    from statistics import median

    taken = there_and_back(int(sys.argv[1]), float(sys.argv[2]))
    print(median(taken), len(taken) / sum(taken))


def there_and_back(size: int, seconds: float) -> list[float]:
    """Return how long each turn took, but for the first two, in which the memory comes into being."""
    shared = mmap.mmap(-1, size)
    go, went = os.pipe()
    answer, answered = os.pipe()
    if not os.fork():
        os.close(went)
        own = bytearray(size)
        with memoryview(shared) as there, memoryview(own) as here:
            while os.read(go, 1):
                here[:] = there
                there[:] = here
                os.write(answered, b".")
        os._exit(0)
    array, result = bytearray(os.urandom(4096) * (size // 4096)), bytearray(size)
    taken: list[float] = []
    with memoryview(shared) as there, memoryview(array) as source, memoryview(result) as target:
        until = time.perf_counter() + seconds
        while len(taken) < 5 or time.perf_counter() < until:
            begin = time.perf_counter()
            there[:] = source
            os.write(went, b".")
            os.read(answer, 1)
            target[:] = there
            taken.append(time.perf_counter() - begin)
    assert result == array
    os.close(went)
    os.wait()
    return taken[2:]


if __name__ == "__main__":
    main()
