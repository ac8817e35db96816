"""Jobs that fail and workers that die, in Sentry: each once, with its worker, and grouped by what went wrong."""

import json
import logging
import os
import re
from typing import Any

import sentry_sdk
import trio
from sentry_sdk.envelope import Envelope
from sentry_sdk.transport import Transport

from trio_workers import (
    AllocateTimeout,
    JobError,
    JobTimeout,
    QueueFull,
    WorkerError,
    open_python_pool,
)

PLACE = re.compile(r'^  File "(.+)", line \d+, in (.+)$', re.MULTILINE)


def before_send(event: dict[str, Any], hint: dict[str, Any]) -> dict[str, Any] | None:
    """Add what an error of the pool knows, and drop what is reported in another way."""
    record: logging.LogRecord | None = hint.get("log_record")
    if record is not None and getattr(record, "reason", "") == "gave up":
        return None  # the RestartLimitExceeded that leaves the pool's block says the same, and more
    tags = event.setdefault("tags", {})
    if record is not None:
        for field in ("pool", "slot", "pid"):
            if (value := getattr(record, field, None)) is not None:
                tags[field] = str(value)
    error = hint["exc_info"][1] if "exc_info" in hint else None
    if isinstance(error, WorkerError | JobTimeout):
        tags |= {"slot": str(error.slot), "pid": str(error.pid)}
        event.setdefault("contexts", {})["worker"] = {"started": error.started, "stderr": error.stderr}
        if isinstance(error, WorkerError):
            tags |= {"phase": error.phase, "returncode": str(error.returncode)}
            event["fingerprint"] = ["{{ default }}", error.phase, str(error.returncode)]
    elif isinstance(error, JobError):
        # Your own frames are the same for all of them: what the worker said tells them apart, less its numbers.
        event["fingerprint"] = ["{{ default }}", re.sub(r"\d+", "N", str(error).partition("\n")[0])]
    elif places := PLACE.findall(str(getattr(error, "__cause__", None) or "")):
        # The same for what a Python function raised: its cause is the traceback in the worker, and says where.
        event["fingerprint"] = ["{{ default }}", *places[-1]]
    return event


def start_sentry(**options: Any) -> None:
    sentry_sdk.init(
        before_send=before_send,
        ignore_errors=[AllocateTimeout, QueueFull],  # too much load: for your metrics, not one event for each caller
        **options,
    )
    # Breadcrumbs are kept by context. Made here, this one is that of all tasks which have none of their own.
    sentry_sdk.get_isolation_scope()


class Printed(Transport):
    """What is shown here in the place of a server."""

    def capture_envelope(self, envelope: Envelope) -> None:
        event = envelope.get_event()
        if event is None:
            return
        for error in reversed(event["exception"]["values"]):
            print(f"{error['type']}: {error['value'].strip()}")
        print("tags:", json.dumps(event["tags"]))
        print("fingerprint:", json.dumps(event["fingerprint"]))
        print("worker:", json.dumps(event.get("contexts", {}).get("worker")))
        for crumb in event["breadcrumbs"]["values"]:
            if crumb["category"].startswith("trio_workers"):  # Sentry itself notes the start of each process, too
                print(f"breadcrumb: {crumb['level']} {crumb['message'].partition(chr(10))[0]}")
        print()


def print_invoice(number: int) -> float:
    if number == 7:
        print("out of paper")
        os._exit(3)
    return 1 / (number - 6)


async def main() -> None:
    async with open_python_pool(num_workers=1, name="printers") as pool:
        for number in (6, 7):
            with sentry_sdk.new_scope() as scope:
                scope.set_tag("pool", pool.config.name)
                try:
                    await pool.run_sync(print_invoice, number)
                except Exception as error:
                    sentry_sdk.capture_exception(error)


if __name__ == "__main__":
    if "SENTRY_DSN" in os.environ:
        start_sentry()
    else:
        start_sentry(dsn="https://key@sentry.invalid/1", transport=Printed)
    trio.run(main)
