"""What a pool tells: its log, and an observer."""

import contextlib
import logging
import sys
from pathlib import Path

import trio

from trio_workers import Config, Payload, Worker, WorkerCrashed, WorkerEvent, open_pool

WORKER = Path(__file__).with_name("crash_worker.py")


class WithExtra(logging.Formatter):
    """Shows the fields that each record of a worker carries."""

    def format(self, record: logging.LogRecord) -> str:
        first_line = record.getMessage().splitlines()[0]
        slot = getattr(record, "slot", "-")
        return f"{record.levelname:7} {record.name} slot={slot}: {first_line}"


def observe(event: WorkerEvent, worker: Worker | None, context: object) -> None:
    print(f"{event.name:8} slot {None if worker is None else worker.slot}: {type(context).__name__}")


async def main() -> None:
    config = Config(command=[sys.executable, str(WORKER)], num_workers=1, name="printers")
    async with open_pool(config, observer=observe) as pool:
        with contextlib.suppress(WorkerCrashed):
            await pool.exec(Payload(b"die"))
        await pool.exec(Payload(b"3"))


handler = logging.StreamHandler(sys.stdout)
handler.setFormatter(WithExtra())
logging.getLogger("trio_workers").addHandler(handler)
logging.getLogger("trio_workers").setLevel(logging.DEBUG)
trio.run(main)
