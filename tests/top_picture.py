"""The picture of `top` in the docs, of a real run: `python -m tests.top_picture` writes it anew."""

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from tests.support import ROOT, release
from trio_workers import Payload, Pool, WorkersError, open_pool
from trio_workers.cli._top_view import Rates, picture, render
from trio_workers.control import serve_control

PICTURE: Final = ROOT / "docs" / "_static" / "top.svg"
WIDTH: Final = 130
HEIGHT: Final = 13
LOOKS: Final = 5

PAGES: Final = ("render index", "render about", "render größe", "make thumbnail", "import orders")


async def call(pool: Pool, seed: int) -> None:
    """Have jobs done, of which one in a while costs its worker."""
    chance = random.Random(seed)
    while True:
        body = b"exit 3" if chance.random() < 0.02 else b"sleep %.2f" % chance.uniform(0.05, 0.4)
        with contextlib.suppress(WorkersError):
            await pool.exec(Payload(body), label=chance.choice(PAGES))


async def look(path: Path) -> dict[str, Any]:
    """Let `top --json` look at it for some seconds, and return the last it saw."""
    command = [sys.executable, "-m", "trio_workers", "top", "--json", "--socket", str(path)]
    process = await trio.lowlevel.open_process(
        command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.stdout is not None
    data = b""
    async with process.stdout:
        async for more in process.stdout:
            data += more
            if data.count(b"\n") >= LOOKS:
                break
    process.kill()
    await process.wait()
    facts: dict[str, Any] = json.loads(data.splitlines()[LOOKS - 1])
    return facts


async def main() -> None:
    """Run a pool, look at it, and draw what was seen."""
    with tempfile.TemporaryDirectory() as directory:
        config = release("one", num_workers=6, name="mill", max_executions=25)
        async with open_pool(config) as pool, trio.open_nursery() as nursery:
            path = await nursery.start(partial(serve_control, pool, path=Path(directory, "mill.sock")))
            for seed in range(5):
                nursery.start_soon(call, pool, seed)
            await trio.sleep(8)
            facts = await look(path)
            nursery.cancel_scope.cancel()
    rates = Rates(
        jobs=facts["rates"]["jobs"], cpu={int(pid): percent for pid, percent in facts["rates"]["cpu"].items()}
    )
    drawing = render(facts["status"], facts["workers"], rates, WIDTH, HEIGHT)
    PICTURE.write_text(picture(drawing, WIDTH, "trio-workers top"), encoding="utf-8")


if __name__ == "__main__":
    trio.run(main)
