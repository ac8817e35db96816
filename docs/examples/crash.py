"""A job that fails, a worker that dies, and what the caller sees of both."""

import sys
import traceback
from pathlib import Path

import trio

from trio_workers import Config, JobError, Payload, WorkerCrashed, open_pool

WORKER = Path(__file__).with_name("crash_worker.py")


async def main() -> None:
    async with open_pool(Config(command=[sys.executable, str(WORKER)], num_workers=1)) as pool:
        try:
            await pool.exec(Payload(b"0"))
        except JobError as error:
            print("The job failed, the worker stays. The last line it sent:", str(error).splitlines()[-1])

        try:
            await pool.exec(Payload(b"die"), label="invoice 7")
        except WorkerCrashed as error:
            print("The worker is gone:")
            print("".join(traceback.format_exception_only(error)))
            print(f"{error.returncode=} {error.phase=} {error.started=}")

        reply = await pool.exec(Payload(b"3"))
        print("A new worker has taken its place, and says:", reply.body.decode())


trio.run(main)
