"""What became of each job, and how long it waited and ran, by label: numbers for your metrics."""

import os
import time
from collections import Counter, defaultdict

import trio

from trio_workers import JobRecord, WorkerCrashed, open_python_pool


class Metrics:
    """A job observer: called in the trio thread once at each job's end, so it only adds."""

    def __init__(self) -> None:
        self.outcomes: Counter[tuple[str | None, str]] = Counter()
        self.waited: defaultdict[str | None, float] = defaultdict(float)
        self.ran: defaultdict[str | None, float] = defaultdict(float)

    def __call__(self, record: JobRecord) -> None:
        self.outcomes[record.label, record.outcome] += 1
        self.waited[record.label] += (record.started or record.ended) - record.queued
        if record.started is not None:
            self.ran[record.label] += record.ended - record.started


def divide(number: int) -> float:
    return 12 / number


def crash() -> None:
    os._exit(3)


async def main() -> None:
    metrics = Metrics()
    async with open_python_pool(2, job_observer=metrics) as pool:
        async with pool.map(divide, range(5), return_exceptions=True) as quotients:
            print([quotient if isinstance(quotient, float) else repr(quotient) async for quotient in quotients])
        try:
            await pool.run_sync(crash, label="a bad job")
        except WorkerCrashed as error:
            print(type(error).__name__)
        with trio.move_on_after(0.2):
            await pool.run_sync(time.sleep, 60)
    for (label, outcome), count in sorted(metrics.outcomes.items()):
        print(f"{label}: {count} {outcome}")
    print("Each has its times:", all(0 <= ran < 60 for ran in metrics.ran.values()))


if __name__ == "__main__":
    trio.run(main)
