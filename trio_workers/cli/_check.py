"""The command `check`: whether a worker program is right."""

import json
import logging
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import attrs
import trio
from cyclopts import Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._checker import BIG, Finding, Report, check_worker
from .._config import Config, Limits
from .._factories import Factory, PipeFactory
from .._sockets import SocketFactory
from ._errors import DONE, FAILED, Misuse

STYLES = {"ok": "green", "wrong": "bold red", "note": "yellow", "not tried": "dim"}


def check(
    *command: str,
    protocol: Literal["goridge-1", "goridge-2", "goridge-3"] = "goridge-3",
    relay: Literal["pipes", "socketpair", "tcp", "unix"] = "pipes",
    env: Annotated[list[str] | None, Parameter(negative="")] = None,
    cwd: Path | None = None,
    job: Annotated[list[str] | None, Parameter(negative="")] = None,
    expect: Annotated[list[str] | None, Parameter(negative="")] = None,
    failing_job: str | None = None,
    big: int = BIG,
    timeout: float = 5.0,
    boot_timeout: float = 10.0,
    as_json: Annotated[bool, Parameter(name="--json", negative="")] = False,
) -> int:
    """Is this worker program right? Start it some fifteen times, talk to it as a pool does, and say what to mend.

    Exit code 0: it is right. 1: something is wrong. 2: it was not checked.

    Parameters
    ----------
    command
        The worker's command line, after a `--`: `check -- php worker.php`.
    protocol
        The dialect that it speaks.
    relay
        What it speaks over: stdin and stdout (pipes, or a socketpair), or a socket that it finds in RR_RELAY.
    env
        NAME=VALUE, added to its environment. May be given more than once.
    cwd
        The directory it is started in.
    job
        The body of a job that it takes; the first one is the body of the other probes as well. May be given more
        than once.
    expect
        The reply to the job of the same number. May be given more than once.
    failing_job
        The body of a job that it answers with a job error.
    big
        The size of the big body, in bytes.
    timeout
        Seconds for each answer, and for leaving.
    boot_timeout
        Seconds from its start to the handshake.
    as_json
        Print one JSON document instead of a table.
    """
    if not command:
        raise Misuse("check needs the worker's command line, after a --: trio-workers check -- php worker.php")
    # What workers write to stderr is a finding, and shall not stand between the rows as a log.
    logging.getLogger("trio_workers.worker").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="trio_workers-") as directory:
        try:
            config = Config(
                command=command,
                num_workers=1,
                protocol=protocol,
                factory=_factory(relay, directory),
                env=_environment(env or []),
                cwd=cwd,
                boot_timeout=boot_timeout,
                destroy_timeout=timeout,
                limits=Limits(exec_ttl=timeout),
            )
            report = _run(
                config,
                jobs=[text.encode("utf-8", "surrogateescape") for text in job or []],
                expect=[text.encode("utf-8", "surrogateescape") for text in expect or []],
                failing_job=None if failing_job is None else failing_job.encode("utf-8", "surrogateescape"),
                big=big,
                quiet=as_json,
            )
        except (TypeError, ValueError) as error:
            raise Misuse(_in_flags(str(error))) from None
    if as_json:
        _print_json(report)
    else:
        _print_table(report)
    return DONE if report.right else FAILED


def _factory(relay: str, directory: str) -> Factory:
    match relay:
        case "tcp":
            return SocketFactory("tcp://127.0.0.1:0")
        case "unix":
            return SocketFactory(f"unix://{directory}/check.sock")
        case _:
            return PipeFactory("socketpair" if relay == "socketpair" else "pipe")


def _environment(pairs: list[str]) -> dict[str, str]:
    variables: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise Misuse(f"--env is NAME=VALUE, not {pair!r}")
        variables[name] = value
    return variables


def _in_flags(text: str) -> str:
    """Name the flag where an error names the field."""
    for field, flag in (
        ("Config.boot_timeout", "--boot-timeout"),
        ("Config.destroy_timeout", "--timeout"),
        ("Limits.exec_ttl", "--timeout"),
        ("Config.cwd", "--cwd"),
        ("Config.env", "--env"),
        ("Config.command", "the command"),
        ("big must", "--big must"),
    ):
        text = text.replace(field, flag)
    return text


def _run(
    config: Config, *, jobs: list[bytes], expect: list[bytes], failing_job: bytes | None, big: int, quiet: bool
) -> Report:
    console = Console(stderr=True)
    shown = console.is_terminal and not quiet
    with console.status("start") if shown else _Nothing() as status:

        def tell(finding: Finding) -> None:
            if status is not None:
                status.update(f"after {finding.name}: {finding.verdict}")

        async def main() -> Report:
            return await check_worker(config, jobs=jobs, expect=expect, failing_job=failing_job, big=big, tell=tell)

        return trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)


class _Nothing:
    """In the place of a line of progress, where nobody looks on."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _print_json(report: Report) -> None:
    facts = {
        "right": report.right,
        "command": report.command,
        "protocol": report.protocol,
        "relay": report.relay,
        "checks": [attrs.asdict(finding) for finding in report.findings],
    }
    print(json.dumps(facts))


def _print_table(report: Report) -> None:
    console = Console(file=sys.stdout, highlight=False)
    table = Table(show_edge=False, pad_edge=False, show_lines=False)
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was seen, and what to mend", overflow="fold")
    told: dict[tuple[str, str], str] = {}
    for finding in report.findings:
        if finding.verdict == "not tried":
            continue
        same = told.setdefault((finding.found, finding.mend), finding.name)
        if same != finding.name and finding.mend:
            text = Text(f"As for `{same}`.")
        else:
            text = Text(finding.found)
            if finding.mend:
                text.append(f"\n{finding.mend}", style="bold" if finding.verdict == "wrong" else "")
        table.add_row(finding.name, Text(finding.verdict, style=STYLES[finding.verdict]), text)
    console.print(table)
    untried: dict[str, list[str]] = {}
    for finding in report.findings:
        if finding.verdict == "not tried":
            untried.setdefault(finding.found, []).append(finding.name)
    for why, names in untried.items():
        console.print(Text(f"\nNot tried: {', '.join(names)}. {why}", style=STYLES["not tried"]))
    console.print(Text(_sum_up(report)))


def _sum_up(report: Report) -> str:
    count = sum(finding.verdict == "wrong" for finding in report.findings)
    if not count:
        return f"\nRight: nothing is wrong, in {report.protocol} over {report.relay}."
    return f"\nWrong: {count} of {len(report.findings)} checks."
