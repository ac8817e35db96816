"""A pool to look at: `trio-workers demo`."""

import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

import pytest

from tests.support import ROOT
from trio_workers.cli import main
from trio_workers.cli._demo import WORKER

ENVIRONMENT: Final = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}


def test_plain_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """Where there is no terminal: a line a second, and a sum that is right."""
    assert main(["demo", "--seconds", "2.5", "--num-workers", "2"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    *lines, jobs, workers = out.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(re.fullmatch(r" +\d+ s: [\d,]+ jobs, \d of \d workers busy, \d+ replaced", line) for line in lines)
    numbers = [int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", jobs.replace(" in 2.5 s on 2", ""))]
    assert numbers[0] == sum(numbers[1:]) > 0
    assert re.fullmatch(r"\d+ workers were started, and \d+ were replaced \(.+\)\.", workers)


def test_live_in_a_terminal() -> None:
    """In one: the table of `top`, drawn again and again, and the sum at the end."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    command = [sys.executable, "-m", "trio_workers", "demo", "--seconds", "2", "--num-workers", "3"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 1 << 16)
        except OSError:  # Linux says so where the other end is closed
            break
    os.close(ours)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert text.count("3 workers") > 3
    assert "jobs/s" in text
    assert "picture " in text
    assert "workers were started" in text


def test_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With --svg the picture of the README is drawn."""
    file = tmp_path / "demo.svg"
    assert main(["demo", "--seconds", "3", "--num-workers", "2", "--svg", str(file)]) == 0
    assert f"The picture is in {file}." in capfd.readouterr().out
    assert b"font-face" not in file.read_bytes()  # it loads nothing from elsewhere
    root = ElementTree.parse(file).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    text = "".join(root.itertext()).replace("\xa0", " ")
    assert "trio-workers demo" in text
    assert "2 workers" in text
    assert "jobs/s" in text


def test_ctrl_c() -> None:
    """Ctrl-C ends it with one line and exit code 130."""
    command = [sys.executable, "-m", "trio_workers", "demo", "--seconds", "1000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert re.match(rb" +[1-9]\d* s: ", process.stdout.readline())
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert re.fullmatch(rb"trio-workers: interrupted after \d+ jobs\n", err)


MISUSED: Final = {
    ("--seconds", "0"): "--seconds must be more than 0 and finite, not 0",
    ("--num-workers", "0"): "--num-workers must be at least 1, not 0",
    ("--svg", "/nowhere/demo.svg"): "--svg /nowhere/demo.svg: there is no directory /nowhere",
    ("--svg", "/"): "--svg /: is a directory",
    ("php",): "not understood here: 'php'; trio-workers demo --help says what is",
}


@pytest.mark.parametrize("arguments", MISUSED, ids=" ".join)
def test_misuse(arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and exit code 2."""
    assert main(["demo", *arguments]) == 2
    assert capfd.readouterr() == ("", f"trio-workers: {MISUSED[arguments]}\n")


def test_it_shows_what_it_says() -> None:
    """The worker has each way to end that the summary counts."""
    assert all(what in WORKER for what in ("os._exit", "SIGKILL", "time.sleep(60)", "raise ValueError"))
