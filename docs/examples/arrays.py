"""Send an array of 64 MiB to a worker and get one back. Its bytes go beside the pickle and are never copied into it."""

import time

import numpy as np
import trio

from trio_workers import open_python_pool


def square_roots(array: np.ndarray) -> np.ndarray:
    """The job: it may write into the array it got, which is its own."""
    np.sqrt(array, out=array)
    return array


async def main() -> None:
    numbers = np.arange(8 * 2**20, dtype=np.float64)
    async with open_python_pool(num_workers=1) as pool:
        for turn in ("the first, which also imports numpy in the worker", "the second"):
            start = time.perf_counter()
            roots = await pool.run_sync(square_roots, numbers)
            elapsed = time.perf_counter() - start
            print(f"{numbers.nbytes >> 20} MiB there and {roots.nbytes >> 20} MiB back in {elapsed:.3f} s ({turn})")

    print("Each value is right:", np.array_equal(roots, np.sqrt(numbers)))
    print("Ours is unchanged:", np.array_equal(numbers, np.arange(8 * 2**20)))
    roots += 1
    print("The result may be written to:", roots[:4])


if __name__ == "__main__":
    trio.run(main)
