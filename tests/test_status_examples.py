"""The example of docs/watching.md, run as a reader runs it."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.support import ROOT

TOKEN: Final = "a-token-that-has-no-spaces"
PAGE: Final = ROOT / "docs" / "watching.md"


@pytest.fixture
def url() -> Iterator[str]:
    """Run it, and end it as a supervisor does; it says nothing but what the page shows, and leaves nothing."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", "status.py", "127.0.0.1:0"],
        cwd=ROOT / "docs" / "examples",
        env={**os.environ, "PYTHONPATH": str(ROOT), "STATUS_TOKEN": TOKEN},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            found = re.fullmatch(r"Look at (http://127\.0\.0\.1:\d+)\n", process.stdout.readline())
            assert found is not None
            yield found[1]
            process.send_signal(signal.SIGTERM)
            assert process.communicate() == ("Stopped; no worker is left.\n", "")
            assert process.returncode == 0
        finally:
            process.kill()


def ask(url: str, data: bytes | None = None, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_status(url: str) -> None:
    """What the page asks with curl is answered so."""
    assert ask(f"{url}/ready") == (200, {"ready": True, "reason": None})
    status, told = ask(f"{url}/status")
    assert (status, told["status"]["pool"], len(told["workers"])) == (200, "numbers", 2)
    assert ask(f"{url}/resize", b'{"to": 3}')[0] == 401
    bearer = f"Bearer {TOKEN}"
    assert ask(f"{url}/resize", b'{"to": 3}', Authorization=bearer) == (200, {"ok": True, "done": "resize", "to": 3})
    assert len(ask(f"{url}/status")[1]["workers"]) == 3


def test_fields_of_the_page() -> None:
    """Each path that the page names is one that there is, and each that there is is named."""
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(?:GET|POST) (/\w*)` \|", text, re.MULTILINE))
    source = (ROOT / "trio_workers" / "_status_app.py").read_text(encoding="utf-8")
    assert named == set(re.findall(r'Route\("(/\w*)"', source))
