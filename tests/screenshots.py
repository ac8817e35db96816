"""The pictures of docs/watching.md: ``python -m tests.screenshots`` draws them anew, from a pool at work.

It takes two and a half minutes, so that the curve has something to show.
"""

import itertools
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

import trio

from tests.chromium import open_browser
from tests.support import ROOT, until
from trio_workers import PythonPool, WorkersError, open_python_pool, serve_status

SECONDS: Final = 150
PICTURES: Final = ROOT / "docs" / "_static"

KINDS: Final = (("resize", 0.12), ("sharpen", 0.3), ("read text", 0.8))


def work(seconds: float) -> None:
    """A job: half of it computes, half of it waits."""
    end = time.perf_counter() + seconds / 2
    while time.perf_counter() < end:
        pass
    time.sleep(seconds / 2)


async def ask(pool: PythonPool, seconds: float, label: str) -> None:
    try:
        await pool.run_sync(work, seconds, label=label)
    except WorkersError as error:
        print(error, file=sys.stderr)


async def press(pool: PythonPool, chance: random.Random, nursery: trio.Nursery) -> None:
    """Ask for more and for less, in waves."""
    for number in itertools.count(4711):
        kind, seconds = chance.choices(KINDS, (6, 3, 1))[0]
        nursery.start_soon(ask, pool, seconds * chance.uniform(0.5, 1.5), f"{kind} IMG_{number}.jpg")
        load = 0.55 + 0.4 * math.sin(trio.current_time() / 14) + 0.15 * math.sin(trio.current_time() / 3)
        await trio.sleep(chance.expovariate(20 * max(load, 0.04)))


async def hurt(pool: PythonPool, chance: random.Random) -> None:
    """Kill a worker at its job now and then; and roll out once."""
    for seconds in (40, 35, 30):
        await trio.sleep(seconds)
        await until(lambda: pool.statistics().busy)
        os.kill(chance.choice([worker.pid for worker in pool.workers if worker.current is not None]), signal.SIGKILL)
        if seconds == 40:
            await pool.reset()


async def main() -> None:
    program = shutil.which("chromium")
    if program is None:
        raise SystemExit("the pictures need chromium, which is not on PATH")
    chance = random.Random(7)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        async with open_python_pool(5, name="thumbnails") as pool, trio.open_nursery() as nursery:
            (url,) = await nursery.start(serve_status, pool)
            async with open_browser(program, Path(directory)) as browser:
                await browser.look_as(1100, 900)
                await browser.go(url)
                nursery.start_soon(press, pool, chance, nursery)
                nursery.start_soon(hurt, pool, chance)
                await trio.sleep(SECONDS)
                for name, width, height, scheme in (
                    ("light", 1100, 840, "light"),
                    ("dark", 1100, 840, "dark"),
                    ("phone", 360, 780, "light"),
                ):
                    await browser.look_as(width, height, scheme, phone=name == "phone")
                    await browser.evaluate("new Promise(requestAnimationFrame)")
                    path = PICTURES / f"status-{name}.png"
                    await trio.Path(path).write_bytes(await browser.screenshot())
                    print(path.relative_to(ROOT), path.stat().st_size // 1024, "KB")
            nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(main)
