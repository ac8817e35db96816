"""Python functions as jobs: one call, and a map over many."""

import trio

from trio_workers import open_python_pool


def count_primes(below: int) -> int:
    return sum(all(n % divisor for divisor in range(2, int(n**0.5) + 1)) for n in range(2, below))


async def main() -> None:
    async with open_python_pool() as pool:
        print(await pool.run_sync(count_primes, 10_000), "primes below 10,000")
        async with pool.map(count_primes, [10, 100, 1000]) as counts:
            print([count async for count in counts])


if __name__ == "__main__":
    trio.run(main)
