"""The examples of metrics and traces, each run as a reader runs it, and what their page shows of them."""

import re

from tests.test_docs import blocks, read
from tests.test_examples import EXAMPLES, run

PAGE = "docs/metrics.md"


def shown(first: str) -> str:
    """The output on the page that begins with this line."""
    (output,) = [block for block in blocks(PAGE, "text") if block.startswith(first)]
    return output


def test_metrics() -> None:
    """The program scrapes itself, and gets what the page shows."""
    output, errors = run("metrics.py")
    assert output == shown("[")
    assert "exited with status 3" in errors


def test_tracing() -> None:
    """The job's span, the function's and the caller's are of one trace; lines of the log may come at any place."""
    output, errors = run("tracing.py")
    picture, logged, job, request = shown("mountain.jpg").splitlines()
    traces = set(re.findall(r"[0-9a-f]{32}", output + errors))
    assert len(traces) == 1

    def plain(text: str) -> str:
        return re.sub(r"[0-9a-f]{32}", "TRACE", re.sub(r"\] \d+:", "] PID:", text))

    assert plain(output).splitlines() == [plain(line) for line in (picture, job, request)]
    assert plain(errors).splitlines() == [plain(logged)]


def test_page_shows_what_the_files_say() -> None:
    """A block below a comment that names a file is a run of whole lines of that file."""
    found = re.findall(r"^<!-- (examples/\S+\.py) -->\n```python\n(.*?)^```$", read(PAGE), re.MULTILINE | re.DOTALL)
    assert [name for name, _ in found] == ["examples/metrics.py", "examples/tracing.py"]
    for name, block in found:
        assert f"\n{block}" in (EXAMPLES.parent / name).read_text(encoding="utf-8")
