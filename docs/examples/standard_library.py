"""Send each source file of the Python standard library to a pool of workers, and print what they found.

On the way it kills the worker that reads the largest file, with SIGKILL, as the kernel does where memory runs out. The
one job that was on it ends with WorkerCrashed and is sent again, which does no harm here: the job only looks. No other
job notices.
"""

import argparse
import heapq
import json
import logging
import os
import signal
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trio

from trio_workers import Config, JobError, Payload, Pool, WorkerCrashed, open_pool

LIBRARY = Path(sysconfig.get_path("stdlib"))
CONFIG = Config(
    command=[sys.executable, str(Path(__file__).with_name("standard_library_worker.py"))],
    destroy_timeout=2.0,
    name="standard library",
)


def find_files(limit: int | None) -> list[Path]:
    """Find the library's source files; with a limit that many of them, evenly spread."""
    files = [
        path
        for path in sorted(LIBRARY.rglob("*.py"))
        if path.is_file() and not {"site-packages", "dist-packages"} & set(path.parts)
    ]
    if limit is None or limit >= len(files):
        return files
    return [files[number * len(files) // limit] for number in range(limit)]


def make_job(path: Path) -> Payload:
    return Payload(path.read_bytes())


class Progress:
    """One line that is written anew on a terminal, and a line for each quarter elsewhere."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.third = trio.Event()
        self._quarter = 0

    def step(self) -> None:
        self.done += 1
        if self.done * 3 >= self.total:
            self.third.set()
        text = f"{self.done:,} of {self.total:,} files"
        if sys.stdout.isatty():
            print(f"\r{text} ", end="\n" if self.done == self.total else "", flush=True)
        elif self.done * 4 // self.total > self._quarter:
            self._quarter = self.done * 4 // self.total
            print(text, flush=True)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if sys.stdout.isatty():
            print()
        print(text, flush=True)


class Findings:
    """What has been found."""

    def __init__(self) -> None:
        self.lines = self.functions = self.classes = self.parsed = 0
        self.longest: list[tuple[int, str, str]] = []
        self.refused: list[tuple[str, str]] = []
        self.sent_again: list[str] = []

    def take(self, path: Path, reply: Payload | Exception) -> None:
        """Take what became of a file's job; what is neither a reply nor a job error goes on to the caller."""
        name = str(path.relative_to(LIBRARY))
        if isinstance(reply, JobError):
            self.refused.append((name, str(reply).splitlines()[-1]))
            return
        if isinstance(reply, Exception):
            raise reply
        found: dict[str, Any] = json.loads(reply.body)
        self.parsed += 1
        self.lines += found["lines"]
        self.functions += found["functions"]
        self.classes += found["classes"]
        self.longest = heapq.nlargest(5, [*self.longest, (found["longest"], found["name"], name)])


async def examine(pool: Pool, files: list[Path], findings: Findings, progress: Progress) -> None:
    """Run a job for each file. Replies come in the order of the files, errors in their places."""
    payloads: Iterator[Payload] = map(make_job, files)
    async with pool.map(payloads, return_exceptions=True) as replies:
        for path in files:
            findings.take(path, await anext(replies))
            progress.step()


async def examine_and_kill(pool: Pool, path: Path, findings: Findings, progress: Progress) -> None:
    """Once a third is done, run the job of one file, and kill the worker in the middle of it; then send it again."""
    await progress.third.wait()
    name = str(path.relative_to(LIBRARY))
    reply: Payload | Exception | None = None
    while not isinstance(reply, WorkerCrashed):  # a kill that came too late hit no job
        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_under, pool, name)
            try:
                reply = await pool.exec(make_job(path), label=name)
            except (JobError, WorkerCrashed) as error:
                reply = error
            nursery.cancel_scope.cancel()
    findings.sent_again.append(name)
    progress.say(f"{type(reply).__name__}: {reply}\n{name} is sent again.")
    try:
        reply = await pool.exec(make_job(path), label=name)
    except JobError as error:
        reply = error
    findings.take(path, reply)
    progress.step()


async def kill_under(pool: Pool, name: str) -> None:
    """Kill the worker that runs the job of this name in the middle of it; its replacement comes by itself."""
    while True:
        for worker in pool.workers:
            job = worker.current
            if worker.pid is None or job is None or job.label != name:
                continue
            if trio.current_time() - job.started > 0.02:
                os.kill(worker.pid, signal.SIGKILL)
                return
        await trio.sleep(0.001)


async def main(limit: int | None) -> None:
    files = find_files(limit)
    largest = max(files, key=lambda path: path.stat().st_size)
    others = [path for path in files if path != largest]
    findings, progress = Findings(), Progress(len(files))
    start = time.monotonic()
    async with open_pool(CONFIG) as pool:
        print(f"{len(files):,} source files of {LIBRARY} go to {len(pool.workers)} workers.", flush=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(examine_and_kill, pool, largest, findings, progress)
            nursery.start_soon(examine, pool, others, findings, progress)
        statistics = pool.statistics()
    elapsed = time.monotonic() - start

    print(f"\n{findings.parsed:,} files, {findings.lines:,} lines, {findings.functions:,} functions, "
          f"{findings.classes:,} classes")  # fmt: skip
    print("The longest functions:")
    for length, function, name in findings.longest:
        print(f"{length:7,} lines  {function}  ({name})")
    if findings.refused:
        print(f"Not parsed, each a job error: {len(findings.refused)} files, such as")
        for name, why in findings.refused[:3]:
            print(f"    {name}: {why}")
    died, again = statistics.exits.get("crashed", 0), len(findings.sent_again)
    print(f"Workers: {statistics.starts} started, {died} died and replaced; jobs sent again: {again}")
    print(f"Elapsed: {elapsed:.1f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send the standard library's source files to a pool of workers.")
    parser.add_argument("--limit", type=int, metavar="N", help="only N files, evenly spread")
    options = parser.parse_args()
    # This program tells of the worker's death itself; without this line the pool's log would too.
    logging.getLogger("trio_workers").setLevel(logging.ERROR)
    interrupted = False
    try:
        trio.run(main, options.limit, restrict_keyboard_interrupt_to_checkpoints=True)
    except* KeyboardInterrupt:  # from inside a nursery it comes in a group
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one has nothing left to end
        interrupted = True
    if interrupted:
        print("\nInterrupted; no worker is left.")
        sys.exit(130)
