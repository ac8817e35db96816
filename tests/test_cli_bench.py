"""A worker program measured: `trio-workers bench`."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.support import ROOT, until
from trio_workers.cli import main
from trio_workers.cli._bench import ROWS, bars, histogram, span, summary

WORKER: Final = """
import os, sys
from trio_workers.child import serve

def handle(job):
    with open(sys.argv[1], "ab", 0) as note:
        note.write(b"%d\\n" % len(job.body))
    if job.body == b"fail" or (job.body == b"half" and os.path.getsize(sys.argv[1]) % 2):
        raise ValueError("no such picture")
    if job.body == b"crash":
        os._exit(3)
    return job.body

serve(handle)
"""


@pytest.fixture
def worker(tmp_path: Path, note: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A worker program's command, after `--`: it notes the size of each job."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return ["--", sys.executable, "-S", str(path), str(note)]


def facts(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict[str, Any]:
    """What `--json` prints."""
    assert main(["bench", "--json", *arguments]) == code
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


durations = st.lists(st.floats(1e-6, 1e3), max_size=200).map(sorted)


@given(durations)
def test_percentiles(took: list[float]) -> None:
    """Each is one of the durations, and so many are not above it."""
    found = summary(took)
    if not took:
        assert found == {}
        return
    for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        assert found[name] in took
        assert sum(one <= found[name] for one in took) >= share * len(took)
    assert (found["min"], found["max"]) == (took[0], took[-1])
    assert found["min"] <= found["p50"] <= found["p90"] <= found["p99"] <= found["p99.9"] <= found["max"]


@given(durations)
def test_each_is_in_a_row(took: list[float]) -> None:
    """The rows of the histogram hold each duration once."""
    rows = histogram(took)
    assert sum(count for _, _, count in rows) == len(took)
    assert len(rows) in (0, 1, ROWS)
    for low, high, count in rows:
        inside = [one for one in took if low * (1 - 1e-9) <= one <= high * (1 + 1e-9)]
        assert len(inside) >= count


@given(durations.filter(bool), st.integers(30, 200))
def test_bars(took: list[float], width: int) -> None:
    """Rows fit, the fullest has the longest bar, and none that holds something looks empty."""
    rows = histogram(took)
    lines = bars(rows, width)
    lengths = [sum(letter in "▏▎▍▌▋▊▉█" for letter in line) for line in lines]
    assert all(len(line) <= width for line in lines)
    assert [bool(length) for length in lengths] == [bool(count) for _, _, count in rows]
    counts = [count for _, _, count in rows]
    assert lengths[counts.index(max(counts))] == max(lengths)


def test_spans() -> None:
    """Durations are written in three digits."""
    assert [span(one) for one in (0, 1.234e-6, 0.000999, 0.0123, 1.5, 1234)] == [
        "0 µs", "1.23 µs", "999 µs", "12.3 ms", "1.5 s", "1,234 s",
    ]  # fmt: skip


def test_a_number_of_jobs(worker: list[str], note: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As many jobs as asked for, of the size asked for; those of the warm-up come before and don't count."""
    flags = ["--jobs", "200", "--body", "1234", "--num-workers", "2", "--callers", "5", "--warm-up", "0.05"]
    found = facts(capfd, *flags, *worker)
    assert (found["jobs"], found["failed"], found["failures"]) == (200, 0, {})
    assert (found["workers"], found["callers"], found["body_bytes"]) == (2, 5, 1234)
    assert found["rate"] == pytest.approx(200 / found["seconds"])
    assert sum(count for _, _, count in found["histogram"]) == 200
    assert found["latency"]["p50"] <= found["latency"]["max"] <= found["seconds"]
    noted = note.read_text().split()
    assert len(noted) > 200
    assert set(noted) == {"1234"}


def test_no_warm_up(worker: list[str], note: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without one nothing runs but what is measured."""
    assert facts(capfd, "--jobs", "7", "--warm-up", "0", "--num-workers", "1", *worker)["jobs"] == 7
    assert len(note.read_text().split()) == 7


def test_some_seconds(worker: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """For as long as asked for, and until the last job has ended."""
    found = facts(capfd, "--seconds", "0.2", "--warm-up", "0", "--num-workers", "1", *worker)
    assert found["seconds"] >= 0.2
    assert found["jobs"] > 0


@pytest.mark.parametrize(("job", "kind"), [("fail", "JobError"), ("crash", "WorkerCrashed")])
def test_failures(worker: list[str], job: str, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Jobs that fail are counted by their error, and are in no latency; the exit code is 1."""
    flags = ["--jobs", "4", "--job", job, "--num-workers", "1", "--warm-up", "0"]
    found = facts(capfd, *flags, *worker, code=1)
    assert (found["jobs"], found["failed"], found["failures"]) == (4, 4, {kind: 4})
    assert (found["latency"], found["histogram"]) == ({}, [])
    assert main(["bench", *flags, *worker]) == 1
    shown = capfd.readouterr().out
    assert f"4 failed: {kind} 4; the last: {kind}: " in shown


def test_what_is_shown(worker: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The rate, percentiles by name, and a histogram."""
    assert main(["bench", "--jobs", "50", "--num-workers", "1", "--warm-up", "0", *worker]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert " jobs/s: 50 jobs of 100 bytes in " in lines[0]
    assert lines[0].endswith(" s, 1 worker, 1 caller, after 0 s of warm-up")
    assert lines[2].split() == ["mean", "min", "p50", "p90", "p99", "p99.9", "max"]
    assert len(lines[3].split()) == 14
    assert any("█" in line for line in lines[5:])
    assert len(lines[5:]) == ROWS


MISUSED: Final = {
    ("--jobs", "3", "--seconds", "3"): "--jobs and --seconds exclude each other",
    ("--body", "3", "--job", "x"): "--body and --job exclude each other",
    ("--jobs", "0"): "--jobs must be at least 1, not 0",
    ("--callers", "0"): "--callers must be at least 1, not 0",
    ("--body", "-1"): "--body must be at least 0, not -1",
    ("--seconds", "inf"): "--seconds must be more than 0 and finite, not inf",
    ("--warm-up", "nan"): "--warm-up must be at least 0 and finite, not nan",
}


@pytest.mark.parametrize("arguments", MISUSED, ids=" ".join)
def test_misuse(arguments: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and exit code 2."""
    assert main(["bench", *arguments, "--", "php"]) == 2
    assert capfd.readouterr() == ("", f"trio-workers: {MISUSED[arguments]}\n")


def test_a_program_that_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    """A worker that can't be started is told of in one line."""
    assert main(["bench", "--", "no-such-program"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("trio-workers: SpawnError: ")


def test_ctrl_c(worker: list[str], note: Path) -> None:
    """Ctrl-C ends it with one line."""
    command = [sys.executable, "-m", "trio_workers", "bench", "--seconds", "1000", "--num-workers", "1", *worker]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    trio.run(until, lambda: note.exists() and note.stat().st_size > 100)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, b"")
    assert err.startswith(b"trio-workers: interrupted after ")
    assert err.count(b"\n") == 1
