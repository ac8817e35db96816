"""`trio-workers run`: a pool in the shell, a job a line."""

import logging
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Final, Literal, cast

import attrs
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from .._config import Config
from .._model import Payload
from .._pool import Pool
from ._errors import DONE, FAILED, UNREAD, Misuse
from ._jobs import (
    STDIN,
    Output,
    ReaderGone,
    Ticket,
    check_inputs,
    format_json,
    parse_json,
    parse_line,
    read_jobs,
    say,
    size_of,
)
from ._settings import SEVERAL, SWITCH, PoolArguments, settle
from ._watching import check_watched, open_watched, run_trio, tell

SHOW_EVERY: Final = 0.2
"""Seconds between two drawings of the progress."""

JSON_ROOM: Final = 6
"""Bytes that one byte of a job may take in a line of JSON at most, as in `\\u0000`."""

Outcome = tuple[Ticket, Payload | Exception]
OnError = Literal["skip", "empty", "stop"]


def run(
    *command: str,
    input: Annotated[
        list[str] | None, Parameter(negative=(), consume_multiple=False, allow_leading_hyphen=True)
    ] = None,
    null: Annotated[bool, SWITCH] = False,
    jsonl: Annotated[bool, SWITCH] = False,
    unordered: Annotated[bool, SWITCH] = False,
    on_error: OnError = "skip",
    progress: bool | None = None,
    quiet: Annotated[bool, Parameter(name=["--quiet", "-q"], negative=(), show_default=False)] = False,
    watch: Annotated[list[Path] | None, SEVERAL] = None,
    control: Annotated[bool, Parameter(show_default=False)] = True,
    config: Path | None = None,
    pool: PoolArguments = None,
) -> int:
    """Make a pool here, send it a job for each line, and write the replies to stdout, in order.

    Errors and progress go to stderr. The exit code is 1 where a job failed.

    Parameters
    ----------
    command
        The worker program and its arguments, after --.
    input
        A file of jobs, - for stdin. May be given more than once; stdin alone by default.
    null
        Jobs and replies end with a NUL byte instead of a newline.
    jsonl
        Jobs and replies are JSON: {"body": "...", "context": "..."}; body_base64 and context_base64 hold any bytes.
    unordered
        Write each reply as soon as it is there.
    on_error
        What stands in the place of a failed job: nothing (skip), an empty line (empty), or the end of it all (stop).
    progress
        Show the progress on stderr; by default where that is a terminal, and stdout none.
    quiet
        Say nothing of failed jobs and of workers.
    watch
        Replace the workers when this file, or something in this directory, changes. May be given more than once.
    control
        Let trio-workers top, status, reset and resize find the pool; they do, unless --no-control is given.
    config
        A TOML file with the settings of the pool. Flags win over it.
    """
    if null and jsonl:
        raise Misuse("--null and --jsonl exclude each other: a line of JSON holds any byte as it is")
    settled = settle(command, pool, config)
    inputs = input or [STDIN]
    check_inputs(inputs)
    check_watched(watch or [])
    shown = progress if progress is not None else not quiet and sys.stderr.isatty() and not os.isatty(1)
    errors = Console(file=sys.stderr, highlight=False, markup=False, soft_wrap=True)
    this = _Run(
        config=settled,
        inputs=inputs,
        watched=watch or [],
        control=control,
        separator=b"\0" if null else b"\n",
        json=jsonl,
        ordered=not unordered,
        on_error=on_error,
        quiet=quiet,
        bar=_bar(errors) if shown else None,
    )
    if STDIN in inputs and not quiet and os.isatty(0) and sys.stderr.isatty():
        tell("jobs are read from this terminal, one a line; end them with Ctrl-D")
    with this.bar or nullcontext():
        try:
            run_trio(this.run, this.where)
        except ReaderGone:
            return UNREAD
    if this.failed and not quiet:
        tell(f"{this.failed:,} of {this.done:,} jobs failed")
    return FAILED if this.failed else DONE


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(bar_width=24),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    )


@attrs.define(eq=False)
class _Run:
    """One run of the command."""

    config: Config
    inputs: list[str]
    watched: list[Path]
    control: bool
    separator: bytes
    json: bool
    ordered: bool
    on_error: OnError
    quiet: bool
    bar: Progress | None
    done: int = 0
    failed: int = 0
    _read: int = 0
    _complaints: list[str] = attrs.field(factory=list[str])

    def where(self) -> str:
        """Say how far it got."""
        return f"interrupted after {self.done:,} jobs, {self.failed:,} of which failed"

    def say(self, text: str) -> None:
        """Show a line on stderr, above the progress."""
        if self.bar is not None:
            self.bar.console.print(f"trio-workers: {text}")
        else:
            tell(text)

    async def run(self) -> None:
        """Send all jobs, and write their replies."""
        output = Output(1)
        complaints = Output(2)
        lines = bytearray()
        level = logging.ERROR if self.quiet else logging.WARNING
        async with (
            open_watched(self.config, self.watched, level, self.say, control=self.control) as pool,
            aclosing(self._jobs()) as jobs,
            self._show_progress(pool),
            self._in_order(pool, jobs) if self.ordered else self._as_ready(pool, jobs) as batches,
        ):
            async for batch in batches:
                stop = False
                for ticket, outcome in batch:
                    stop = not self._note(ticket, outcome, lines)
                    if stop:
                        break
                if self._complaints and self.bar is None:
                    text = "".join(f"trio-workers: {one}\n" for one in self._complaints)
                    await complaints.write(text.encode("utf-8", "backslashreplace"))
                for one in self._complaints if self.bar is not None else ():
                    self.say(one)
                self._complaints.clear()
                if lines:
                    await output.write(lines)
                    lines.clear()
                if stop:
                    break

    def _note(self, ticket: Ticket, outcome: Payload | Exception, lines: bytearray) -> bool:
        """Put down what a job ended with, and say whether to go on."""
        self.done += 1
        failed = not isinstance(outcome, Payload)
        if self.json:
            lines += format_json(ticket, outcome)
            lines += self.separator
        elif isinstance(outcome, Payload):
            lines += outcome.body
            lines += self.separator
        elif self.on_error == "empty":
            lines += self.separator
        if failed:
            self.failed += 1
            if not self.quiet:
                assert isinstance(outcome, Exception)
                self._complaints.append(f"{ticket}: {ticket.wrong or say(outcome)}")
        return not failed or self.on_error != "stop"

    def _jobs(self) -> AsyncGenerator[tuple[Ticket, Payload | None]]:
        longest = self.config.max_frame_size
        if self.json:
            return read_jobs(self.inputs, self.separator, longest * JSON_ROOM + 1024, parse_json, self._note_read)
        return read_jobs(self.inputs, self.separator, longest, parse_line, self._note_read)

    def _note_read(self, size: int) -> None:
        self._read += size

    @asynccontextmanager
    async def _in_order(
        self, pool: Pool, jobs: AsyncIterator[tuple[Ticket, Payload | None]]
    ) -> AsyncGenerator[AsyncIterator[list[Outcome]]]:
        tickets: deque[Ticket] = deque()

        async def payloads() -> AsyncGenerator[Payload]:
            async for ticket, payload in jobs:
                tickets.append(ticket)
                # What can't be sent takes its place in the order all the same: the pool answers it with a TypeError.
                yield cast("Payload", payload)

        async def batches(results: AsyncIterator[list[Payload | Exception]]) -> AsyncGenerator[list[Outcome]]:
            async for some in results:
                yield [(tickets.popleft(), one) for one in some]

        async with (
            pool.map(payloads(), return_exceptions=True) as results,
            aclosing(batches(results.batches())) as outcomes,
        ):
            yield outcomes

    @asynccontextmanager
    async def _as_ready(
        self, pool: Pool, jobs: AsyncIterator[tuple[Ticket, Payload | None]]
    ) -> AsyncGenerator[AsyncIterator[list[Outcome]]]:
        # Not `pool.map(ordered=False)`, whose results don't say whose they are.
        give, outcomes = trio.open_memory_channel[Outcome](0)
        turn = trio.Lock()

        async def work(give: trio.MemorySendChannel[Outcome]) -> None:
            async with give:
                while True:
                    async with turn:
                        job = await anext(jobs, None)
                    if job is None:
                        return
                    ticket, payload = job
                    outcome: Payload | Exception
                    try:
                        outcome = await pool.exec(cast("Payload", payload))
                    except trio.ClosedResourceError:
                        raise
                    except Exception as error:
                        outcome = error
                    await give.send((ticket, outcome))

        async def batches() -> AsyncGenerator[list[Outcome]]:
            async for one in outcomes:
                batch = [one]
                while len(batch) < width:
                    try:
                        batch.append(outcomes.receive_nowait())
                    except (trio.WouldBlock, trio.EndOfChannel):
                        break
                yield batch

        config = self.config
        width = max(config.num_workers, config.max_workers or 0) * config.read_ahead
        async with trio.open_nursery() as nursery:
            async with give:
                for _ in range(width):
                    nursery.start_soon(work, give.clone())
            async with aclosing(batches()) as found:
                yield found
            nursery.cancel_scope.cancel()

    @asynccontextmanager
    async def _show_progress(self, pool: Pool) -> AsyncGenerator[None]:
        bar = self.bar
        if bar is None:
            yield
            return
        task = bar.add_task("", total=size_of(self.inputs), text="")

        def draw() -> None:
            now = pool.statistics()
            elapsed = trio.current_time() - began
            failed = f", {self.failed:,} failed" if self.failed else ""
            rate = self.done / max(elapsed, 0.001)
            text = f"{self.done:,} jobs{failed}, {rate:,.0f}/s, {now.busy} of {now.target} workers busy"
            bar.update(task, completed=self._read, text=text)
            bar.refresh()

        async def redraw() -> None:
            while True:
                draw()
                await trio.sleep(SHOW_EVERY)

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(redraw)
            yield
            nursery.cancel_scope.cancel()


__all__ = ["run"]
