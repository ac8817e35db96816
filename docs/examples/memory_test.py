"""Tests without processes: workers that are tasks in this process, on a clock that jumps. Run it with pytest."""

import pytest
import trio

from trio_workers import Config, Payload, Pool, WorkerCrashed, open_pool
from trio_workers.child import Job
from trio_workers.testing import Crash, MemoryFactory


async def print_all(pool: Pool, pages: list[bytes]) -> int:
    """The code to be tested: print each page, a second time where the printer dies of the first."""
    tries = 0
    for page in pages:
        while True:
            tries += 1
            try:
                await pool.exec(Payload(page))
                break
            except WorkerCrashed:
                continue
    return tries


@pytest.mark.trio
async def test_a_page_is_printed_again_where_the_printer_dies(autojump_clock: trio.abc.Clock) -> None:
    printed: list[bytes] = []

    async def printer(job: Job) -> bytes:
        await trio.sleep(60)  # slow, but no test waits for it
        if job.body == b"jam" and not printed.count(b"jam"):
            printed.append(job.body)
            raise Crash(3, stderr="paper jam")
        printed.append(job.body)
        return b"ok"

    config = Config(command=["a printer"], num_workers=1, factory=MemoryFactory(printer))
    async with open_pool(config) as pool:
        assert await print_all(pool, [b"one", b"jam", b"two"]) == 4
    assert printed == [b"one", b"jam", b"jam", b"two"]
