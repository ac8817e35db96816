"""`top`: a pool in the terminal, live."""

import json as json_lines
import math
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Final

import trio
from cyclopts import Parameter
from rich.console import Console

from .._control_protocol import MOST_WORKERS
from .._watch import PoolFact, WorkerFact
from ._errors import DONE, FAILED, INTERRUPTED, CommandError, Misuse
from ._keys import KeyReader, Screen
from ._reach import Link, Lost, PoolOption, SocketOption, ended_well, find, print_facts, run
from ._top_view import Drawing, RateMeter, Rates, draw, duration

NOTE_FOR: Final = 5.0
"""Seconds that a note stays."""
SILENT_AFTER: Final = 3.0
"""Seconds without an answer, beyond the interval, that are told."""
MOST_AHEAD: Final = 8
"""Workers that are asked for beyond what the pool was last seen to be set to, for a key that is held down."""
TERMINATED: Final = 128 + signal.SIGTERM
HUNG_UP: Final = 128 + signal.SIGHUP


def top(
    *,
    socket: SocketOption = None,
    pool: PoolOption = None,
    interval: Annotated[float, Parameter(help="Seconds from one look to the next, 0.1 to 3600.")] = 1.0,
    json: Annotated[
        bool, Parameter(help="A JSON document a line and look, in place of the table.", negative="")
    ] = False,
) -> int:
    """Show a pool and its workers live in the terminal: a row a worker.

    Keys: r resets the pool, + and - resize it by one, arrows scroll, q quits, ? tells them all.
    """
    if not 0.1 <= interval <= 3600:
        raise Misuse(f"--interval is 0.1 to 3600 seconds, not {interval:g}")
    if json:
        return run(_tell, socket, pool, interval)
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Misuse("top needs a terminal, for keys and table; elsewhere take: trio-workers status, or top --json")
    if (kind := os.environ.get("TERM", "")) in {"", "dumb", "unknown"}:
        raise Misuse(f"top can't draw in a terminal of the kind TERM={kind!r}; take: trio-workers status")
    code, said = run(_show, socket, pool, interval)
    if said:
        if code == FAILED:
            raise CommandError(said)
        print(said)
    return code


async def _tell(socket: Path | None, pool: str | None, interval: float) -> int:
    path = await find(socket, pool)
    meter = RateMeter()
    async with Link(path) as link:
        status, workers = await link.look_soon()
        try:
            while True:
                rates = meter.see(status, workers, trio.current_time())
                cpu = {str(pid): round(percent, 1) for pid, percent in rates.cpu.items()}
                facts = {"status": status, "workers": workers, "rates": {"jobs": rates.jobs, "cpu": cpu}}
                print_facts(json_lines.dumps(facts))
                await trio.sleep(interval)
                status, workers = await link.look()
        except Lost as lost:
            if await ended_well(path, status):
                return DONE
            raise CommandError(f"{lost}; {who_was_there(status)}") from None


async def _show(socket: Path | None, pool: str | None, interval: float) -> tuple[int, str]:
    path = await find(socket, pool)
    async with Link(path) as link:
        status, workers = await link.look_soon()
        return await _Top(link, path, interval, status, workers).run()


def who_was_there(status: PoolFact) -> str:
    """Say whose connection was lost."""
    return f"the pool {status['pool']!r} was of process {status['pid']}"


class _Top:
    """One run of `top`. Its tasks tell each other by `_changed` that there is something to draw."""

    def __init__(self, link: Link, path: Path, interval: float, status: PoolFact, workers: list[WorkerFact]) -> None:
        self._link = link
        self._path = path
        self._interval = interval
        self._meter = RateMeter()
        self._status = status
        self._workers = workers
        self._rates = Rates()
        self._answered = trio.current_time()
        self._screen = Screen(sys.stdin.fileno(), sys.stdout.fileno())
        self._changed = trio.Event()
        self._look_now = trio.Event()
        self._help = False
        self._first = 0
        self._room = 1
        self._note = ""
        self._note_until = -math.inf
        self._wanted: int | None = None
        """How many workers were asked for, until a look has shown the outcome."""
        self._resizing: trio.CancelScope | None = None
        self._resetting = False
        self._end: tuple[int, str] = (DONE, "")
        self._take(status, workers)

    async def run(self) -> tuple[int, str]:
        """Show it until a key, a signal or the pool's end, and return the exit code and what is to be said."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGWINCH, signal.SIGTSTP, signal.SIGCONT)
        try:
            with trio.open_signal_receiver(*signals) as arriving:
                self._screen.enter()
                async with trio.open_nursery() as nursery:
                    self._nursery = nursery
                    nursery.start_soon(self._hear, arriving)
                    nursery.start_soon(self._read_keys)
                    nursery.start_soon(self._look)
                    nursery.start_soon(self._tick)
                    nursery.start_soon(self._draw)
        finally:
            self._screen.leave()
        return self._end

    def _finish(self, code: int, said: str = "") -> None:
        self._end = code, said
        self._nursery.cancel_scope.cancel()

    # what the pool says

    def _take(self, status: PoolFact, workers: list[WorkerFact]) -> None:
        self._status, self._workers = status, workers
        self._answered = trio.current_time()
        self._rates = self._meter.see(status, workers, self._answered)
        self._changed.set()

    async def _look(self) -> None:
        while True:
            try:
                while True:
                    with trio.move_on_after(self._interval):
                        await self._look_now.wait()
                    self._look_now = trio.Event()
                    settled = self._resizing is None
                    self._take(*await self._link.look())
                    if settled and self._resizing is None:
                        self._wanted = None
            except Lost as lost:
                if await ended_well(self._path, self._status):
                    self._finish(DONE, f"the pool {self._status['pool']!r} has ended")
                    return
                try:
                    await self._link.again()
                except CommandError:
                    self._finish(FAILED, f"{lost}; {who_was_there(self._status)}")
                    return

    async def _tick(self) -> None:
        """Let notes come and go with time."""
        while True:
            await trio.sleep(0.5)
            now = trio.current_time()
            if now > self._note_until and self._note:
                self._note = ""
                self._changed.set()
            if now - self._answered > self._interval + SILENT_AFTER:
                self._changed.set()

    def _say(self, note: str, seconds: float = NOTE_FOR) -> None:
        self._note, self._note_until = note, trio.current_time() + seconds
        self._changed.set()

    # who looks

    async def _hear(self, arriving: AsyncIterator[int]) -> None:
        async for number in arriving:
            if number == signal.SIGINT:
                self._finish(INTERRUPTED)
            elif number == signal.SIGTERM:
                self._finish(TERMINATED)
            elif number == signal.SIGHUP:
                self._finish(HUNG_UP)
            elif number == signal.SIGTSTP:
                self._stop()
            self._changed.set()

    def _stop(self) -> None:
        """Do what Ctrl-Z asks for, with the terminal given back meanwhile."""
        self._screen.leave()
        # The kernel's own way, which stops nothing where no shell could let it go on.
        ours = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        try:
            os.kill(os.getpid(), signal.SIGTSTP)
        finally:
            signal.signal(signal.SIGTSTP, ours)
        self._screen.enter()
        self._look_now.set()

    async def _read_keys(self) -> None:
        reader = KeyReader()
        while data := await self._screen.read():
            for key in reader.receive(data):
                self._press(key)
            self._changed.set()
        self._finish(HUNG_UP)

    def _press(self, key: str) -> None:
        page = max(1, self._room - 1)
        steps = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -page, "page down": page}
        if key in {"q", "Q"}:
            self._finish(DONE)
        elif key in {"?", "h"}:
            self._help = not self._help
        elif key == "r":
            if self._resetting:
                self._say("a reset is under way already")
            else:
                self._resetting = True
                self._nursery.start_soon(self._reset)
        elif key in {"+", "-"}:
            self._resize_by(1 if key == "+" else -1)
        elif key == "home":
            self._first = 0
        elif key == "end":
            self._first = len(self._workers)
        elif key in steps:
            self._first = max(0, self._first + steps[key])

    # what is asked for, each on a connection of its own: it may take as long as the longest job

    async def _reset(self) -> None:
        try:
            await self._ask_for("reset", "reset")
        finally:
            self._resetting = False

    def _resize_by(self, step: int) -> None:
        target = self._status["target"]
        wanted = (target if self._wanted is None else self._wanted) + step
        if wanted < 1:
            self._say("a pool has at least one worker")
        elif wanted > MOST_WORKERS:
            self._say(f"a control socket makes it {MOST_WORKERS} workers at most")
        elif abs(wanted - target) > MOST_AHEAD:
            self._say(f"a change to {self._wanted} workers is under way already")
        else:
            # The one before is no longer waited for; its request was sent before this one's connection is made, or
            # never is, so the pool hears them in this order.
            if self._resizing is not None:
                self._resizing.cancel()
            self._wanted = wanted
            self._resizing = trio.CancelScope()
            self._nursery.start_soon(self._resize, wanted, self._resizing)

    async def _resize(self, wanted: int, scope: trio.CancelScope) -> None:
        try:
            with scope:
                await self._ask_for(f"resize {wanted}", f"resize to {wanted}")
        finally:
            if self._resizing is scope:
                self._resizing = None

    async def _ask_for(self, request: str, name: str) -> None:
        self._say(f"{name}: under way", math.inf)
        started = trio.current_time()
        try:
            async with Link(self._path) as link:
                await link.turn(request)
        except CommandError as error:
            self._say(f"{name}: {error}", 3 * NOTE_FOR)
        else:
            self._say(f"{name}: done in {duration(trio.current_time() - started)}")
        self._look_now.set()

    # what is seen

    async def _draw(self) -> None:
        size = (0, 0)
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            before, size = size, self._screen.size()
            clear = b"\x1b[2J" if before != size else b""
            try:
                await self._screen.write(clear + self._frame(*size))
            except OSError:
                self._finish(HUNG_UP)
                return

    def _frame(self, width: int, height: int) -> bytes:
        silence = trio.current_time() - self._answered
        note = self._note
        if silence > self._interval + SILENT_AFTER:
            note = f"the pool has not answered for {duration(silence)}; what you see is as old"
        drawing = draw(
            self._status, self._workers, self._rates, width, height,
            first=self._first, help=self._help, note=note,
        )  # fmt: skip
        self._first, self._room = drawing.first, drawing.room
        return paint(drawing, width, height)


def paint(drawing: Drawing, width: int, height: int) -> bytes:
    """Write a drawing as a terminal is told it, from its first line on."""
    console = Console(
        force_terminal=True,
        width=width,
        height=height,
        markup=False,
        emoji=False,
        highlight=False,
        legacy_windows=False,
    )
    lines: list[str] = []
    for line in drawing.lines[:height]:
        with console.capture() as capture:
            console.print(line, end="", no_wrap=True, overflow="crop", crop=True)
        # After a line that is full the cursor still stands on its last letter, which must not be rubbed out.
        lines.append(capture.get() + "\x1b[K" * (line.cell_len < width))
    below = "\r\n\x1b[J" * (len(lines) < height)
    text = "\x1b[H" + "\r\n".join(lines) + below
    return text.encode(sys.stdout.encoding or "utf-8", "replace")


__all__ = ["paint", "top"]
