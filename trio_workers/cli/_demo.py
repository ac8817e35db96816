"""`trio-workers demo`: ten seconds of a pool whose workers die all the time, and of jobs that don't mind."""

import io
import math
import os
import random
import re
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Final

import attrs
import trio
from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from .._config import Config, Limits, Restart
from .._errors import JobError, WorkersError
from .._model import Payload, WorkerEvent
from .._pool import Pool
from .._watch import describe_pool, describe_workers
from .._worker import Worker
from ._errors import Misuse
from ._top_view import RateMeter, render
from ._watching import open_watched, run_trio

WORKER: Final = """
import os, random, signal, time
from trio_workers.child import serve

def handle(job):
    time.sleep(random.uniform(0.005, 0.05))
    chance = random.random()
    if chance < 0.006:
        os._exit(3)
    if chance < 0.010:
        os.kill(os.getpid(), signal.SIGKILL)
    if chance < 0.015:
        time.sleep(60)
    if chance < 0.03:
        raise ValueError("no such picture")
    return b"%d bytes" % len(job.body)

serve(handle)
"""
"""Jobs of some milliseconds; of a thousand six exit, four are killed, five hang, and fifteen are job errors."""

EXEC_TTL: Final = 1.0
"""Seconds after which a job that hangs is ended: so that some are, in ten seconds."""

MAX_EXECUTIONS: Final = 150
"""Jobs of a worker: so that some are replaced by plan as well."""

DRAW_EVERY: Final = 0.1
"""Seconds between two pictures in a terminal."""

SAY_EVERY: Final = 1.0
"""Seconds between two lines where there is none."""

_SVG: Final = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
"""The picture's frame, without the fonts that a browser would load from elsewhere."""

PICTURE_WIDTH: Final = 110
"""Cells of the picture in a file."""


def demo(
    *,
    seconds: float = 10.0,
    num_workers: int = 4,
    svg: Path | None = None,
) -> None:
    """Show a pool under load: workers crash, hang, come of age and are replaced, while jobs go on.

    Parameters
    ----------
    seconds
        For how long.
    num_workers
        How many workers.
    svg
        Draw a picture of it into this file, as it was after three quarters of the time.
    """
    if not 0 < seconds < math.inf:
        raise Misuse(f"--seconds must be more than 0 and finite, not {seconds:g}")
    if num_workers < 1:
        raise Misuse(f"--num-workers must be at least 1, not {num_workers}")
    if svg is not None and svg.is_dir():
        raise Misuse(f"--svg {svg}: is a directory")
    if svg is not None and not svg.absolute().parent.is_dir():
        raise Misuse(f"--svg {svg}: there is no directory {svg.absolute().parent}")
    console = Console(highlight=False)
    this = _Demo(seconds, num_workers, console, svg is not None)
    run_trio(this.run, lambda: f"interrupted after {sum(this.ended.values()):,} jobs")
    this.sum_up()
    if svg is not None:
        picture = Console(
            record=True, width=PICTURE_WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor"
        )
        picture.print(this.picture)
        try:
            svg.write_text(picture.export_svg(title="trio-workers demo", code_format=_SVG), encoding="utf-8")
        except OSError as error:
            raise Misuse(f"--svg {svg}: {error.strerror}") from None
        console.print(f"The picture is in {svg}.", markup=False, soft_wrap=True)  # a path in one piece


@attrs.define(eq=False)
class _Demo:
    """One showing."""

    seconds: float
    num_workers: int
    console: Console
    draws: bool
    ended: Counter[str] = attrs.field(factory=Counter[str])
    picture: RenderableType = ""
    _meter: RateMeter = attrs.field(factory=RateMeter)
    _exits: dict[str, int] = attrs.field(factory=dict[str, int])
    _deaths: list[str] = attrs.field(factory=list[str])
    _started: int = 0
    _replaced: int = 0

    async def run(self) -> None:
        """Open the pool, hand in jobs, and show it until the time is over."""
        # The worker finds this very package, installed or not.
        package = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
        config = Config(
            command=[sys.executable, "-c", WORKER],
            num_workers=self.num_workers,
            max_executions=MAX_EXECUTIONS,
            limits=Limits(exec_ttl=EXEC_TTL),
            restart=Restart(initial=0.05),
            env={"PYTHONPATH": paths},
            name="demo",
        )
        async with (
            open_watched(config, show=lambda _: None, observer=self._see) as pool,
            trio.open_nursery() as nursery,
        ):
            began = trio.current_time()
            for _ in range(self.num_workers + 2):
                nursery.start_soon(self._call, pool)
            if self.console.is_terminal:
                await self._live(pool, began)
            else:
                await self._lines(pool, began)
            now = pool.statistics()
            self._exits, self._started, self._replaced = dict(now.exits), now.starts, len(self._deaths)
            nursery.cancel_scope.cancel()

    def _see(self, event: WorkerEvent, worker: Worker | None, context: object) -> None:
        if event is WorkerEvent.DESTRUCT and worker is not None:
            self._deaths.append(f"worker {worker.pid} in slot {worker.slot} is replaced: {context}")

    async def _call(self, pool: Pool) -> None:
        while True:
            picture = f"picture {random.randrange(10_000)}"
            try:
                await pool.exec(Payload(b"x" * 1000), label=picture)
            except JobError:
                self.ended["failed"] += 1
            except WorkersError as error:
                self.ended[type(error).__name__] += 1
            else:
                self.ended["replied"] += 1
            await trio.sleep(random.uniform(0, 0.01))

    def _draw(self, pool: Pool, width: int) -> RenderableType:
        status, workers = describe_pool(pool), describe_workers(pool)
        rates = self._meter.see(status, workers, trio.current_time())
        last = [Text(one, style="dim", no_wrap=True, overflow="ellipsis") for one in self._deaths[-4:]]
        return Group(render(status, workers, rates, width, keys=False), Text(), *last)

    async def _live(self, pool: Pool, began: float) -> None:
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while (left := began + self.seconds - trio.current_time()) > 0:
                shown = self._draw(pool, self.console.width)
                live.update(shown, refresh=True)
                self._keep(pool, left)
                await trio.sleep(min(DRAW_EVERY, left))

    async def _lines(self, pool: Pool, began: float) -> None:
        said = trio.current_time()
        while (left := began + self.seconds - trio.current_time()) > 0:
            self._keep(pool, left)
            if trio.current_time() - said >= SAY_EVERY:
                said = trio.current_time()
                now = pool.statistics()
                jobs, busy, replaced = self.ended.total(), f"{now.busy} of {now.target}", len(self._deaths)
                self.console.print(
                    f"{said - began:4.0f} s: {jobs:,} jobs, {busy} workers busy, {replaced} replaced",
                    markup=False,
                )
            await trio.sleep(min(DRAW_EVERY, left))

    def _keep(self, pool: Pool, left: float) -> None:
        """Keep what the picture in a file shows: the pool in the middle of it, with the rates of a while before."""
        if self.draws and (left > self.seconds / 4 or not self.picture):
            self.picture = self._draw(pool, PICTURE_WIDTH)

    def sum_up(self) -> None:
        """Say how it went."""
        ended = self.ended
        print_ = partial(self.console.print, soft_wrap=True)
        print_(
            f"[bold]{ended.total():,} jobs[/bold] in {self.seconds:g} s on {self.num_workers} workers: "
            f"{ended['replied']:,} replied, {ended['failed']:,} were job errors, {ended['WorkerCrashed']:,} died with "
            f"their worker, {ended['JobTimeout']:,} hung and were ended."
        )
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self._exits.items()))
        print_(
            f"{self._started} workers were started, and {self._replaced} were replaced ({reasons or 'none'}).",
            markup=False,
        )
        others = {name: count for name, count in self.ended.items() if name not in _NAMED}
        if others:
            print_(f"Other errors: {others}", markup=False)


_NAMED: Final = ("replied", "failed", "WorkerCrashed", "JobTimeout")

__all__ = ["demo"]
