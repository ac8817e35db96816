"""The page in a browser: what it shows, that it is live, and that it can be read by everybody."""

import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route

from tests.chromium import Browser, ChromiumError, open_browser
from tests.support import release, require, until
from trio_workers import Payload, Pool, _status_server, open_pool, serve_status, status_app

pytestmark = pytest.mark.limit(240)  # a browser takes seconds to come up, and more on a loaded machine

TOKEN: Final = "a-token-that-has-no-spaces"

NOTHING: Final = "\N{EN DASH}"
"""What stands in a cell where there is nothing to be said."""

CELLS: Final = "[...document.querySelectorAll('#workers tr')].map(row => [...row.cells].map(cell => cell.textContent))"

LEAST_CONTRAST: Final = """
(() => {
  const light = ([red, green, blue]) => [red, green, blue]
    .map(part => part / 255).map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((all, part, index) => all + part * [0.2126, 0.7152, 0.0722][index], 0);
  const numbers = text => text.match(/[0-9.]+/g).map(Number);
  const behind = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = numbers(getComputedStyle(one).backgroundColor);
      if (color.length < 4 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  let least = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("script, style, noscript, [hidden]")) continue;
    const one = light(numbers(getComputedStyle(element).color)), other = light(behind(element));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (ratio < least[0]) least = [ratio, element.tagName + " " + element.id + " " + element.className];
  }
  return least;
})()
"""
"""The least contrast between a text and what is behind it, and where: by the formula of WCAG 2."""

WIDEST: Final = """
(() => {
  const width = document.documentElement.clientWidth;
  return [...document.querySelectorAll("body *")].filter(element => !element.closest("thead, svg"))
    .filter(element => element.getBoundingClientRect().right > width + 0.5)
    .map(element => element.tagName + " " + element.id + " " + element.className);
})()
"""
"""What reaches beyond the right edge."""


@asynccontextmanager
async def looked_at(pool: Pool, directory: Path, **more: Any) -> AsyncIterator[tuple[Browser, str]]:
    """Serve a pool, and open its page in a browser."""
    program = require("chromium")
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve_status, pool, **more))
        async with open_browser(program, directory) as browser:
            await browser.look_as(1100, 900)
            await browser.go(url)
            await browser.until("document.querySelectorAll('#workers tr').length")
            yield browser, url
            nursery.cancel_scope.cancel()


async def test_page_is_live(tmp_path: Path) -> None:
    """Rows of the workers; a kill is seen without a reload; a label is text; and the console has no complaint."""
    label = "<script>document.title='caught'</script><img src=x onerror=alert(1)>"
    async with open_pool(release("1", name="mill")) as pool, looked_at(pool, tmp_path) as (browser, _):
        rows = await browser.evaluate(CELLS)
        assert [row[:3] for row in rows] == [[str(worker.slot), str(worker.pid), "idle"] for worker in pool.workers]
        assert await browser.evaluate("document.getElementById('pool').textContent") == "mill"
        assert await browser.evaluate("document.getElementById('ready').textContent") == "ready"
        await browser.until("document.getElementById('connection').textContent === 'live'")
        assert [(row[8], row[9]) for row in rows] == [("0", NOTHING)] * 2

        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(exec_until_killed, pool, label=label))
            await until(lambda: pool.statistics().busy)
            shown = json.dumps(label)
            await browser.until(f"{CELLS}.some(row => row[2] === 'busy' && row[4].startsWith({shown} + ' · '))")
            busy = next(worker for worker in pool.workers if worker.current is not None)
            assert busy.pid is not None
            os.kill(busy.pid, signal.SIGKILL)
        await browser.until(f"{CELLS}.some(row => row[8] === '1' && row[9].startsWith('crashed · '))")
        await browser.until("document.querySelectorAll('#deaths li').length === 1")
        death = await browser.evaluate("document.querySelector('#deaths li').textContent")
        assert f"slot {busy.slot} · pid {busy.pid}" in death
        assert "was killed by SIGKILL" in death
        assert label in death
        assert await browser.evaluate("document.querySelectorAll('main script, main img').length") == 0

        for _ in range(20):
            await pool.exec(Payload(b"say"))
        await browser.until("document.getElementById('total').textContent === '21'")
        await browser.until("parseFloat(document.getElementById('rate').textContent) > 0")
        await browser.until("document.querySelector('#chart .curve').getAttribute('d').includes('L')")
        assert await browser.evaluate("document.title") == f"mill {NOTHING} trio_workers"
        assert browser.complaints == []


async def exec_until_killed(pool: Pool, label: str) -> None:
    with pytest.raises(Exception, match="was killed by SIGKILL"):
        await pool.exec(Payload(b"hang"), label=label)


async def test_page_on_every_screen(tmp_path: Path) -> None:
    """On a telephone nothing reaches beyond the edge; light and dark, every text stands out from what is behind it."""
    config = release("1", name="a-pool-with-a-name-that-is-longer-than-a-telephone-is-wide", num_workers=3)
    label = "a/path/with/no/place/to/break/" * 10
    async with open_pool(config) as pool, looked_at(pool, tmp_path, token=TOKEN) as (browser, _):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(exec_until_killed, pool, label=label))
            await until(lambda: pool.statistics().busy)
            await browser.until(f"{CELLS}.some(row => row[2] === 'busy')")
            busy = next(worker for worker in pool.workers if worker.current is not None)
            assert busy.pid is not None
            os.kill(busy.pid, signal.SIGKILL)
        await browser.until("document.querySelectorAll('#deaths li').length === 1")
        await until(lambda: pool.statistics().idle == 3)
        await pool.reset()
        await browser.until("document.querySelectorAll('#deaths li').length === 4")
        pictures: set[bytes] = set()
        for width, height in ((360, 740), (820, 1180), (1100, 900), (2000, 1100)):
            for scheme in ("light", "dark"):
                await browser.look_as(width, height, scheme, phone=width == 360)
                assert await browser.evaluate("innerWidth") == width
                assert await browser.evaluate("document.documentElement.scrollWidth") <= width
                assert await browser.evaluate(WIDEST) == []
                ratio, where = await browser.evaluate(LEAST_CONTRAST)
                assert ratio >= 4.5, where
                picture = await browser.screenshot()
                assert picture.startswith(b"\x89PNG")
                pictures.add(picture)
        assert len(pictures) == 8
        assert browser.complaints == []


async def test_page_can_be_read_aloud(tmp_path: Path) -> None:
    """The table is one for those who can't see it, on a telephone too; only the state is announced by itself."""
    async with open_pool(release("1")) as pool, looked_at(pool, tmp_path) as (browser, _):
        for width in (1100, 360):
            await browser.look_as(width, 900)
            await browser.ask("Accessibility.enable")
            nodes = (await browser.ask("Accessibility.getFullAXTree"))["nodes"]
            roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
            names = {
                node["name"]["value"]
                for node in nodes
                if not node["ignored"] and node["role"]["value"] == "columnheader"
            }
            assert roles.count("table") == 1
            assert roles.count("rowheader") == 2
            assert {"slot", "pid", "state", "current job", "last death"} <= names
            assert roles.count("status") == 1
            assert "main" in roles
        assert await browser.evaluate("document.documentElement.lang") == "en"
        assert browser.complaints == []


async def test_turning_from_the_page(tmp_path: Path) -> None:
    """Under a path of another application, with the token of the application; it is nowhere stored."""
    program = require("chromium")
    async with open_pool(release("1", num_workers=1)) as pool, trio.open_nursery() as nursery:
        app = Starlette(routes=[Mount("/pools/mill", app=status_app(pool, token=TOKEN))])
        (url,) = await nursery.start(partial(_status_server.serve_app, app, "127.0.0.1", 0))
        async with open_browser(program, tmp_path) as browser:
            await browser.go(f"{url}/pools/mill")
            await browser.until("document.querySelectorAll('#workers tr').length === 1")
            assert await browser.evaluate("document.getElementById('control').hidden") is False
            pid = pool.workers[0].pid

            said = "document.getElementById('answer').textContent"
            await browser.evaluate("document.getElementById('token').value = 'wrong'")
            await browser.evaluate("document.getElementById('reset').click()")
            await browser.until(f"{said}.startsWith('not done: this takes the token')")
            assert [worker.pid for worker in pool.workers] == [pid]
            # The browser itself notes each answer that is an error.
            await until(lambda: browser.complaints)
            assert "401" in browser.complaints.pop()

            await browser.evaluate(f"document.getElementById('token').value = '{TOKEN}'")
            await browser.evaluate("document.getElementById('reset').click()")
            await browser.until(f"{said} === 'done: reset'")
            assert pool.workers[0].pid != pid
            await browser.evaluate("document.getElementById('to').value = '2'")
            await browser.evaluate("document.getElementById('resize').click()")
            await browser.until(f"{said} === 'done: resize to 2'")
            await browser.until("document.querySelectorAll('#workers tr').length === 2")
            assert await browser.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0
            assert browser.complaints == []
        nursery.cancel_scope.cancel()


async def test_no_buttons_without_a_token(tmp_path: Path) -> None:
    """Where the application gave no token there is nothing to press."""
    async with open_pool(release("1")) as pool, looked_at(pool, tmp_path) as (browser, _):
        assert await browser.evaluate("document.getElementById('control').hidden") is True


async def test_connection_lost_and_found(tmp_path: Path) -> None:
    """When the server goes the page says so and keeps what it had; when it is back the page goes on by itself."""
    program = require("chromium")
    connection = "document.getElementById('connection').textContent"
    async with (
        open_pool(release("1", num_workers=1)) as pool,
        trio.open_nursery() as outer,
        open_browser(program, tmp_path) as browser,
    ):
        async with trio.open_nursery() as nursery:
            # Of 127/8 an address of our own, on which nobody else is given the port before it is bound again.
            host = f"127.77.{os.getpid() % 250 + 1}.1" if sys.platform == "linux" else "127.0.0.1"
            (url,) = await nursery.start(serve_status, pool, f"{host}:0")
            await browser.go(url)
            await browser.until(f"{connection} === 'live'")
            await browser.until("document.querySelectorAll('#workers tr').length === 1")
            nursery.cancel_scope.cancel()
        await browser.until(f"{connection}.includes('trying again; this is from ')")
        assert await browser.evaluate("document.querySelectorAll('#workers tr').length") == 1
        await pool.resize(2)
        await outer.start(serve_status, pool, url.removeprefix("http://"))
        await browser.until(f"{connection} === 'live'")
        await browser.until("document.querySelectorAll('#workers tr').length === 2")
        outer.cancel_scope.cancel()


async def test_not_ready_and_closed(tmp_path: Path) -> None:
    """Why no job would be accepted is on the page, and that the pool is closed, while the server still answers."""
    program = require("chromium")
    async with trio.open_nursery() as nursery, open_browser(program, tmp_path) as browser:
        async with open_pool(release("1", num_workers=1, max_queue=0)) as pool:
            (url,) = await nursery.start(serve_status, pool)
            await browser.go(url)
            await browser.until("document.getElementById('ready').textContent === 'ready'")
            async with trio.open_nursery() as jobs:
                jobs.start_soon(pool.exec, Payload(b"hang"))
                await browser.until("document.getElementById('ready').textContent === 'not ready'")
                reason = await browser.evaluate("document.getElementById('trouble').textContent")
                assert reason == "the queue is full: 0 callers wait, and max_queue is 0"
                jobs.cancel_scope.cancel()
            await browser.until("document.getElementById('ready').textContent === 'ready'")
        await browser.until("document.getElementById('ready').textContent === 'closed'")
        await browser.until("document.getElementById('connection').textContent.includes('nothing more will come')")
        assert browser.complaints == []
        nursery.cancel_scope.cancel()


async def test_another_site_sees_nothing(tmp_path: Path) -> None:
    """A page of another origin in the same browser can neither read the status, nor frame it, nor turn the pool."""

    async def evil_page(_: Request) -> HTMLResponse:
        return HTMLResponse("<title>evil</title><body>")

    async with (
        open_pool(release("1")) as pool,
        looked_at(pool, tmp_path, token=TOKEN) as (browser, url),
        trio.open_nursery() as nursery,
    ):
        evil = Starlette(routes=[Route("/", evil_page)])
        (elsewhere,) = await nursery.start(partial(_status_server.serve_app, evil, "127.0.0.1", 0))
        await browser.go(elsewhere)
        assert await browser.evaluate("document.title") == "evil"
        for what in ("status", "events", "ready"):
            with pytest.raises(ChromiumError, match="Failed to fetch"):
                await browser.evaluate(f"fetch('{url}/{what}').then(answer => answer.text())")
            with pytest.raises(ChromiumError, match="Failed to fetch"):  # it would have sent no Origin
                await browser.evaluate(f"fetch('{url}/{what}', {{mode: 'no-cors'}}).then(answer => answer.text())")
        pids = [worker.pid for worker in pool.workers]
        with pytest.raises(ChromiumError, match="Failed to fetch"):
            await browser.evaluate(f"fetch('{url}/reset', {{method: 'POST', mode: 'no-cors'}})")
        assert [worker.pid for worker in pool.workers] == pids
        await until(lambda: any("NotSameOrigin" in complaint for complaint in browser.complaints))
        framed = (
            "new Promise(done => {"
            f"const frame = document.createElement('iframe'); frame.src = '{url}';"
            "frame.onload = () => done(frame.contentDocument === null); document.body.append(frame) })"
        )
        assert await browser.evaluate(framed) is True
        await until(lambda: any("frame-ancestors" in complaint for complaint in browser.complaints))
        nursery.cancel_scope.cancel()


async def test_a_name_that_was_made_to_lead_here(tmp_path: Path) -> None:
    """By a foreign name that leads to this machine nothing is seen, until the application knows the name."""
    async with open_pool(release("1")) as pool, trio.open_nursery() as nursery:
        async with looked_at(pool, tmp_path / "1") as (browser, url):
            await browser.go(url.replace("127.0.0.1", "evil.example"))
            said = await browser.evaluate("document.body.textContent")
            assert json.loads(said)["error"].startswith("this is not evil.example: ")
            await until(lambda: any("421" in complaint for complaint in browser.complaints))
        (url,) = await nursery.start(partial(serve_status, pool, hosts=["pool.example"]))
        async with open_browser(require("chromium"), tmp_path / "2") as browser:
            await browser.go(url.replace("127.0.0.1", "pool.example"))
            await browser.until("document.getElementById('connection').textContent === 'live'")
        nursery.cancel_scope.cancel()
